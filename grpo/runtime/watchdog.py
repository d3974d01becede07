"""Ends a rank when another rank hangs, and says which rank and in what phase.

Each rank has a thread that publishes where its main thread is, and watches the rank after it. A rank that waits for
others in a collective is not the cause.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.leaving import leave
from hark.grpo.runtime.out_of_memory import reason

SHARE = 20  # looks at the other rank within run.patience
FASTEST, SLOWEST = 0.5, 10.0  # seconds between two of them


class Watchdog:
    """patience: seconds without progress of a rank. store: shared by the ranks; None for one rank."""

    def __init__(self, world: World, *, patience: float, store: dist.Store | None):
        self._world, self._patience, self._store = world, patience, store
        self._watched = (world.rank + 1) % world.size
        self._interval = min(max(patience / SHARE, FASTEST), SLOWEST)
        self._beat, self._seen, self._moved = 0, (-1, time.monotonic()), ([-1, -1], time.monotonic())
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in the block."""
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self._publish()
                found = self._judge(self._read())
            except RuntimeError as error:  # of the store
                found = f"the launcher or rank 0 cannot be reached ({reason(error)[:200]})"
            if found and not self._ended.is_set():
                leave(f"error: {found}; the same command with run.resume=true goes on from the last checkpoint", 1)
        if self._store is not None:
            try:
                self._store.set(str(self._world.rank), "null")
            except RuntimeError:
                pass

    def _publish(self) -> None:
        self._beat += 1
        if self._store is not None:
            self._store.set(str(self._world.rank), json.dumps([self._beat, *self._world.progress.now()]))

    def _read(self) -> list | None:
        """What the watched rank has published; None before its beginning and after its end."""
        if self._store is None:
            return [self._beat, *self._world.progress.now()]
        key = str(self._watched)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _judge(self, published: list | None) -> str:
        """What is wrong with the watched rank, or ""."""
        if published is None:
            return ""
        beat, progress, waits, doing = published
        now = time.monotonic()
        if beat != self._seen[0]:
            self._seen = beat, now
        if progress != self._moved[0] or waits:
            self._moved = progress, now
        silent, still = now - self._seen[1], now - self._moved[1]
        if silent > self._patience:
            return f"rank {self._watched} has not answered for {silent:.0f} s (run.patience); its last phase: {doing}"
        if still > self._patience:
            return (
                f"rank {self._watched} has made no progress for {still:.0f} s (run.patience), in this phase: {doing}; "
                "raise run.patience if that may take longer"
            )
        return ""


@contextmanager
def watched(world: World, *, patience: float) -> Iterator[None]:
    """Watch the ranks of a run in the block; with a patience of 0, nothing."""
    if not patience:
        yield
        return
    with Watchdog(world, patience=patience, store=_store(world)).watching():
        yield


def _store(world: World) -> dist.Store | None:
    """A connection of its own to the store of torchrun: a client's calls wait for each other."""
    if world.size == 1:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"hark/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
