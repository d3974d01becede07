"""Loading a policy from a Hugging Face checkpoint; each rank reads only its own slice of a sharded tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hark.models.cache import TowerCache
from hark.models.families.causal_lm import CausalLMPolicy
from hark.models.families.qwen2_audio import Qwen2AudioPolicy
from hark.models.linear import use_onednn
from hark.models.lora import WEIGHTS_FILE, add_adapters, initial_weight, is_adapter, peft_name
from hark.models.policy import Lora, Policy, PolicyError

# config.model_type -> policy class; text-only causal language models need no entry.
FAMILIES: dict[str, type[Policy]] = {"qwen2_audio": Qwen2AudioPolicy}
SUPPORTED = (
    f"expected an audio language model ({', '.join(sorted(FAMILIES))}) or a text-only causal language model "
    "(...ForCausalLM); see docs/extending.md"
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}
PROCESSORS = {"preprocessor_config.json", "processor_config.json"}


def load_policy(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    master_dtype: torch.dtype = torch.float32,
    train: str = "all",
    tower_cache: int = 0,
    lora: Lora | None = None,
    recompute: bool = False,
    attention: str = "sdpa",
    shard: Callable[[Policy], None] | None = None,
) -> Policy:
    """Load a policy from a local directory or a hub name.

    The model is built on the meta device, passed to `shard`, and then given its weights.
    dtype: of the computation, and of weights that are not trained. master_dtype: of weights that are trained.
    train: "all", "no-tower", "projector" or "nothing", see `Policy.select_trained`. lora: trains new or saved adapters
    alone; with "nothing" they are frozen too.
    tower_cache: bytes for the outputs of a frozen tower. recompute: turns on gradient checkpointing.
    attention: the scorer's, "sdpa" or, on a GPU only, "flex". shard: wraps the policy in FSDP.
    Raises PolicyError if the directory is not a checkpoint, the family is unknown, or tensors do not fit the model.
    """
    directory = _directory(path)
    policy = build_policy(directory)
    policy.device, policy.name, policy.attention = torch.device(device), str(path), attention
    use_onednn(policy.model)
    policy.select_trained(train)
    if lora is not None:
        add_adapters(policy, lora)
        if train == "nothing":
            policy.requires_grad_(False)
    if policy.tower_is_frozen and (lora is not None or train != "nothing"):
        policy.tower_cache = TowerCache(tower_cache)
    if recompute:
        policy.recompute_activations()
    if shard is not None:
        shard(policy)
    _load_weights(policy, directory, dtype, master_dtype)
    return policy


def build_policy(directory: Path) -> Policy:
    """The policy of a checkpoint directory, with its parameters on the meta device."""
    from transformers import GenerationConfig

    config = read_config(directory)
    family = family_of(config, where=str(directory))
    _check_files(directory, family)
    with meta_parameters():
        model = family.build(config)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    policy = family(model, directory)
    policy.directory = directory
    return policy


def read_family(path: str | Path) -> type[Policy]:
    """The policy class of a checkpoint, found before anything of it is built or a weight is read.

    Raises PolicyError for what `load_policy` would refuse: no checkpoint, no policy for its model, a missing file.
    """
    family = family_of(read_config(path), where=str(path))
    if Path(path).is_dir():  # what else is on the hub is seen when it is downloaded
        _check_files(Path(path), family)
    return family


def read_config(path: str | Path) -> Any:
    """The transformers config of a local directory or a hub name; reads config.json only.

    Raises PolicyError if there is none, or if it is not that of a model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if _is_local(path):
        kind = _model_type(Path(path))
        if kind not in CONFIG_MAPPING:
            raise PolicyError(f"{path}: no policy for model type {kind!r}; {SUPPORTED}")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        where = f"{Path(path) / 'config.json'}: cannot be used" if _is_local(path) else _not_on_hub(path)
        raise PolicyError(f"{where} ({_in_short(error)})") from error


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint, without its model. Raises PolicyError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise PolicyError(f"{path}: its tokenizer cannot be loaded ({_in_short(error)}); copy it again") from error


