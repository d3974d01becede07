"""The processes of a run: killed, interrupted, hanging, twice in one directory; and updates that cannot be done."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from hark.grpo import learner as learner_module
from hark.grpo import loop
from hark.grpo import reference as reference_module
from hark.grpo.config import ConfigError
from hark.grpo.instruments.log_file import LogError
from hark.grpo.instruments.metrics import Metrics
from hark.grpo.instruments.nonfinite import NonFiniteError
from hark.grpo.runtime import export as export_module
from hark.grpo.runtime import leaving
from hark.grpo.runtime.checkpoint import checkpoints
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.export import ExportError
from hark.grpo.runtime.interrupt import Interrupted, interruptible
from hark.grpo.runtime.lock import locked, locked_file
from hark.grpo.runtime.manifest import Manifest
from hark.grpo.runtime.watchdog import Watchdog
from hark.launch import train as train_program
from hark.launch.common import training
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import sentence
from hark.launch.studies import chaos, faults
from tests.clips import write_questions
from tests.ranks import as_torchrun, on_ranks
from tests.runs import ROUNDING, build, computed, largest_difference, length_reward, read_metrics, train

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes in /proc")
def test_a_run_comes_back_bit_for_bit_from_kills_and_signals(tmp_path, monkeypatch):
    """The short form of launch/studies/chaos.py: three things that are done to a run on two ranks, at its next save."""
    monkeypatch.setattr(chaos, "STEPS", 8)
    monkeypatch.setattr(chaos, "moment_for", lambda *_: "a save")
    first = SimpleNamespace(randrange=lambda *_: 0)
    monkeypatch.setitem(chaos.MOMENTS, "a save", lambda trial, _: chaos.a_save(trial, first))
    kinds = ["kill -9 of one rank", "kill -9 of the launcher", "SIGTERM"]
    chaos.main([
        "--trials", "3", "--root", str(tmp_path), "--setups", "2 ranks", "--only", *kinds, "--page", os.devnull,
    ])  # fmt: skip
    chains = json.loads((tmp_path / "trials.json").read_text()).values()
    trials = [trial for chain in chains for trial in chain["figures"]["trials"]]
    assert sorted(trial["kind"] for trial in trials) == sorted(kinds)
    assert all(trial[what] for trial in trials for what in chaos.GOOD), trials


@pytest.mark.parametrize(
    ("status", "log", "among_steps", "notes"),
    [
        (143, "SIGTERM after step 2: ...", True, []),
        (1, "", True, ["status 1 instead of (143,)"]),
        (143, "Traceback (most recent call last):", True, ["a traceback"]),
        (-15, "Traceback (most recent call last):", False, []),
    ],
)
def test_a_trial_notes_a_status_that_is_not_that_of_its_kind_and_a_traceback(status, log, among_steps, notes, tmp_path):
    trial = chaos.Trial(
        tmp_path, SimpleNamespace(returncode=status), 1, "1 rank", "SIGTERM", "a step", 0.0, among_steps=among_steps
    )
    chaos.check_end(trial, log)
    assert trial.notes == notes and trial.ended_right == (not notes)


def test_checkpoints_differ_in_what_they_say_of_a_validation_and_may_lack_it_until_the_end(tmp_path):
    def saved(run: str, state: dict, about: dict) -> Path:
        place = tmp_path / run / "checkpoints" / "step-000002"
        place.mkdir(parents=True)
        Manifest(2, {}, {}, {}, state=state, about=about).write(place)
        return tmp_path / run

    right = saved("right", {"beta": 0.1}, {"validation": {"accuracy": 0.5}, "code": "a"})
    assert faults.differing(saved("equal", {"beta": 0.1}, {"validation": {"accuracy": 0.5}, "code": "b"}), right) == []
    assert faults.differing(saved("lacking", {"beta": 0.1}, {}), right) == []
    assert faults.differing(saved("other", {"beta": 0.1}, {"validation": {"accuracy": 0.4}}), right) == ["step-000002"]
    assert faults.differing(saved("state", {"beta": 0.2}, {}), right) == ["step-000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_micro_batch_with_a_checkpoint_of_the_latest_step(number, settings, tmp_path):
    """It arrives in the third step, whose second micro-batch is not begun; the resumed run is that without it."""
    words = [
        *settings,
        "optim.steps=4",
        "checkpoint.every=3",
        f"run.directory={tmp_path}/run",
        "optim.schedule=constant",
    ]
    micro_batches, handled = [], signal.getsignal(number)  # SIGINT is ignored in what a shell has started by "&"

    def run(world: World) -> None:
        trainer = build(world, load_config(words))
        loss = trainer.loss

        def interrupted(micro, logprobs, entropy):
            micro_batches.append(micro)
            if len(micro_batches) == 7:  # two in the memory probe, two in each step
                os.kill(os.getpid(), number)
                deadline = time.monotonic() + 10
                while not world.interruption.signal and time.monotonic() < deadline:
                    time.sleep(0.01)
            return loss(micro, logprobs, entropy)

        trainer.loss = interrupted
        loop.train(trainer)

    said = f"{number.name} after step 2: the same command with run.resume=true continues from the checkpoint of step 2"
    with pytest.raises(Interrupted, match=said) as caught:
        on_ranks(1, run)
    assert caught.value.signal == number and len(micro_batches) == 7
    assert signal.getsignal(number) == handled, "handled as before"
    on_ranks(1, train, [*words, "run.resume=true"])
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/plain"])
    assert largest_difference(tmp_path / "run", tmp_path / "plain") == 0.0
    lines, plain = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "plain")
    assert [{key: line[key] for key in computed(line)} for line in lines] == [
        {key: line[key] for key in computed(line)} for line in plain
    ]


def test_a_signal_in_sampling_cuts_it_short(settings, tmp_path):
    words = [*settings, f"run.directory={tmp_path}/run", "rollout.max_new_tokens=200"]

    def run(world: World) -> None:
        trainer = build(world, load_config(words))
        prepared = [prompt for _, prompt, _ in trainer.data.step(0)]
        world.interruption.signal = signal.SIGTERM
        rollout = trainer.draw(tuple(prepared), [(n,) for n in range(len(prepared))])
        assert rollout.mask.sum() == 0
        with pytest.raises(Interrupted):
            trainer.step(0)

    on_ranks(1, run)


STUBBORN = """
import signal, sys, time
from hark.grpo.runtime.interrupt import Interruption

