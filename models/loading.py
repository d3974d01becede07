"""Loading a policy from a Hugging Face checkpoint; each rank reads only its own slice of a sharded tensor."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hark import UserError
from hark.from_file import from_file
from hark.models.cache import TowerCache
from hark.models.directory import check_directory, in_short, pairs, read_json
from hark.models.families import TOO_RECENT
from hark.models.families.audioflamingo3 import AudioFlamingo3Policy, MusicFlamingoPolicy
from hark.models.families.automatic import AutomaticPolicy
from hark.models.families.causal_lm import CausalLMPolicy
from hark.models.families.codec_lm import CodecLMPolicy
from hark.models.families.gemma4 import Gemma4Policy
from hark.models.families.glmasr import GlmAsrPolicy
from hark.models.families.granite_speech import GraniteSpeechPolicy
from hark.models.families.qwen2_5_omni import Qwen2_5OmniPolicy
from hark.models.families.qwen2_audio import Qwen2AudioPolicy
from hark.models.families.qwen3_asr import Qwen3ASRPolicy
from hark.models.families.qwen3_omni_moe import Qwen3OmniMoePolicy
from hark.models.families.voxtral import VoxtralPolicy
from hark.models.linear import use_onednn
from hark.models.lora import WEIGHTS_FILE, add_adapters, initial_weight, is_adapter
from hark.models.policy import Lora, Policy, PolicyError, text_ids
from hark.models.probe import check_text
from hark.models.stored import INDEX, SINGLE, Part, StoredTensors

# config.model_type -> policy class; text-only causal language models need no entry.
FAMILIES: dict[str, type[Policy]] = {
    "audioflamingo3": AudioFlamingo3Policy,
    "gemma4": Gemma4Policy,
    "glmasr": GlmAsrPolicy,
    "granite_speech": GraniteSpeechPolicy,
    "musicflamingo": MusicFlamingoPolicy,
    "qwen2_5_omni": Qwen2_5OmniPolicy,
    "qwen2_5_omni_thinker": Qwen2_5OmniPolicy,
    "qwen2_audio": Qwen2AudioPolicy,
    "qwen3_asr": Qwen3ASRPolicy,
    "qwen3_omni_moe": Qwen3OmniMoePolicy,
    "qwen3_omni_moe_thinker": Qwen3OmniMoePolicy,
    "voxtral": VoxtralPolicy,
}
FAMILIES = {kind: family for kind, family in FAMILIES.items() if kind not in TOO_RECENT}
# Model types that can never be sampled and scored as one row, and why.
REFUSED = {
    "doge": "its layers make a mask of their own from the keys, which differ between decoding and scoring",
    "gemma3n": "transformers builds it with the package timm only, for its vision tower; Gemma 4 needs no such package",
    "vibevoice_asr": "its audio encoder draws random latents, so that no step could be repeated",
    "voxtral_realtime": "it adds audio to the embedding of each new token, so that a clip is not part of the prompt",
    "kyutai_speech_to_text": "it reads audio with each new token, so that a clip is not part of the prompt",
    "nemotron_h_omni": "its decoder has Mamba layers, whose state cannot branch at the end of a prompt in one row",
    "nemo_speechlm": "its decoder has Mamba layers, whose state cannot branch at the end of a prompt in one row",
    "inkling_mm_model": "its layers convolve neighbouring tokens of a row, which may be of other completions",
    "phi4_multimodal": "its adapters are switched on by the kind of input, which only its own forward does",
} | dict.fromkeys(TOO_RECENT, "it needs transformers 5.23, which needs Python 3.11")
SUPPORTED = (
    f"expected an audio language model ({', '.join(sorted(FAMILIES))}) or a text-only causal language model "
    "(...ForCausalLM); see docs/extending.md"
)
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}
LAYERS, MOST_LAYERS = (
    re.compile(r"\w*(layers?|depth|experts)"),
    1024,
)  # the keys of a config, and a bound of their values
LARGEST_WEIGHT = 1e15  # those of published models have at most some thousands
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
    compile_layers: bool = False,
    attention: str = "sdpa",
    own: str | None = None,
    shard: Callable[[Policy], None] | None = None,
) -> Policy:
    """Load a policy from a local directory or a hub name.

    The model is built on the meta device, passed to `shard`, and then given its weights.
    dtype: of the computation, and of weights that are not trained. master_dtype: of weights that are trained.
    train: "all", "no-tower", "projector" or "nothing", see `Policy.select_trained`. lora: trains new or saved adapters
    alone; with "nothing" they are frozen too.
    tower_cache: bytes for the outputs of a frozen tower. recompute: turns on gradient checkpointing.
    compile_layers: see `Policy.compile_layers`. attention: the scorer's, "sdpa" or, on a GPU only, "flex".
    shard: wraps the policy in FSDP.
    own: a policy class of your own, `path/to/file.py:Class`; None is that of the model's type.
    Raises PolicyError if the directory is not a checkpoint, the family is unknown, or tensors do not fit the model.
    """
    directory = _directory(path)
    if (directory / WEIGHTS_FILE).exists() and (lora is None or lora.path is None):
        raise PolicyError(
            f"{directory}: holds adapters beside its weights, as Granite Speech does, and they would be left out; set "
            "lora.path to this directory, or merge them with PEFT first"
        )
    policy = build_policy(directory, own)
    policy.device, policy.name, policy.attention = torch.device(device), str(path), attention
    use_onednn(policy.model)
    policy.select_trained(train)
    if lora is not None:
        add_adapters(policy, lora)
        if train == "nothing":
            policy.requires_grad_(False)
    if policy.tower_is_frozen and (lora is not None or train != "nothing"):
        policy.tower_cache = TowerCache(tower_cache)
    if compile_layers:
        policy.compile_layers()
    if recompute:
        policy.recompute_activations()
    if shard is not None:
        shard(policy)
    _load_weights(policy, directory, dtype, master_dtype)
    return policy


def build_policy(directory: Path, own: str | None = None) -> Policy:
    """The policy of a checkpoint directory, with its parameters on the meta device."""
    from transformers import GenerationConfig

    config = read_config(directory)
    family = family_of(config, where=str(directory), own=own)
    _check_files(directory, family)
    _check_layers(config, directory)
    try:
        with meta_parameters():
            model = family.build(config)
        if (directory / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        policy = family(model, directory)
        _check_ids(policy, directory)
    except UserError:
        raise
    except Exception as error:  # transformers raises any kind for settings that make no sense
        if own is not None:  # a fault of the user's own class is shown with its traceback
            raise
        raise PolicyError(
            f"{directory}: its model cannot be built ({in_short(error)}); copy its files again"
        ) from error
    policy.directory = directory
    return policy


def _check_layers(config: Any, directory: Path) -> None:
    """Raise PolicyError if a config asks for more layers or experts than any model has: building them may never end."""
    for key, value in pairs(config.to_dict()):
        if LAYERS.fullmatch(key) and isinstance(value, int) and value > MOST_LAYERS:
            raise PolicyError(
                f"{directory / 'config.json'}: {key} is {in_short(value)}; expected at most {MOST_LAYERS}"
            )


def _check_ids(policy: Policy, directory: Path) -> None:
    """Raise PolicyError for stop tokens that are none, and for a padding token that the model has not."""
    count = policy.decoder.get_input_embeddings().weight.shape[0]
    for name, ids, most in (("eos_token_id", policy.stop_ids, sys.maxsize), ("pad_token_id", (policy.pad_id,), count)):
        if not all(type(one) is int and 0 <= one < most for one in ids) or not ids:
            raise PolicyError(
                f"{directory}: {name} is {in_short(ids)}; expected tokens of the model, which has {count}; copy "
                "generation_config.json and the tokenizer from the checkpoint that the model was made from"
            )


def read_family(path: str | Path, own: str | None = None) -> type[Policy]:
    """The policy class of a checkpoint, found before anything of it is built or a weight is read.

    Raises PolicyError for what `load_policy` would refuse: no checkpoint, no policy for its model, a missing file.
    """
    family = family_of(read_config(path), where=str(path), own=own)
    if Path(path).is_dir():  # what else is on the hub is seen when it is downloaded
        _check_files(Path(path), family)
    return family


def read_config(path: str | Path) -> Any:
    """The transformers config of a local directory or a hub name; reads config.json only.

    Raises PolicyError if there is none, or if it is not that of a model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if _is_local(path):
        check_directory(Path(path))
        kind = _model_type(Path(path))
        if kind not in CONFIG_MAPPING:
            raise PolicyError(f"{path}: no policy for model type {in_short(kind)!r}; {SUPPORTED}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        where = f"{Path(path) / 'config.json'}: cannot be used" if _is_local(path) else _not_on_hub(path)
        raise PolicyError(f"{where} ({in_short(error)})") from error


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint, without its model. Raises PolicyError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        if Path(path).is_dir():
            check_directory(Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        check_text(path, lambda text: tokenizer.decode(text_ids(tokenizer, text)))
        return tokenizer
    except UserError:
        raise
    except Exception as error:
        raise PolicyError(f"{path}: its tokenizer cannot be loaded ({in_short(error)}); copy it again") from error


def build_from_config(config: Any, own: str | None = None) -> Policy:
    """The policy of a transformers config, without tokenizer, its parameters on the meta device; used for its sizes."""
    family = family_of(config, where="the configuration", own=own)
    policy = family.__new__(family)
    with meta_parameters():
        Policy.__init__(policy, family.build(config), None)
    return policy


def family_of(config: Any, *, where: str, own: str | None = None) -> type[Policy]:
    """The policy class for a transformers config: that of the user's own file, of its type, or the automatic one.

    Raises PolicyError if there is none for its model.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if own is not None:
        return _own_class(own)
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    saved = config.architectures[0] if config.architectures else None
    kind = f"model type {config.model_type!r}" + (f" ({in_short(saved)})" if saved else "")
    if config.model_type in REFUSED:
        raise PolicyError(f"{where}: no policy for {kind}: {REFUSED[config.model_type]}; {SUPPORTED}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    decoders = (known,) if isinstance(known, str) else known
    # transformers has a causal variant of many encoders and of Whisper's decoder, which such a checkpoint does not fit.
    if decoders and not config.is_encoder_decoder and saved in (None, *decoders):
        return CodecLMPolicy if getattr(config, "codec_token", None) else CausalLMPolicy
    if saved and not config.is_encoder_decoder and isinstance(getattr(config, "audio_config", None), PreTrainedConfig):
        return AutomaticPolicy
    raise PolicyError(f"{where}: no policy for {kind}; {SUPPORTED}")


def _own_class(name: str) -> type[Policy]:
    found = from_file(name)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"model.policy={name}: is no class derived from hark.models.policy.Policy")
    return found


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


def _model_type(directory: Path) -> str:
    """The model type in a directory's config.json."""
    path = directory / "config.json"
    if not path.exists():
        adapters = "adapter_config.json" if (directory / "adapter_config.json").exists() else None
        hint = "; it holds adapters: set lora.path to it, and model.path to their model" if adapters else ""
        hint += f"; there is one in {directory / 'model'}" if (directory / "model" / "config.json").exists() else ""
        raise PolicyError(f"{directory}: config.json is missing; expected a Hugging Face checkpoint directory{hint}")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
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
        raise PolicyError(f"{_not_on_hub(path)} ({in_short(error)})") from error


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
    stored, problems = StoredTensors(directory, policy), []
    state: dict[str, torch.Tensor] = {}
    tied = tied_names(policy.model)
    adapters = policy.lora.path if policy.lora else None
    for name, target in policy.model.state_dict(keep_vars=True).items():
        trained_dtype = master_dtype if target.requires_grad else dtype
        if tied[name] != name:
            continue
        if is_adapter(name) and adapters is None:
            state[name] = _placed(partial(_part, initial_weight(name, target.shape)), target, policy, trained_dtype)
        elif name not in stored:
            problems.append(f"{name} is missing")
        elif stored.is_floating_point(name) != target.is_floating_point():
            kind = "floating-point" if target.is_floating_point() else "whole"
            problems.append(f"{stored.stored_name(name)} does not hold {kind} numbers in {stored.file(name).name}")
        elif stored.shape(name) != tuple(target.shape):
            stored_as = f"{stored.stored_name(name)} is {stored.shape(name)}"
            problems.append(f"{stored_as}, the model has {tuple(target.shape)}")
        else:
            state[name] = _placed(partial(stored.read, name), target, policy, trained_dtype)
            if isinstance(target, nn.Parameter):  # some buffers hold infinite values, such as the bounds of a clamp
                _check_values(state[name], stored.stored_name(name), stored.file(name))
    state |= {name: state[first] for name, first in tied.items() if first in state}
    problems += [f"{name} is not part of the model" for name in stored.surplus]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        where = f"{directory} with the adapters of {adapters}" if adapters else directory
        named = "; ".join(map(in_short, problems[:5]))
        raise PolicyError(f"{where}: the weights do not fit config.json: {named}{more}")
    policy.model.load_state_dict(state, assign=True)
    for module in policy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(policy.device)


def _check_values(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Raise PolicyError if this rank's part of a tensor, in the dtype of its use, holds what no weight is.

    A NaN, an infinite value, or one whose square overflows in a norm.
    """
    local = tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    # The extremes are NaN if one value is, and finding them needs no memory.
    if local.is_floating_point() and local.numel():
        largest = float(torch.stack(torch.aminmax(local)).abs().max())
        if not largest < LARGEST_WEIGHT:
            what = f"the value {largest:.1e}" if math.isfinite(largest) else "a value that is not finite"
            raise PolicyError(f"{file}: {in_short(name)} holds {what}, as {local.dtype}; copy the file again")


def _part(tensor: torch.Tensor, part: Part | None) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each name in the state dict, the first name of the same tensor; the two differ for tied weights."""
    first: dict[int, str] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: first.setdefault(id(tensors[name]), name) for name in model.state_dict()}


def _placed(
    read: Callable[[Part | None], torch.Tensor], target: torch.Tensor, policy: Policy, dtype: torch.dtype
) -> torch.Tensor:
    """A stored tensor in the form of `target`; `read` gives all of it, or a part.

    A parameter gets `dtype`; of a sharded one only this rank's part is read. A buffer keeps its stored dtype. Both are
    copied because safetensors returns views of the memory-mapped file, which may change or be deleted.
    """
    if not isinstance(target, nn.Parameter):
        return read(None).to(policy.device, copy=True)
    if not isinstance(target, DTensor):
        return nn.Parameter(read(None).to(policy.device, dtype, copy=True), requires_grad=target.requires_grad)
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    part = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
    local = torch.empty(shape) if 0 in shape else read(part)
    sharded = DTensor.from_local(
        local.to("cpu" if policy.offloads else policy.device, dtype, copy=True), target.device_mesh, target.placements,
        run_check=False, shape=target.shape, stride=target.stride(),
    )  # fmt: skip
    return nn.Parameter(sharded, requires_grad=target.requires_grad)
