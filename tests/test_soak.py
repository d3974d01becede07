"""The soak: what it sees of processes, what it calls flat, and that its reward fails as often as it says."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hark.data.examples import Example
from hark.data.rewards.judging import Judge
from hark.launch.studies import faults, soak, unreliable_reward
from hark.launch.studies.soak import Growth

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="looks at processes in /proc")


def lines(memory=lambda time: 400.0, handles=lambda time: 30, threads=lambda time: 9) -> list[dict]:
    """An hour of one process, every 5 s."""
    return [
        {"run": "plain", "role": "rank 0", "process": 7, "born": 0.0, "age": float(time), "time": float(time),
         "memory": memory(time), "handles": handles(time), "threads": threads(time)} for time in range(0, 3600, 5)
    ]  # fmt: skip


def grown(samples: list[dict]) -> set[str]:
    found = soak.judged(samples, minutes=60) + soak.longest(samples, minutes=60)
    assert len(found) == 2
    return {name for *_, figures in found for name, one in figures.items() if not one.is_flat(name)}


def test_a_wavering_process_is_flat_and_its_start_does_not_count():
    start = lines(memory=lambda time: 50 + 350 * min(time, 100) / 100 + time % 7, handles=lambda time: 30 + time % 2)
    assert grown(start) == set()


def test_a_leak_of_memory_of_descriptors_or_of_threads_is_noticed():
    assert grown(lines(memory=lambda time: 400 + time / 100)) == {"memory"}  # 36 MiB an hour
    assert grown(lines(handles=lambda time: 30 + time // 600)) == {"handles"}  # one in ten minutes
    assert grown(lines(threads=lambda time: 9 + time // 600)) == {"threads"}


def test_a_leak_from_one_lifetime_to_the_next_is_noticed_though_each_is_flat():
    samples = [line | {"process": int(line["time"] // 300), "age": line["time"] % 300} for line in lines()]
    for line in samples:
        line["handles"] += line["process"]
    ((_, lives, figures),) = soak.judged(samples, minutes=60)
    assert lives == "12" and not soak.longest(samples, minutes=60) and not figures["handles"].is_flat("handles")


def test_less_is_flat():
    assert Growth(400.0, 300.0).is_flat("memory") and Growth(30, 3).is_flat("handles")


@LINUX
def test_a_sample_sees_the_descriptors_threads_and_memory_of_a_process(tmp_path):
    before, stop = soak.sample(os.getpid()), threading.Event()
    thread, kept = threading.Thread(target=stop.wait), mmap.mmap(-1, 2**26)  # not of what was freed before
    for page in range(0, len(kept), mmap.PAGESIZE):
        kept[page] = 1
    thread.start()
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        after = soak.sample(os.getpid())
    stop.set()
    thread.join()
    assert after["handles"] == before["handles"] + 2 and after["threads"] == before["threads"] + 1
    assert 60 < after["memory"] - before["memory"] < 80
    kept.close()


@LINUX
def test_a_process_of_a_run_is_found_although_its_parent_has_ended(tmp_path):
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {faults.MARK: str(tmp_path)}, check=True)
    (found,) = faults.of_run(tmp_path)
    soak.end(tmp_path)
    assert found and not faults.of_run(tmp_path / "other")


SHAPES = """
import torch
from hark.grpo.runtime.collectives import joined_world
from hark.launch.studies.soak import sample

with joined_world(threads=1):
    convolve = torch.nn.Conv1d(64, 64, 3)
    for length in range(10, 610):
        convolve(torch.ones(4, 64, length, requires_grad=True)).sum().backward()
        if length == 110:
            before = sample("self")["memory"]
    print(sample("self")["memory"] - before)
"""


@LINUX
def test_audio_of_ever_other_lengths_takes_no_more_memory():
    """In a process of its own, because the limits are read once."""
    ended = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 25  # MiB; 7 to 12 with both limits, 38 or 80 with one of them


def test_the_reward_hangs_dies_raises_and_has_no_number_or_too_few_and_goes_on(tmp_path):
    """A call that hangs is ended after reward.timeout; a process that died is replaced; the values are None."""
    numbers = [unreliable_reward.which(step, "a") for step in range(20000)]
    name = f"{unreliable_reward.__file__}:unreliable"
    failures = {}
    with Judge([name], "answer", on_error="none", timeout=1) as judge:
        for number in (0, 1, 3, 5, 7, 8):
            step = numbers.index(number)
            found = judge([Example("a", None, "?", (), ("x",))], ["x", "y"], [(1,), (2,)], [True, True], step)
            failures[number] = len(found.failures)
            assert found.columns.isnan().all() == (number != 8)
    assert failures == {0: 1, 1: 1, 3: 1, 5: 2, 7: 1, 8: 0}
