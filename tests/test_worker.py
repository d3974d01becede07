"""data/worker.py: processes that make calls, and the check of clips, which decodes in them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hark.data import clips
from hark.data.clip import Clip, Held
from hark.data.clip_memory import ClipMemory
from hark.data.clips import Rules, inspect, inspect_all, usable
from hark.data.errors import AudioError
from hark.data.examples import Example
from hark.data.worker import LateError, Worker, WorkerError
from hark.limits import limit_memory
from tests import decoders
from tests.clips import waveform

RULES = Rules(16_000, 2.0)
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded on Linux only")


@pytest.fixture
def worker():
    one = Worker("math", memory=1 << 28)
    yield one
    one.close()


def test_a_process_returns_and_raises_what_the_function_does(worker):
    assert worker.call(divmod, 7, 2, timeout=60) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        worker.call(divmod, 7, 0, timeout=60)
    first = worker.call(os.getpid, timeout=60)
    assert worker.call(os.getpid, timeout=60) == first != os.getpid()


def test_a_process_that_hangs_crashes_or_exits_is_replaced(worker):
    first = worker.call(os.getpid, timeout=60)
    with pytest.raises(LateError, match=r"not finished after 0.2 s and was ended"):
        worker.call(time.sleep, 1000, timeout=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pytest.raises(WorkerError, match=f"died of signal {int(signal.SIGABRT)}"):
        worker.call(os.abort, timeout=60)
    with pytest.raises(WorkerError, match="died with status 3"):
        worker.call(os._exit, 3, timeout=60)
    assert worker.call(len, "four", timeout=60) == 4


HOLDER = """
import os
from hark.data.worker import Worker
from tests import decoders
worker = Worker("re")
print(worker.call(os.getpid, timeout=60), flush=True)
worker.call(decoders.backtracks, timeout=600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread of the process ends it, which must run")
def test_a_process_that_lets_no_other_thread_run_ends_with_the_one_that_started_it():
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    process = int(holder.stdout.readline())
    assert holder.stdout.readline() == "stuck\n"
    holder.kill()
    try:
        holder.communicate(timeout=30)  # until its process has ended too, which has the same output
    except subprocess.TimeoutExpired:
        os.kill(process, signal.SIGKILL)
        raise


def test_a_process_outlives_the_thread_that_made_its_first_call(worker):
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(worker.call, os.getpid, timeout=60).result()
    assert worker.call(os.getpid, timeout=60) == first


@LINUX
def test_a_call_that_needs_more_memory_than_the_bound_raises_and_one_that_needs_less_returns(worker):
    with pytest.raises(MemoryError):
        worker.call(bytearray, 1 << 29, timeout=60)
    assert len(worker.call(bytes, 1 << 26, timeout=60)) == 1 << 26


@LINUX
def test_addresses_that_are_reserved_and_files_that_are_mapped_to_be_read_are_no_memory(worker, tmp_path):
    """Otherwise no reward could use CUDA, or import a torch that has it."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(1 << 30)
    worker.call(decoders.reserves, 1 << 34, timeout=60)
    worker.call(decoders.maps, str(file.name), timeout=60)


@LINUX
def test_a_bound_of_memory_within_a_smaller_one_is_the_smaller_one(worker):
    worker.call(limit_memory, 1 << 40, timeout=60)
    with pytest.raises(MemoryError):
        worker.call(bytearray, 1 << 29, timeout=60)


def test_what_cannot_be_sent_is_an_error_of_the_call_alone(worker):
    with pytest.raises(WorkerError, match="cannot be given the call"):
        worker.call(len, (n for n in "ab"), timeout=60)
    assert worker.call(len, "ab", timeout=60) == 2
    with pytest.raises(TypeError, match="cannot pickle"):
        worker.call(memoryview, b"", timeout=60)
    with pytest.raises(RuntimeError, match="OddError: one and two"):
        worker.call(decoders.raises_odd, timeout=60)
    assert worker.call(len, "ab", timeout=60) == 2


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Questions about clips with which a decoder fails, among good ones."""
    monkeypatch.setattr(clips, "attempt", decoders.attempt)
    monkeypatch.setattr(clips, "MOST_SECONDS", 2.0)
    names = ["good-1", "hangs", "good-2", "crashes", "good-3", "swells", "good-4"]
    for n, name in enumerate(names):
        soundfile.write(tmp_path / f"{name}.wav", waveform(0.3, n), 16_000)
    return [
        Example(name, (Clip(tmp_path / f"{name}.wav"),), "Which?", ("a", "b"), 0, line=f"train.jsonl:{n + 1}")
        for n, name in enumerate(names)
    ]


def check(data, path):
    memory = ClipMemory("rules", path)
    return dict(inspect_all(clips.clips_in(data), RULES, workers=2, memory=memory))


@LINUX
def test_a_clip_whose_decoder_hangs_crashes_or_takes_all_memory_is_that_clips_fault_alone(failing, tmp_path):
    found = check(failing, tmp_path / "memory")
    good, bad = usable(failing, found, long_clips="error", skip_bad=True)
    assert [example.id for example in good] == ["good-1", "good-2", "good-3", "good-4"]
    assert [example.seconds for example in good] == [0.3] * 4
    hangs, crashes, swells = (one.reason for one in bad)
    assert "cannot be decoded: its process was not finished after 2 s and was ended; remove the example" in hangs
    assert f"cannot be decoded: its process died of signal {int(signal.SIGSEGV)}" in crashes
    assert "cannot be decoded: its process needed more than 1." in swells
    with pytest.raises(AudioError, match=r"^3 of 7 clips cannot be used; data.skip_bad=true leaves them out"):
        usable(failing, found, long_clips="error", skip_bad=False)


def test_a_clip_whose_decoder_failed_is_tried_again_at_the_next_start(failing, tmp_path, monkeypatch):
    data = [failing[0], failing[3]]
    assert [finding.fault for finding in check(data, tmp_path / "memory").values()] == ["", "not decodable"]
    monkeypatch.undo()
    assert [finding.fault for finding in check(data, tmp_path / "memory").values()] == ["", ""]


def test_no_process_is_started_for_clips_that_are_remembered(failing, tmp_path, monkeypatch):
    first = check(failing[:1], tmp_path / "memory")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert check(failing[:1], tmp_path / "memory") == first


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_a_process_finds_what_this_one_finds(tmp_path, kind):
    paths = [tmp_path / f"{name}.{kind}" for name in ("good", "stereo", "long", "cut", "silent", "missing")]
    good, stereo, long, cut, silent, _ = paths
    soundfile.write(good, waveform(1.0, 0), 44_100)
    soundfile.write(stereo, np.stack([waveform(1.0, 0), waveform(1.0, 1)], axis=1), 22_050)
    soundfile.write(long, waveform(3.0, 0), 16_000)
    cut.write_bytes(good.read_bytes()[:-100])
    soundfile.write(silent, np.zeros(16_000), 16_000)
    held = [Clip(Held("a[0]", good.read_bytes())), Clip(Held("a[1]", good.read_bytes()), 0.1, 0.3)]
    every = [*map(Clip, paths), *held, Clip(good, 0.1, 0.25), Clip(good, 5.0, 6.0)]
    found = dict(inspect_all(every, RULES, workers=1, memory=ClipMemory("rules", tmp_path / "memory")))
    for clip, finding in found.items():
        assert dataclasses.replace(finding, digest="") == inspect(clip, RULES)
    assert [finding.fault for finding in found.values()].count("") == 5
