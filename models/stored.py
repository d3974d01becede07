"""The tensors in the files of a checkpoint, under the names that they have in the policy's model.

A checkpoint may store a tensor under another name, and may store the experts of a layer one by one where the model has
one tensor for all of them. Names and conversions are those that transformers itself loads and saves with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.directory import check_directory, in_short, inside, read_json
from hark.models.lora import WEIGHTS_FILE, is_adapter, peft_name
from hark.models.policy import Policy, PolicyError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # as safetensors calls them

Part = tuple[slice, ...]  # of a tensor: one slice for each dimension


class Header(NamedTuple):
    """What a file says of a tensor before its values."""

    shape: tuple[int, ...]
    is_floating_point: bool


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that transformers turns into one or several tensors of the model.

    converter: its WeightConverter. target: the first tensor that it makes. sources: (stored name, the pattern of the
    converter that it matches), in the order in which the converter takes them.
    """

    converter: Any
    target: str
    sources: tuple[tuple[str, str], ...]

    @property
    def stacks_experts(self) -> bool:
        """Whether the stored tensors become the rows of the first dimension, which later operations leave alone."""
        first, *rest = self.converter.operations
        return type(first).__name__ == "MergeModulelist" and first.dim == 0 and all(_keeps_rows(op) for op in rest)


def _keeps_rows(operation: Any) -> bool:
    kind, dims = type(operation).__name__, (getattr(operation, "dim0", 1), getattr(operation, "dim1", 1))
    return getattr(operation, "dim", 1) != 0 and kind in ("Concatenate", "Transpose") and 0 not in dims


