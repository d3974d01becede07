"""What the tests on several ranks stand on: each call has fresh processes, and what goes wrong in them is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hark.grpo.runtime.collectives import World
from tests import ranks
from tests.ranks import on_ranks


def leave_traces(world: World, directory: Path) -> None:
    assert world.size == dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    assert torch.get_num_threads() == 1
    assert not hasattr(dist, "trace"), "an earlier call's"
    dist.trace = True
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == world.size
    (directory / f"{world.rank}-{os.getpid()}").touch()


def fail_on_the_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise ValueError("the last rank's mistake")
    dist.barrier()


def wait_forever(world: World) -> None:
    time.sleep(600)


def test_every_call_has_processes_of_its_own(tmp_path):
    for size in (2, 4, 2):
        on_ranks(size, leave_traces, tmp_path)
    names = [path.name.split("-") for path in tmp_path.iterdir()]
    assert sorted(rank for rank, _ in names) == sorted("01" + "0123" + "01")
    assert len({process for _, process in names}) == 8


def test_the_error_of_a_rank_is_raised_though_others_wait_for_it(tmp_path):
    with pytest.raises(Exception, match="(?s)Process 1 terminated.*ValueError: the last rank's mistake"):
        on_ranks(2, fail_on_the_last)
    on_ranks(2, leave_traces, tmp_path)


def test_ranks_that_do_not_end_are_ended(monkeypatch):
    monkeypatch.setattr(ranks, "LIMIT", 0.5)
    with pytest.raises(TimeoutError, match="2 ranks have not ended after 0.5 s: .*wait_forever"):
        on_ranks(2, wait_forever)


JOIN = """
import torch.distributed as dist
from hark import UserError
from hark.grpo.runtime.collectives import joined_world
try:
    with joined_world(patience=2.0):
        pass
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("with_launcher", [True, False])
def test_a_rank_that_hangs_before_it_joins_is_named_within_the_patience(with_launcher):
    """With the store in the launcher, as torchrun has it, the library itself would wait for an hour."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True)
    port = store.port
    if not with_launcher:
        del store
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = str(with_launcher)
    if with_launcher:
        dist.PrefixStore("attempt-0", store).set("rank 2", "")
    begun = time.monotonic()
    said = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=100)
    name = "rank 1" if with_launcher else "another rank"
    assert said.stdout.startswith(f"rank 0: {name} of 3 has not joined within 2 s (run.patience)"), said
    assert time.monotonic() - begun < 60
