"""Export of a policy to an ordinary Hugging Face directory, and of its adapters in PEFT's format.

Beside the files is one with their sizes and digests, by which damage is noticed later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from hark import UserError
from hark.files import sync
from hark.grpo.runtime.collectives import World, wait_for_all
from hark.grpo.runtime.manifest import LARGEST, DamageError, File, check_digest, check_size, signed, unsigned
from hark.limits import is_plain
from hark.models.directory import DIGESTS, files_to_copy
from hark.models.loading import tied_names
from hark.models.lora import adapter_delta, adapter_tensors, is_adapter, whole, write_adapters
from hark.models.policy import Policy
from hark.models.stored import StoredTensors

SHARD_BYTES = "5GB"  # of one safetensors file of an export


class ExportError(UserError, RuntimeError):
    """An export that cannot be written."""


def export(policy: Policy, target: Path, world: World, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a directory that transformers' `from_pretrained` loads, with the hub's tensor names, adapters merged.

    Frozen weights, tokenizer and processor are copied from the checkpoint that the policy was loaded from.
    """
    from huggingface_hub import save_torch_state_dict

    stored = StoredTensors(policy.directory, policy)
    state: dict[str, torch.Tensor] = {}
    tied = {name for name, first in tied_names(policy.model).items() if name != first}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if name in tied or is_adapter(name):
            continue
        delta = adapter_delta(policy, name)  # a collective, like `whole` in the next line
        trained = whole(tensor) if tensor.requires_grad else None
        if world.is_main:
            value = stored.read(name) if trained is None else trained
            value = value if delta is None else value.to(delta) + delta
            is_buffer = not isinstance(tensor, torch.nn.Parameter)  # a buffer keeps its dtype, which may be integer
            state[name] = value.cpu() if is_buffer else value.to("cpu", dtype)
    if world.is_main:
        with _replaced(target) as partial:
            for file in files_to_copy(policy.directory):
                shutil.copy2(file, partial / file.name)
            _set_dtype(partial / "config.json", dtype)
            state = stored.as_stored(state) | {name: stored.read_stored(name) for name in stored.untouched}
            state = {name: _own_memory(tensor) for name, tensor in state.items()}
            save_torch_state_dict(state, partial, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    wait_for_all(world)


def export_adapters(policy: Policy, target: Path, world: World) -> None:
    """Write the policy's adapters in PEFT's format."""
    state = adapter_tensors(policy)
    if world.is_main:
        with _replaced(target) as partial:
            write_adapters(policy, state, partial)
    wait_for_all(world)


def damage_of(directory: Path) -> str:
    """Which file of an export is not as it was written, in words; "" if all are.

    Also "" for an export of an older Hark, which wrote no digests.
    """
    path = directory / DIGESTS
    if not path.exists():
        return ""
    try:
        if not is_plain(path, LARGEST):
            return f"{DIGESTS} is not a file of at most {LARGEST >> 20} MB"
        files = {name: File(**entry) for name, entry in unsigned(path.read_bytes(), DIGESTS)["files"].items()}
        for name, file in files.items():
            if Path(name).name != name:
                raise ValueError("a file with such a name is not part of an export")
            check_size(directory / name, file)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: check_digest(directory / name, files[name]), files))
    except DamageError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"{DIGESTS} is not that of an export ({type(error).__name__})"
    return ""


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares its memory with no other: pieces of one would be taken for tied weights."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """An empty directory to write to; at the end of the block it is on the disk and replaces `target`.

    The old `target` is kept beside it, under the name `TARGET.old`, until the new one has its name. Raises ExportError
    if something cannot be written or copied.
    """
    partial, old = (target.with_name(f"{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        files = {path.name: asdict(File.of(path)) for path in sorted(partial.iterdir())}
        (partial / DIGESTS).write_bytes(signed({"files": files}))
        for path in (*partial.iterdir(), partial):
            sync(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # it takes room that may be what is missing
        raise ExportError(
            f"{target} cannot be written ({error}); make room or give access there; `python launch/export.py RUN` "
            "writes a checkpoint of the run as a model"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the stored weights into their config.json."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # its name in older files
    path.write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