class StoredTensors:
    """The files of a checkpoint and of saved adapters, read by the names in `policy.model`.

    Tensors that `policy.untouched` matches are not part of the model: `untouched` are their stored names. `surplus` are
    the stored names of all other tensors that the model does not have.
    """

    def __init__(self, directory: Path, policy: Policy):
        self._model, self._files = policy.model, _tensor_files(directory)
        self._stored: dict[str, str] = {}  # name in the model -> name in the files
        self._conversions: dict[str, Conversion] = {}  # name in the model -> how it is made
        self._shapes: dict[str, tuple[int, ...]] = {}  # of tensors that are made
        self._headers: dict[Path, dict[str, Header]] = {}  # by file and stored name
        names = set(self._model.state_dict())
        self.untouched = sorted(name for name in self._files if re.match(policy.untouched or r"\Z.", name))
        self.surplus = self._find(names, sorted(self._files.keys() - set(self.untouched), key=_natural))
        if policy.lora is not None and policy.lora.path is not None:
            self._add_adapters(names, policy.lora.path / WEIGHTS_FILE)

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._conversions

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; only the headers of the files are read."""
        return self._shapes[name] if name in self._shapes else self._stored_shape(self._stored[name])

    def is_floating_point(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers; only the headers of the files are read."""
        return self._header(self.stored_name(name)).is_floating_point

    def file(self, name: str) -> Path:
        """The file that holds a tensor, or the first of those that it is made of."""
        return self._files[self.stored_name(name)]

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it. Of a tensor that is stored as it is, and of experts, only that part is read."""
        if name in self._stored:
            return self.read_stored(self._stored[name], part)
        conversion = self._conversions[name]
        if part is None or not conversion.stacks_experts:
            made = self._convert(conversion)[name]
            return made if part is None else made[part]
        experts = part[0]
        return self._convert(conversion, experts)[name][(slice(None), *part[1:])]

    def read_stored(self, stored: str, part: Part | None = None) -> torch.Tensor:
        """A tensor by its name in the files."""
        with _opened(self._files[stored]) as file:
            return file.get_slice(stored)[... if part is None else part]

    def stored_name(self, name: str) -> str:
        """The name in the files, for messages; that of the first tensor of a conversion."""
        return self._stored[name] if name in self._stored else self._conversions[name].sources[0][0]

    def as_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the model under the names, and in the pieces, in which the checkpoint stores them."""
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = [transform for transform in self._transforms if transform.was_used()]
        return revert_weight_conversion(self._model, tensors)

    def _find(self, names: set[str], stored: Sequence[str]) -> list[str]:
        """Find the tensor of the model that each stored one is or becomes part of; returns those without one."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self._transforms = get_model_conversion_mapping(self._model)
        converters: list[Any] = [each for each in self._transforms if isinstance(each, WeightConverter)]
        renamings: list[Any] = [each for each in self._transforms if not isinstance(each, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, meta = self._model.base_model_prefix, dict.fromkeys(names, True)
        sources: dict[str, list[tuple[str, str]]] = {}
        surplus = []
        for name in stored:
            target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in names and name in names:  # as transformers does: it should not have been renamed
                target, pattern = name, None
            if target not in names:
                surplus.append(name)
            elif pattern is None:
                self._stored[target] = name
            else:
                sources.setdefault(target, []).append((name, pattern))
        for target, found in sources.items():
            self._add_conversion(Conversion(by_pattern[found[0][1]], target, tuple(found)))
        return surplus

    def _add_conversion(self, conversion: Conversion) -> None:
        """Note what a conversion makes, found by running it on tensors without data."""
        tensors = [torch.empty(self._stored_shape(name), device="meta") for name, _ in conversion.sources]
        try:
            made = self._run(conversion, tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            names = ", ".join(name for name, _ in conversion.sources[:3])
            raise PolicyError(f"{conversion.target} cannot be made of {names}, ... ({error})") from error
        for name, tensor in made.items():
            self._conversions[name], self._shapes[name] = conversion, tuple(tensor.shape)

    def _add_adapters(self, names: set[str], path: Path) -> None:
        adapters = _tensors_of(path)
        self._files |= adapters
        known = {peft_name(name): name for name in names if is_adapter(name)}
        self._stored |= {name: stored for stored, name in known.items() if stored in adapters}
        self.surplus += sorted(adapters.keys() - known.keys())

    def _convert(self, conversion: Conversion, experts: slice = slice(None)) -> dict[str, torch.Tensor]:
        """What a conversion makes; experts: only from these of each pattern's stored tensors."""
        kept = {
            name
            for pattern in conversion.converter.source_patterns
            for name in [source for source, matched in conversion.sources if matched == pattern][experts]
        }
        part = Conversion(
            conversion.converter, conversion.target, tuple(pair for pair in conversion.sources if pair[0] in kept)
        )
        return self._run(part, [self.read_stored(name) for name, _ in part.sources])

    def _run(self, conversion: Conversion, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(conversion.converter)
        for (name, pattern), tensor in zip(conversion.sources, tensors, strict=True):
            converter.add_tensor(conversion.target, name, pattern, tensor)
        made = converter.convert(conversion.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return self._header(stored).shape

    def _header(self, stored: str) -> Header:
        """What the header of its file says of a tensor; each header is read once, for all of its tensors."""
        known = self._headers.setdefault(self._files[stored], {})
        if stored not in known:
            with _opened(self._files[stored]) as file:
                for name in {stored, *file.keys()}:  # a file that lacks the tensor is an error
                    values = file.get_slice(name)
                    known[name] = Header(tuple(values.get_shape()), values.get_dtype() in FLOATS)
        return known[stored]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts names with their numbers as numbers, as the conversions of transformers expect."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Stored tensor name -> the safetensors file that holds it."""
    index = directory / INDEX
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise PolicyError(f"{index}: has no weight_map of tensors to files; copy it again")
        for file in {str(file): file for file in files.values()}.values():
            _check_shard(file, directory, index)
        return {name: directory / file for name, file in files.items()}
    return _tensors_of(directory / SINGLE)


def weight_files(directory: Path) -> set[Path]:
    """The files of weights that are read of the directory of a model or of adapters, by their resolved paths.

    Each is opened, by which its length is compared with that in its header. Raises PolicyError for one that is missing
    or has another length, and for a directory that `check_directory` refuses.
    """
    check_directory(directory)
    has_index = (directory / INDEX).exists()
    single = (WEIGHTS_FILE,) if has_index else (SINGLE, WEIGHTS_FILE)
    found = {directory / name for name in single if (directory / name).exists()}  # the loader says which it needs
    found |= set(_tensor_files(directory).values()) if has_index else set()
    for path in found:
        _tensors_of(path)
    return {path.resolve() for path in found}


def _check_shard(name: Any, directory: Path, index: Path) -> None:
    """Refuse a file of weights that is none of the directory's own."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or "\0" in name:
        raise PolicyError(f"{index}: names {in_short(name)!r}; expected safetensors files; copy it again")
    if not inside(directory / name, directory):
        raise PolicyError(f"{index}: {in_short(name)} is not in the model directory; expected only files of it")


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
