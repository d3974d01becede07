"""What the tests on several ranks stand on: each call has fresh processes, and what goes wrong in them is told."""

from __future__ import annotations

import os
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
