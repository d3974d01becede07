"""Run a function on several gloo ranks, as torchrun would."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from hark.grpo.instruments import flops
from hark.grpo.runtime.collectives import joined_world


def on_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(world, *args)` on each of `size` ranks; raises what a rank raised."""
    if size == 1:
        with joined_world() as world:
            function(world, *args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (size, port, function, args), nprocs=size, start_method="spawn")


def _rank(rank: int, size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    flops.SIZES = (256,)  # as in conftest.py
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined_world() as world:
        function(world, *args)
    os._exit(0)  # as launch/common/entry.py leaves, and for its reason
