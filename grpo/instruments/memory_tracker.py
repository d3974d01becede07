"""What memory really holds: the bytes of all storages that live, seen from outside, tensor by tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class MemoryTracker(TorchDispatchMode):
    """Bytes of all storages that live, and their peak since `phase` began; inside, FSDP's resizing counts too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        self._sizes = WeakIdKeyDictionary()
        self._deaths: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.add(output)
        return output

    def add(self, tree) -> None:
        for tensor in tree_iter(tree):
            if isinstance(tensor, torch.Tensor):
                self._note(getattr(tensor, "_local_tensor", tensor).untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> None:
        held = self._sizes.get(storage)
        if held is None:
            held = self._sizes[storage] = [0]
            self._deaths[id(held)] = weakref.ref(storage, partial(self._forget, held))
        self.live += storage.nbytes() - held[0]
        held[0] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, held: list[int], _: weakref.ref) -> None:
        self.live -= held[0]
        del self._deaths[id(held)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        self.peak = self.live
        yield
        self.peaks[name] = self.peak

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage in self._sizes:
                self._note(storage)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        self._patch.stop()
        super().__exit__(*error)