def build_from_config(config: Any) -> Policy:
    """The policy of a transformers config, without tokenizer, its parameters on the meta device; used for its sizes."""
    family = family_of(config, where="the configuration")
    policy = family.__new__(family)
    with meta_parameters():
        Policy.__init__(policy, family.build(config), None)
    return policy


def family_of(config: Any, *, where: str) -> type[Policy]:
    """The policy class for a transformers config. Raises PolicyError if there is none for its model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    decoders = (known,) if isinstance(known, str) else known
    saved = config.architectures[0] if config.architectures else None
    # transformers has a causal variant of many encoders and of Whisper's decoder, which such a checkpoint does not fit.
    if not decoders or config.is_encoder_decoder or saved not in (None, *decoders):
        kind = f"model type {config.model_type!r}" + (f" ({saved})" if saved else "")
        raise PolicyError(f"{where}: no policy for {kind}; {SUPPORTED}")
    return CausalLMPolicy


def _is_local(path: str | Path) -> bool:
    """Whether a path is a directory, and not a name on the hub. Raises PolicyError if it can be neither."""
    if Path(path).is_dir():
        return True
    if Path(path).exists():
        raise PolicyError(
            f"{path}: is a file; expected the directory of a Hugging Face checkpoint: {Path(path).parent}?"
        )
    beside = str(path).count("/") == 1 and Path(path).parent.is_dir()  # "runs/model", where runs/ is a directory here
    if beside or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise PolicyError(
            f"{path}: no such directory (working directory {os.getcwd()}); expected a Hugging Face checkpoint "
            "directory or a hub name"
        )
    return False


def _not_on_hub(path: str | Path) -> str:
    return f"{path}: no such directory, and no model on the hub by that name"


def _in_short(error: Exception) -> str:
    """What an error says, on one line of at most 200 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _model_type(directory: Path) -> str:
    """The model type in a directory's config.json."""
    path = directory / "config.json"
    if not path.exists():
        adapters = "adapter_config.json" if (directory / "adapter_config.json").exists() else None
        hint = "; it holds adapters: set lora.path to it, and model.path to their model" if adapters else ""
        hint += f"; there is one in {directory / 'model'}" if (directory / "model" / "config.json").exists() else ""
        raise PolicyError(f"{directory}: config.json is missing; expected a Hugging Face checkpoint directory{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: not readable as JSON ({_in_short(error)}); copy it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PolicyError(f"{path}: has no model_type; expected the config.json of a transformers model")
    return config["model_type"]


def _check_files(directory: Path, family: type[Policy]) -> None:
    """Raise PolicyError if a directory lacks weights, a tokenizer, or the processor of a model that takes audio."""
    names = {path.name for path in directory.iterdir()}
    copy = "copy it from the checkpoint that the model was made from"
    if not names & {SINGLE, INDEX}:
        _no_weights(directory, names)
    if not names & TOKENIZERS:
        raise PolicyError(f"{directory}: has no tokenizer (tokenizer.json, tokenizer_config.json); {copy}")
    if family.sample_rate is not None and not names & PROCESSORS:
        raise PolicyError(f"{directory}: has no audio processor ({' or '.join(sorted(PROCESSORS))}); {copy}")


def _no_weights(directory: Path, names: set[str]) -> NoReturn:
    other = min(
        (name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))), default=""
    )
    if other:
        raise PolicyError(
            f"{directory}: holds its weights as {other}; expected {SINGLE}; load it with transformers' from_pretrained "
            "and save it with save_pretrained"
        )
    raise PolicyError(f"{directory}: holds neither {SINGLE} nor {INDEX}; expected one of them")