with Interruption().noted(grace=float(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("grace", "signals", "said"),
    [(1, 1, "not left within run.grace, 1 s"), (60, 2, "by a second"), (0, 1, "SIGTERM: ended at once; the same")],
)
def test_a_run_that_does_not_leave_is_ended_after_the_grace_or_by_a_second_signal(grace, signals, said):
    """Even while its main thread is in a call of the system that no handler of Python interrupts."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "SIGTERM" in errors and said in errors and errors.count("\n") == 1
    assert time.monotonic() - began < 20


def test_sigterm_before_the_first_step_ends_a_run_at_once_with_a_line(settings, tmp_path, monkeypatch):
    """It arrives before the data are checked. Ctrl-C is raised there: a notebook must outlive it."""
    said = threading.Event()
    left: list[tuple[str, int]] = []
    monkeypatch.setattr(leaving, "leave", lambda *words: left.append(words) or said.set())

    def signalled(*_: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)
        assert said.wait(30)
        raise ConfigError("seen")

    monkeypatch.setattr(training, "announce", signalled)
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda *_: None}  # which would end the tests
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        with pytest.raises(ConfigError, match="seen"):
            train_program.main([*settings, f"run.directory={tmp_path}/run"])
        assert signal.getsignal(signal.SIGTERM) == usual[signal.SIGTERM], "handled as before"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(left) == 1 and left[0][0].startswith("SIGTERM: ended at once; the same command") and left[0][1] == 143


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a collective failed")])
def test_ctrl_c_in_a_command_says_how_to_go_on_whatever_error_comes_of_it(error):
    with pytest.raises(Interrupted, match="the same command goes on"):
        with interruptible(lambda: "the same command goes on"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            except KeyboardInterrupt:
                raise error from None
    with pytest.raises(RuntimeError, match="another error"):
        with interruptible(lambda: "not said"):
            raise RuntimeError("another error")


# Watchdog -------------------------------------------------------------------------------------------------------------


def judged(published: list[list | None], patience: float = 10.0, step: float = 4.0, monkeypatch=None) -> list[str]:
    """What the watchdog of rank 0 finds in what rank 1 publishes, every `step` seconds."""
    now = [1000.0]
    monkeypatch.setattr("hark.grpo.runtime.watchdog.time.monotonic", lambda: now[0])
    watchdog = Watchdog(World(0, 2, CPU), patience=patience, store=None)
    found = []
    for one in published:
        now[0] += step
        found.append(watchdog._judge(one))
    return found


def test_a_rank_that_answers_no_more_is_named_with_its_phase(monkeypatch):
    found = judged([[1, [5, 0], False, "rollout of step 3"]] * 5, monkeypatch=monkeypatch)
    assert found[:3] == ["", "", ""]
    assert found[3].startswith("rank 1 has not answered for 12 s") and "rollout of step 3" in found[3]


def test_a_rank_without_progress_is_named_unless_it_waits_for_others(monkeypatch):
    stuck = [[n, [5, 7], False, "load of step 3"] for n in range(5)]
    assert "rank 1 has made no progress for 12 s" in judged(stuck, monkeypatch=monkeypatch)[3]
    waits = [[n, [5, 7], True, "load of step 3"] for n in range(5)]
    moving = [[n, [n, 0], False, "load of step 3"] for n in range(5)]
    computing = [[n, [5, n], False, "export"] for n in range(5)]
    for fine in (waits, moving, computing, [None] * 5):
        assert judged(fine, monkeypatch=monkeypatch) == [""] * 5


def test_processor_time_is_progress_in_a_long_phase_only_and_that_of_the_watchdog_never():
    progress = World(0, 1, CPU).progress

    def compute(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    with ThreadPoolExecutor(1) as watchdog:

        def counts() -> tuple[int, int]:
            return watchdog.submit(lambda: progress.now()[0]).result()

        with progress.during("reading a checkpoint", long=True):
            marks, before = counts()
            watchdog.submit(compute, 2.0).result()
            assert counts()[1] - before < 2  # 1 if what this thread did meanwhile completes a second
            compute(1.1)
            assert counts()[0] == marks and counts()[1] > before
        with progress.during("rollout of step 1"):
            first = counts()
            compute(1.1)
            assert counts() == first


def test_the_phase_in_progress_is_named_as_it_was_in_the_step_before(settings, tmp_path):
    seen = []

    def run(world: World) -> None:
        trainer = build(world, load_config([*settings, f"run.directory={tmp_path}/run"]))
        draw = trainer.draw
        trainer.draw = lambda *words, **more: seen.append(world.progress.doing) or draw(*words, **more)
        loop.train(trainer)

    on_ranks(1, run)
    assert seen[0] == "memory probe" and seen[-1] == "rollout of step 3"


# Lock -----------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.runtime import lock

with joined_world() as world, getattr(lock, sys.argv[1])(Path(sys.argv[2]), world):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("locked", "name", "instead"),
    [(locked, "run", "another run.directory"), (locked_file, "out/rates.jsonl", "another file")],
)
def test_a_second_run_in_a_directory_or_with_a_file_is_refused_until_the_first_is_dead(locked, name, instead, tmp_path):
    words = [locked.__name__, str(tmp_path / name)]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *words], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"

    def second(world: World) -> None:
        with locked(tmp_path / name, world, patience=0.5):
            pass

    with pytest.raises(ConfigError, match=rf"{name} is in use by another run \(process {holder.pid} on.*{instead}"):
        on_ranks(1, second)
    holder.kill()
    holder.wait()
    on_ranks(1, second)


# Updates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [learner_module, reference_module])
def test_out_of_memory_halves_the_micro_batches_and_the_updates_are_the_same(
    module, settings, tmp_path, monkeypatch, capsys
):
    """In the forward and backward passes, and in those of the reference."""
    words = [*settings, "optim.micro_batch=4", "optim.steps=2"]
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/plain"])
    score, calls = module.score, []

    def scarce(policy, prompts, *rest, **more):
        calls.append(len(prompts))
        if len(prompts) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        return score(policy, prompts, *rest, **more)

    monkeypatch.setattr(module, "score", scarce)
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/scarce"])
    assert calls[:3] == [4, 2, 1] and set(calls[3:]) == {1}
    assert capsys.readouterr().out.count("out of memory on rank 0") == 2, "once for each size"
    assert largest_difference(tmp_path / "plain", tmp_path / "scarce") < ROUNDING
    calls.clear()
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/scarce", "run.resume=true", "optim.steps=3"])
    assert set(calls) == {1}, "a resumed run remembers"


def test_what_was_summed_before_memory_ran_out_is_not_summed_twice(settings, tmp_path, monkeypatch):
    """Memory runs out once, in the second of two micro-batches of a step."""
    words = [*settings, "optim.micro_batch=2", "optim.steps=2"]
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/plain"])
    score, calls = learner_module.score, []

    def scarce(policy, prompts, *rest, **more):
        calls.append(len(prompts))
        if len(calls) == 4:  # the memory probe has the first two
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        return score(policy, prompts, *rest, **more)

    monkeypatch.setattr(learner_module, "score", scarce)
    on_ranks(1, train, [*words, f"run.directory={tmp_path}/scarce"])
    assert calls == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert largest_difference(tmp_path / "plain", tmp_path / "scarce") < ROUNDING


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_updates_that_are_not_finite_are_left_out_as_often_as_is_allowed(allowed, settings, tmp_path):
    words = [*settings, f"run.directory={tmp_path}/run", f"optim.skip_nonfinite={allowed}", "optim.steps=3"]
    calls, before_and_after = [], []

    def rewards(examples, completions):
        calls.append(1)
        broken = torch.tensor(torch.inf if len(calls) in (2, 3) else 1.0)
        return length_reward(examples, completions) * torch.stack([broken, torch.tensor(1.0)])

    def run(world: World) -> None:
        trainer = build(world, load_config(words), rewards=rewards)
        step = trainer.step

        def compared(number: int) -> dict[str, float]:
            before = [p.detach().clone() for p in trainer.policy.parameters()]
            values = step(number)
            same = all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
            before_and_after.append(same)
            return values

        trainer.step = compared
        loop.train(trainer)

    if allowed < 2:
        with pytest.raises(NonFiniteError, match=f"step {allowed + 2}, rank 0"):
            on_ranks(1, run)
    else:
        on_ranks(1, run)
        assert before_and_after == [False, True, True]
        assert [line["skipped_updates"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_directory_that_vanishes_is_one_sentence(tmp_path):
    metrics = Metrics(tmp_path / "run", rank=0, total_steps=1)
    metrics.truncate(0)
    (tmp_path / "run").rmdir()
    with pytest.raises(LogError, match=r"metrics.jsonl cannot be written \(No such file or directory\)"):
        metrics.log(1, {"loss": 0.0})


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Exports adapters to tmp_path/adapters by a function that writes to a directory; there is an export already."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "old").touch()
    monkeypatch.setattr(export_module, "adapter_tensors", lambda policy: {})

    def run(write) -> None:
        monkeypatch.setattr(export_module, "write_adapters", lambda policy, tensors, directory: write(directory))
        export_module.export_adapters(None, tmp_path / "adapters", World(0, 1, CPU))

    return run


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), FileNotFoundError(errno.ENOENT, "No such file")]
)
def test_an_export_that_cannot_be_written_is_one_sentence_and_the_one_before_it_stays(error, exported, tmp_path):
    def write(directory: Path) -> None:
        (directory / "new").touch()
        raise error

    with pytest.raises(ExportError, match=r"adapters cannot be written \(.*No s.*\); make room or give access there"):
        exported(write)
    assert files(tmp_path) == ["adapters/old"]


def test_an_export_is_on_the_disk_before_it_replaces_the_one_before_which_is_then_deleted(
    exported, tmp_path, monkeypatch
):
    synced, rename = [], Path.rename
    monkeypatch.setattr(export_module, "sync", lambda path: synced.append(path.name))

    def killed(path: Path, target: Path) -> None:
        if path.name == "adapters.partial":
            assert sorted(synced[:-1]) == ["hark.json", "new"] and synced[-1] == "adapters.partial"
            assert not (tmp_path / "adapters").exists()
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        exported(lambda directory: (directory / "new").touch())
    assert files(tmp_path) == ["adapters.old/old", "adapters.partial/hark.json", "adapters.partial/new"]
    monkeypatch.setattr(Path, "rename", rename)
    exported(lambda directory: (directory / "newer").touch())
    assert files(tmp_path) == ["adapters/hark.json", "adapters/newer"]


def test_a_full_disk_is_one_line(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from hark.launch.common.entry import run\n"
        "def main(argv):\n"
        f"    raise OSError({errno.ENOSPC}, 'No space left on device', 'some/file')\n"
        "run(main)\n"
    )
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == "error: some/file: No space left on device; make room or give access there, or choose another directory\n"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_one_line(number):
    assert str(sentence(OSError(number, "the disk failed", "some/file"))).startswith("some/file: the disk failed; ")


def test_an_interrupted_run_that_saves_none_says_that_it_begins_again(settings, tmp_path):
    words = [*settings, f"run.directory={tmp_path}/run", "checkpoint.every=0"]

    def run(world: World) -> None:
        trainer = build(world, load_config(words))
        step = trainer.step

        def signalled(number: int) -> dict[str, float]:
            world.interruption.signal = signal.SIGTERM if number == 1 else 0
            return step(number)

        trainer.step = signalled
        loop.train(trainer)

    with pytest.raises(Interrupted, match="SIGTERM after step 1: .* begins again: nothing was saved"):
        on_ranks(1, run)
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def fails_on_rank_1(world: World, words: list[str]) -> None:
    """Memory runs out on one rank while a micro-batch has more than one prompt."""
    score = learner_module.score

    def scarce(policy, prompts, *rest, **more):
        if len(prompts) > 1 and world.rank == 1 and world.progress.doing != "memory probe":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        return score(policy, prompts, *rest, **more)

    learner_module.score = scarce
    train(world, words)


@pytest.mark.slow
def test_out_of_memory_on_one_of_two_ranks_ends_the_run_which_goes_on_with_smaller_micro_batches(settings, tmp_path):
    words = [*settings, "optim.micro_batch=2", "optim.steps=2", "run.resume=true"]
    with pytest.raises(Exception, match="can't allocate memory"):
        on_ranks(2, fails_on_rank_1, [*words, f"run.directory={tmp_path}/scarce"])
    on_ranks(2, fails_on_rank_1, [*words, f"run.directory={tmp_path}/scarce"])
    on_ranks(2, train, [*words, f"run.directory={tmp_path}/plain"])
    assert largest_difference(tmp_path / "plain", tmp_path / "scarce") < ROUNDING


# Whole runs under torchrun --------------------------------------------------------------------------------------------

TEMPLATE = """
import time
from pathlib import Path
from hark.data.prompts import ASK, Template

class Slow(Template):
    def ask(self, example):
        if Path({flag!r}).exists():
            time.sleep(600)
        return super().ask(example)

slow = Slow(ASK)
"""


@pytest.fixture
def configuration(tmp_path, qwen2_audio_dir) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run, threads: 1}}\n"
        f"model: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{train: {write_questions(tmp_path, 8)}}}\n"
        "rollout: {group_size: 4, max_new_tokens: 8}\n"
        "optim: {steps: 6, prompts_per_step: 4, micro_batch: 2, lr: 1e-3}\n"
        "reward: {weights: {diversity: 1.0}}\n"
        "evaluation: {every: 0}\n"
        "checkpoint: {every: 1}\n"
        "log: {completions: 0}\n"
    )
    return path


def torchrun(*words: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def until_step(directory: Path, step: int, process: subprocess.Popen) -> None:
    while faults.last_step(directory) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes in /proc")
def test_torchrun_starts_a_run_again_whose_rank_was_killed_and_it_ends_as_if_nothing_was(configuration, tmp_path):
    """With --max-restarts alone: the restarted processes resume by themselves."""
    script = Path(chaos.__file__).parents[1] / "train.py"
    process = torchrun("--max-restarts", "1", script, configuration)
    until_step(tmp_path / "run", 3, process)
    os.kill(faults.children(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing from step" in said, said
    as_torchrun(2, train_program.main, [str(configuration), f"run.directory={tmp_path}/plain"])
    assert largest_difference(tmp_path / "run", tmp_path / "plain") == 0.0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes in /proc")
def test_a_rank_that_gets_no_data_is_named_with_its_phase(configuration, tmp_path):
    flag = tmp_path / "hang"
    own = tmp_path / "own.py"
    own.write_text(TEMPLATE.format(flag=str(flag)))
    words = [f"data.template={own}:slow", "run.patience=20", "run.grace=1", "optim.steps=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hark.launch", "train", "--processes", "2", configuration, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    until_step(tmp_path / "run", 3, process)
    flag.touch()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    found = r"error: rank [01] has made no progress for \d+ s \(run.patience\), in this phase: load of step \d+;"
    assert re.match(found, errors), errors
    assert checkpoints(tmp_path / "run" / "checkpoints")
