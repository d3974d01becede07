"""Low-rank adapters: a frozen linear layer computes W x + b + (alpha / rank) B A x, and only A and B are trained.

Hu et al. 2021, arXiv 2106.09685. They are saved in the file format of PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from hark.models.directory import check_directory, in_short, read_json
from hark.models.linear import Linear, linear
from hark.models.policy import Lora, Policy, PolicyError

ALL = "all-linear"  # a target: every linear layer in the decoder's layers
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
MOST_SCALE = 1e6  # of an adapter; usual ones are at most some hundreds
MOST_RANK = 1 << 16  # of an adapter; no layer has more columns


def read_lora(path: str | Path) -> Lora:
    """The settings of adapters saved in a directory.

    Raises PolicyError if the directory holds no adapters, or adapters other than plain LoRA.
    """
    path = Path(path)
    try:
        check_directory(path)
        saved = read_json(path / CONFIG_FILE)
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
            # From the tensors' names, because target_modules may be a list or a regular expression.
            layers = {name.removesuffix(".lora_A.weight") for name in file.keys() if name.endswith(".lora_A.weight")}
        targets = tuple(sorted(layer.removeprefix(PEFT_PREFIX) for layer in layers))
        lora = Lora(_count(saved["r"]), _number(saved["lora_alpha"]), targets, path)
        if not targets:
            raise ValueError(f"no tensors of LoRA in {WEIGHTS_FILE}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        raise PolicyError(
            f"{path}: no adapters ({in_short(error)}); expected {CONFIG_FILE} with r and lora_alpha, and {WEIGHTS_FILE}"
        ) from error
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if saved.get(key):
            raise PolicyError(f"{path / CONFIG_FILE}: {key} is {in_short(saved[key])}; only plain LoRA can be loaded")
    return lora


def _count(value: Any) -> int:
    """A rank; ValueError for what is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST_RANK:
        raise ValueError(f"r is {in_short(value)!r}; expected an integer from 1 to {MOST_RANK}")
    return value


def _number(value: Any) -> float:
    """A scale; ValueError for what is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MOST_SCALE:
        raise ValueError(f"lora_alpha is {in_short(value)!r}; expected a number up to {MOST_SCALE:.0e}")
    return float(value)


class LoraLinear(Linear):
    """A linear layer with an adapter. `add_adapters` turns an nn.Linear into it in place; tensor names are kept."""

    lora_A: nn.Parameter  # (rank, in)
    lora_B: nn.Parameter  # (out, rank); 0 in a new adapter, which therefore changes no output
    scale: float  # alpha / rank
    enabled: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.scale * linear(linear(x, self.lora_A), self.lora_B) if self.enabled else y


def adapted_layers(policy: Policy, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by their names in `policy.model`.

    A target is the last part of the names of layers of the decoder ("q_proj"), of the audio tower ("tower.q_proj") or
    of the projector ("projector.linear"); the full name of a layer; or "all-linear", every one in the decoder's layers.
    Raises PolicyError for a target without a layer.
    """
    regions = {
        "": _linears(policy.decoder),
        "tower.": _linears(policy.tower),
        "projector.": {layer for module in policy.projectors for layer in _linears(module)},
    }
    in_layers = _linears(policy.decoder.layers)
    chosen: dict[str, nn.Linear] = {}
    known: set[str] = set()
    for name, layer in policy.model.named_modules():
        if isinstance(layer, nn.Linear):
            last = name.rpartition(".")[2]
            keys = {name, *(region + last for region, layers in regions.items() if layer in layers)}
            keys |= {ALL} if layer in in_layers else set()
            known |= keys - {name}
            if keys & set(targets):
                chosen[name] = layer
    if missing := [target for target in targets if target not in known | chosen.keys()]:
        raise PolicyError(f"lora.targets: no linear layer is called {', '.join(missing)}; there is {sorted(known)}")
    return chosen


def _linears(module: nn.Module | None) -> set[nn.Module]:
    return set() if module is None else {layer for layer in module.modules() if isinstance(layer, nn.Linear)}


def add_adapters(policy: Policy, lora: Lora) -> None:
    """Freeze the policy and add an adapter to each target layer.

    The adapters are on the meta device; `load_policy` gives them values. Raises PolicyError for an unknown target.
    """
    policy.requires_grad_(False)
    for module in adapted_layers(policy, lora.targets).values():
        module.__class__ = LoraLinear
        assert isinstance(module, LoraLinear)
        module.scale, module.enabled = lora.alpha / lora.rank, True
        module.lora_A = nn.Parameter(torch.empty(lora.rank, module.in_features, device="meta"))
        module.lora_B = nn.Parameter(torch.empty(module.out_features, lora.rank, device="meta"))
    policy.lora = lora


def initial_weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The initial value of an adapter tensor: B is 0; A is uniform as in PEFT, seeded by its name, not by rank."""
    if name.endswith("lora_B"):
        return torch.zeros(*shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    bound = math.sqrt(1 / shape[1])  # kaiming_uniform_ with a = sqrt(5): sqrt(6 / ((1 + 5) * in))
    return torch.empty(*shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def is_adapter(name: str) -> bool:
    """Whether a name in the state dict is that of an adapter tensor."""
    return name.endswith((".lora_A", ".lora_B"))


def peft_name(name: str) -> str:
    """The name in PEFT's files of an adapter tensor called `name` in `policy.model`."""
    return f"{PEFT_PREFIX}{name}.weight"


class WithoutAdapters:
    """A policy with its adapters disabled. It serves as the reference of the KL term and needs no extra weights."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with adapters_off(self.policy):
            return self.policy(function, *args, **kwargs)


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """Disable the policy's adapters inside the block, which must not record gradients."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def adapter_delta(policy: Policy, name: str) -> torch.Tensor | None:
    """The matrix (out, in) that an adapter adds to the weight called `name` in `policy.model`; None without adapter.

    (alpha / rank) B A in float32. A collective: every rank must call it.
    """
    layer, _, tensor = name.rpartition(".")
    module = policy.model.get_submodule(layer)
    if tensor != "weight" or not isinstance(module, LoraLinear):
        return None
    return module.scale * whole(module.lora_B).float() @ whole(module.lora_A).float()


def adapter_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """All adapter tensors by their names in PEFT, float32 on the CPU. A collective: every rank must call it."""
    adapters = {name: tensor for name, tensor in policy.model.state_dict().items() if is_adapter(name)}
    return {peft_name(name): whole(tensor).float().cpu().contiguous() for name, tensor in adapters.items()}


def write_adapters(policy: Policy, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write `adapter_tensors(policy)` and their settings to a directory in PEFT's format."""
    lora = policy.lora
    assert lora is not None
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": policy.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_pattern(policy),
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full, detached tensor of one that may be sharded. A collective: every rank must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _target_pattern(policy: Policy) -> str:
    """A regular expression for the full names of the adapted layers, the same in every layer of a stack."""
    names = [name for name, module in policy.model.named_modules() if isinstance(module, LoraLinear)]
    return "|".join(sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names}))
