"""Measures the bytes of all existing tensor storages, on any device, fake tensors included."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of storages that operators return while it is active, until each storage is freed.

    A storage that several tensors share counts once. FSDP resizes the storages of gathered weights; that counts too.
    live: their bytes now. peak: the highest value of `live` since the last `phase` began. peaks: by phase, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        self._sizes = WeakIdKeyDictionary()
        self._finalizers: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.add(output)
        return output

    def add(self, tree: Any) -> None:
        """Count the storages of all tensors in a nested structure; of a DTensor, the local shard's.

        Weights packed for the CPU have no storage that could be asked, and are left out.
        """
        for tensor in tree_iter(tree):
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                self._record(getattr(tensor, "_local_tensor", tensor).untyped_storage())

    def _record(self, storage: torch.UntypedStorage) -> None:
        size = self._sizes.get(storage)  # a list of one number, because the finalizer needs its latest value
        if size is None:
            size = self._sizes[storage] = [0]
            self._finalizers[id(size)] = weakref.ref(storage, partial(self._free, size))
        self.live += storage.nbytes() - size[0]
        size[0] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _free(self, size: list[int], _: weakref.ref) -> None:
        self.live -= size[0]
        del self._finalizers[id(size)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Set `peaks[name]` to the peak of `live` inside the block."""
        gc.collect()
        self.peak = self.live
        yield
        self.peaks[name] = self.peak

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_and_record(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage in self._sizes:
                self._record(storage)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_record)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)
