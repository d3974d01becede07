"""What the tests on several ranks stand on: each call has fresh processes, and what goes wrong in them is told."""

from __future__ import annotations

import os
import socket
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
from hark import UserError
print("started", flush=True)
import torch.distributed as dist
from hark.grpo.runtime.collectives import joined_world
try:
    print("joins", flush=True)
    with joined_world(patience=%s):
        pass
except UserError as error:
    print(error)
"""


def environment_of(port: int, *, with_launcher: bool) -> dict[str, str]:
    """That of rank 0 of 3. with_launcher: whether the launcher has the store, as torchrun has, or rank 0."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment | {"TORCHELASTIC_USE_AGENT_STORE": str(with_launcher)}


def joining(port: int, *, patience: float, with_launcher: bool) -> str:
    """What a rank says that cannot join."""
    ended = subprocess.run(
        [sys.executable, "-c", JOIN % patience], env=environment_of(port, with_launcher=with_launcher),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return ended.stdout.removeprefix("started\njoins\n")


@pytest.mark.parametrize("with_launcher", [True, False])
def test_a_rank_that_hangs_before_it_joins_is_named_within_the_patience(with_launcher):
    """With the store in the launcher, as torchrun has it, the library itself would wait for an hour."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True)
    port = store.port
    if not with_launcher:
        del store
    else:
        dist.PrefixStore("attempt-0", store).set("rank 2", "")
    begun = time.monotonic()
    said = joining(port, patience=2.0, with_launcher=with_launcher)
    name = "rank 1" if with_launcher else "another rank"
    assert said.startswith(f"rank 0: {name} of 3 has not joined within 2 s (run.patience)"), said
    assert time.monotonic() - begun < 60


def test_a_rank_that_finds_no_store_says_so_in_a_sentence():
    """With a free port, as a launcher leaves it that ended before its ranks joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = joining(free.getsockname()[1], patience=0.5, with_launcher=True)
    assert said.startswith("rank 0: cannot join the 3 ranks (") and said.count("\n") == 1, said
    assert said.endswith("their launcher has ended, or its machine cannot be reached\n")


# Starts the rank, and waits as torchrun does.
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["started", "joins"])
def test_a_rank_ends_when_its_launcher_is_killed_while_it_imports_or_joins(moment):
    """The store is here, and another rank never comes: nothing but the end of the launcher ends this one."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True)
    environment = environment_of(store.port, with_launcher=True) | {"TORCHELASTIC_RUN_ID": "a run"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, JOIN % 600.0], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert launcher.stdout
    while launcher.stdout.readline() != f"{moment}\n":
        pass
    launcher.kill()
    said, _ = launcher.communicate(timeout=100)  # until the rank has ended too, which has the same output
    lines = [line for line in said.splitlines() if line != "joins"]
    assert len(lines) == 1 and lines[0].startswith("error: the launcher of this process has died"), said
