"""Run a function on several gloo ranks, as torchrun would, without waiting for Python and its imports each time.

A server process imports what a rank needs, once in a session; every rank of every call is a fork of it. So each call
has processes of its own, which start at once and in which nothing of an earlier call is left.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from hark.grpo.instruments import flops
from hark.grpo.runtime.collectives import joined_world

# Apple's libraries do not survive a fork.
START = "spawn" if sys.platform == "darwin" else "forkserver"
# The first imports most; the others are imported by torch and transformers only where they are used.
PRELOAD = [
    "tests.runs",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2_audio.modeling_qwen2_audio",
    "transformers.models.qwen2_audio.processing_qwen2_audio",
    "transformers.models.whisper.feature_extraction_whisper",
]
GRACE = 10  # seconds by which a rank's error precedes those that it causes on other ranks
LIMIT = 300  # seconds, far beyond any call's: ranks that wait for each other would wait for an hour


def on_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(world, *args)` on each of `size` ranks; raises what a rank raised, or TimeoutError."""
    if size == 1:
        _in_world(function, *args)
    else:
        as_torchrun(size, _in_world, function, *args)


def as_torchrun(size: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` in each of `size` processes that find what torchrun tells a process, and no world yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOAD)
    ranks = mp.start_processes(_rank, (size, port, function, args), nprocs=size, join=False, start_method=START)
    deadline = time.monotonic() + LIMIT
    while not ranks.join(timeout=max(deadline - time.monotonic(), 0)):  # returns when one of them has ended
        if time.monotonic() >= deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{size} ranks have not ended after {LIMIT} s: {function.__name__} {args}")


def _in_world(function: Callable[..., None], *args: Any) -> None:
    with joined_world() as world:
        function(world, *args)


def _rank(rank: int, size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    flops.SIZES = (256,)  # as in conftest.py
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function(*args)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):
            time.sleep(GRACE)  # another rank has failed, and its error is the one to report
        raise
    sys.stdout.flush()
    os._exit(0)  # as launch/common/entry.py leaves, and for its reason