def _directory(path: str | Path) -> Path:
    """The directory of a checkpoint, downloaded if it is a name on the hub."""
    if _is_local(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise PolicyError(f"{_not_on_hub(path)} ({_in_short(error)})") from error


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Create parameters on the meta device inside the block. Buffers, such as rotary frequencies, are not affected."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def _load_weights(policy: Policy, directory: Path, dtype: torch.dtype, master_dtype: torch.dtype) -> None:
    """Read every parameter and buffer of the model from the files of a checkpoint.

    Raises PolicyError that names tensors that are missing, of another shape, or not part of the model.
    """
    stored = StoredTensors(directory, policy)
    unused, problems = stored.names(), []
    state: dict[str, torch.Tensor] = {}
    tied = tied_names(policy.model)
    adapters = policy.lora.path if policy.lora else None
    for name, target in policy.model.state_dict(keep_vars=True).items():
        if tied[name] != name:
            continue
        convert = partial(_convert, target=target, policy=policy, dtype=master_dtype if target.requires_grad else dtype)
        if is_adapter(name) and adapters is None:
            state[name] = convert(initial_weight(name, target.shape))
            continue
        with stored.opened(name) as tensor:
            unused.discard(stored.find(name))
            shape = None if tensor is None else tuple(tensor.get_shape())
            if tensor is None:
                problems.append(f"{policy.hub_name(name)} is missing")
            elif shape != tuple(target.shape):
                problems.append(f"{stored.find(name)} is {shape}, the model has {tuple(target.shape)}")
            else:
                state[name] = convert(tensor)
    for name, first in tied.items():
        unused.discard(stored.find(name))
        if first in state:
            state[name] = state[first]
    problems += [f"{name} is not part of the model" for name in sorted(unused)]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        where = f"{directory} with the adapters of {adapters}" if adapters else directory
        raise PolicyError(f"{where}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}")
    policy.model.load_state_dict(state, assign=True)
    for module in policy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(policy.device)


class StoredTensors:
    """The tensors in the files of a checkpoint and of saved adapters, found by their names in the policy."""

    def __init__(self, directory: Path, policy: Policy):
        self._policy = policy
        self._files = _tensor_files(directory)
        if policy.lora is not None and policy.lora.path is not None:
            self._files |= _tensors_of(policy.lora.path / WEIGHTS_FILE)

    def names(self) -> set[str]:
        """All names in the files."""
        return set(self._files)

    def find(self, name: str) -> str | None:
        """The name in the files of a tensor called `name` in `policy.model`; None if it is not there."""
        candidates = (peft_name(name),) if is_adapter(name) else (self._policy.hub_name(name), name)
        return next((candidate for candidate in candidates if candidate in self._files), None)

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A tensor as a safetensors slice, which reads only the part that is indexed; None if it is not there."""
        stored = self.find(name)
        if stored is None:
            yield None
            return
        with _opened(self._files[stored]) as file:
            yield file.get_slice(stored)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Stored tensor name -> the safetensors file that holds it."""
    index = directory / INDEX
    if index.exists():
        try:
            return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError) as error:
            raise PolicyError(f"{index}: cannot be read ({error}); expected a weight_map; copy it again") from error
    return _tensors_of(directory / SINGLE)


def _tensors_of(path: Path) -> dict[str, Path]:
    with _opened(path) as file:
        return {name: path for name in file.keys()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises PolicyError for a file that cannot be opened or read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{path}: missing or broken ({error}); expected a safetensors file; copy it again") from error


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each name in the state dict, the first name of the same tensor; the two differ for tied weights."""
    first: dict[int, str] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: first.setdefault(id(tensors[name]), name) for name in model.state_dict()}


def _convert(tensor: Any, *, target: torch.Tensor, policy: Policy, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a tensor or safetensors slice in the form of `target`.

    A parameter gets `dtype`; of a sharded one only this rank's slice is read. A buffer keeps its stored dtype. Both are
    copied because safetensors returns views of the memory-mapped file, which may change or be deleted.
    """
    if not isinstance(target, nn.Parameter):
        return tensor[...].to(policy.device, copy=True)
    if not isinstance(target, DTensor):
        return nn.Parameter(tensor[...].to(policy.device, dtype, copy=True), requires_grad=target.requires_grad)
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    local = (
        torch.empty(shape) if 0 in shape else tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    )
    sharded = DTensor.from_local(
        local.to("cpu" if policy.offloads else policy.device, dtype, copy=True), target.device_mesh, target.placements,
        run_check=False, shape=target.shape, stride=target.stride(),
    )  # fmt: skip
    return nn.Parameter(sharded, requires_grad=target.requires_grad)
