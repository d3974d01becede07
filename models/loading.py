"""From a Hugging Face directory to a policy: each rank reads its own slice of every tensor, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from models.causal_lm import CausalLMPolicy
from models.policy import Policy, PolicyError
from models.qwen2_audio import Qwen2AudioPolicy

# config.model_type -> family; a text-only causal LM needs no entry.
FAMILIES: dict[str, type[Policy]] = {"qwen2_audio": Qwen2AudioPolicy}


def load_policy(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    train_tower: bool = True,
    recompute: bool = False,
    shard: Callable[[Policy], None] | None = None,
) -> Policy:
    """Load a policy with float32 weights from a local directory or a hub name.

    The module is built without memory, handed to `shard`, which may wrap it in FSDP, and then filled.
    Raises PolicyError for a directory that is no checkpoint, an unknown family, or tensors that do not fit.
    """
    directory = _directory(path)
    policy = build_policy(directory)
    if not train_tower:
        policy.freeze_tower()
    if recompute:
        policy.recompute_activations()
    if shard is not None:
        shard(policy)
    _fill(policy, directory, torch.device(device))
    return policy


def build_policy(directory: Path) -> Policy:
    """The policy of a checkpoint directory with its parameters on the meta device, where they take no memory."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(directory)
    family = family_of(config, where=str(directory))
    with meta_parameters():
        model = family.build(config)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    policy = family(model, directory)
    policy.directory = directory
    return policy


def read_config(path: str | Path):
    """The transformers config of a local directory or a hub name; of the whole checkpoint only config.json is read.

    Raises PolicyError where there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise PolicyError(
            f"{path}: no config.json could be read there, nor on the hub by that name ({error})"
        ) from error


def build_outline(config) -> Policy:
    """A policy of a transformers config alone, its parameters on the meta device: sizes without files or tokenizer."""
    family = family_of(config, where="the configuration")
    outline = family.__new__(family)
    with meta_parameters():
        Policy.__init__(outline, family.build(config), None)
    return outline


def family_of(config, *, where: str) -> type[Policy]:
    """The policy class of a transformers config. Raises PolicyError for a model type that has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise PolicyError(
            f"{where}: no policy for model type {config.model_type!r}; there is {', '.join(sorted(FAMILIES))} "
            "and every causal language model of text; see 'Make it yours' in README.md"
        )
    return CausalLMPolicy


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        if str(path).count("/") != 1 or str(path).startswith((".", "/")):
            raise PolicyError(f"{path}: no such directory; expected a Hugging Face checkpoint directory or a hub name")
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(str(path)))
        except Exception as error:
            raise PolicyError(f"{path}: no such directory, and the hub gave none by that name ({error})") from error
    if not (directory / "config.json").exists():
        raise PolicyError(f"{directory}: config.json is missing; expected a Hugging Face checkpoint directory")
    return directory


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Put parameters made inside on the meta device; buffers (rotary frequencies) are computed for real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _fill(policy: Policy, directory: Path, device: torch.device) -> None:
    """Read every tensor of the module tree; say which are missing, left over or of another shape."""
    files = _tensor_files(directory)
    targets = policy.model.state_dict(keep_vars=True)
    tied = tied_names(policy.model)
    state: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for name, target in targets.items():
        if tied[name] != name:
            continue
        stored = next((key for key in (policy.hub_name(name), name) if key in files), None)
        if stored is None:
            problems.append(f"{policy.hub_name(name)} is missing")
            continue
        with safe_open(files.pop(stored), framework="pt") as handle:
            shape = tuple(handle.get_slice(stored).get_shape())
            if shape != tuple(target.shape):
                problems.append(f"{stored} is {shape}, the model wants {tuple(target.shape)}")
            else:
                state[name] = _read(handle, stored, target, device)
    for name, first in tied.items():
        files.pop(policy.hub_name(name), None)
        if first in state:
            state[name] = state[first]
    problems += [f"{name} is not part of the model" for name in files]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PolicyError(f"{directory}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}")
    policy.model.load_state_dict(state, assign=True)
    for module in policy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Stored tensor name -> the safetensors file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = directory / "model.safetensors"
    if not single.exists():
        raise PolicyError(f"{directory}: neither model.safetensors nor {index.name} is there")
    with safe_open(single, framework="pt") as handle:
        return {name: single for name in handle.keys()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each name of the state dict -> the first name of the same tensor."""
    first: dict[int, str] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: first.setdefault(id(tensors[name]), name) for name in model.state_dict()}


def _read(handle, name: str, target: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The stored tensor like `target`: a float32 parameter, only this rank's slice if sharded, or a buffer as it is."""
    trained = target.requires_grad
    if not isinstance(target, nn.Parameter):
        return handle.get_tensor(name).to(device)
    if not isinstance(target, DTensor):
        return nn.Parameter(handle.get_tensor(name).to(device, torch.float32), requires_grad=trained)
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if 0 in shape:
        local = torch.empty(shape)
    else:
        local = handle.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    sharded = DTensor.from_local(
        local.to(device, torch.float32), target.device_mesh, target.placements,
        run_check=False, shape=target.shape, stride=target.stride(),
    )  # fmt: skip
    return nn.Parameter(sharded, requires_grad=trained)
