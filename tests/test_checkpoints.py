"""Checkpoints: every byte counts, a damaged one is named and the one before it is used, nothing in them is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from hark.from_file import from_file
from hark.grpo import loop
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments import log_file as log_module
from hark.grpo.runtime import checkpoint as module
from hark.grpo.runtime.checkpoint import CheckpointError, Saver, best_of, checkpoints, load_checkpoint, newest_intact
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.interrupt import Interrupted
from hark.grpo.runtime.manifest import DamageError, Manifest, sha256_of, signed
from hark.grpo.runtime.shards import MOMENTS
from hark.launch import sft
from hark.launch import train as train_program
from hark.launch.common import run_directory, training
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy
from hark.launch.common.run_directory import check_changes, digest_of, facts
from hark.models.policy import PolicyError
from tests.clips import HOSTILE, write_questions
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, computed, largest_difference, read_metrics, train

TRIALS = 60  # damaged bytes, beside cuts and deletions


@pytest.fixture
def settings(qwen2_audio_dir, tmp_path) -> list[str]:
    questions = write_questions(tmp_path, 8)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run, threads: 1}}\n"
        f"model: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{train: {questions}}}\n"
        "rollout: {group_size: 4, max_new_tokens: 6}\n"
        "optim: {prompts_per_step: 4, micro_batch: 2, lr: 1e-3, steps: 2}\n"
        "checkpoint: {every: 1, export: false}\n"
        "evaluation: {every: 0}\n"
        "log: {completions: 0}\n"
    )
    return [str(path)]


@pytest.fixture
def run(settings, tmp_path) -> Path:
    on_ranks(1, train, settings)
    return tmp_path / "run" / "checkpoints"


def loaded(settings: list[str], directory: Path, ranks: int = 1) -> int:
    """The steps of the checkpoint that is loaded."""
    steps = []

    def load(world: World) -> None:
        policy = make_policy(load_config(settings), world)
        manifest = load_checkpoint(directory, policy, torch.optim.AdamW(policy.parameters()), world)
        steps.append(manifest.step if manifest else None)

    on_ranks(ranks, load)
    return steps[0]


CUTS = ("cut", "longer", "lost", "empty")


def test_any_changed_cut_or_lost_byte_is_noticed_and_the_checkpoint_before_is_used(settings, run, capsys):
    """A flipped bit anywhere in any file, a cut anywhere, a byte more, a lost file: none goes unnoticed."""
    whole, chance = run / "step-000002", random.Random(0)
    files = sorted(whole.iterdir())
    assert [path.name for path in files] == [
        "hark.json", "optimizer-00000-of-00001.safetensors", "weights-00000-of-00001.safetensors",
    ]  # fmt: skip
    faults = [(chance.choice(files), "bit") for _ in range(TRIALS)] + [(path, cut) for path in files for cut in CUTS]

    def check(world: World) -> None:
        policy = make_policy(load_config(settings), world)
        optimizer = torch.optim.AdamW(policy.parameters())
        assert load_checkpoint(run, policy, optimizer, world).step == 2
        for path, kind in faults:
            kept = path.read_bytes()
            _damage(path, kind, chance)
            capsys.readouterr()
            assert load_checkpoint(run, policy, optimizer, world).step == 1, (path.name, kind)
            said = capsys.readouterr().out
            assert "step-000002 is damaged" in said and path.name in said, (path.name, kind, said)
            path.write_bytes(kept)
        assert load_checkpoint(run, policy, optimizer, world).step == 2

    on_ranks(1, check)


def _damage(path: Path, kind: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        content = content[: chance.randrange(1, len(content))]
    elif kind == "longer":
        content += b"\0"
    path.write_bytes(b"" if kind == "empty" else content)
    if kind == "lost":
        path.unlink()


def test_with_no_intact_checkpoint_the_run_stops_and_names_the_files(settings, run):
    for step in (1, 2):
        next(run.glob(f"step-{step:06d}/weights-*")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is intact.*step-000002 is damaged: weights-.*step-000001"):
        on_ranks(1, train, [*settings, "run.resume=true"])


def test_a_manifest_of_another_step_is_damaged(settings, run):
    shutil.rmtree(run / "step-000002")
    (run / "step-000001").rename(run / "step-000007")
    with pytest.raises(CheckpointError, match="step-000007 is damaged: hark.json is that of step 1"):
        on_ranks(1, train, [*settings, "run.resume=true"])


def test_a_damaged_later_checkpoint_does_not_displace_those_of_the_run_that_goes_on(settings, run, capsys):
    (run / "step-000002").rename(run / "step-000005")
    on_ranks(1, train, [*settings, "run.resume=true", "checkpoint.keep=1"])
    assert sorted(path.name for path in run.iterdir()) == ["step-000002", "step-000005.aside"]
    said = capsys.readouterr().out
    assert "step-000005 is later than step 1; renamed to step-000005.aside; it can be deleted" in said


def test_steps_are_compared_as_numbers(settings, run):
    for old, new in ((1, 999999), (2, 1000000)):
        path = (run / f"step-{old:06d}").rename(run / f"step-{new:06d}")
        dataclasses.replace(_read(path, old), step=new).write(path)
    assert [path.name for path in checkpoints(run)] == ["step-999999", "step-1000000"]
    assert loaded(settings, run) == 1000000


def _read(path: Path, step: int) -> Manifest:
    """The manifest of a checkpoint whose directory was renamed."""
    place = path.with_name(f"step-{step:06d}")
    place.mkdir()
    shutil.copy(path / "hark.json", place)
    try:
        return Manifest.read(place)
    finally:
        shutil.rmtree(place)


class Evil:
    """Its pickle writes a file when it is read."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


@pytest.mark.parametrize("name", ["hark.json", "weights-00000-of-00001.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_run(name, settings, run, tmp_path):
    written = tmp_path / "written-by-the-pickle"
    (run / "step-000002" / name).write_bytes(pickle.dumps(Evil(written)))
    assert loaded(settings, run) == 1
    assert not written.exists()
    pickle.loads((run / "step-000002" / name).read_bytes())
    assert written.exists(), "a loader of pickles would have run it"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body["files"].update({"../../outside.safetensors": {"size": 1, "sha256": ""}}), "no manifest"),
        (lambda body: body["tensors"]["weights"].popitem(), "has other tensors"),
        (lambda body: body["tensors"]["weights"].update({HOSTILE: {"shape": [0], "pieces": []}}), "has other tensors"),
        (lambda body: body["model"].popitem(), None),
        (lambda body: body["model"].update({HOSTILE: [1]}), None),
        (lambda body: body["files"].clear(), "no manifest"),
        (lambda body: body.update(step=-1), "no manifest"),
        (lambda body: next(iter(body["tensors"]["weights"].values()))["pieces"][0]["offset"].append(0), "no manifest"),
        (lambda body: next(iter(body["tensors"]["weights"].values()))["pieces"].clear(), "no manifest"),
    ],
)
def test_a_manifest_with_a_right_digest_is_checked_all_the_same(change, said, settings, run, capsys):
    """As one that somebody has made: its own digest is right, and what it says is not."""
    path = run / "step-000002"
    body = dataclasses.asdict(Manifest.read(path))
    body = json.loads(json.dumps(body))
    change(body)
    (path / "hark.json").write_bytes(signed(body))
    shutil.rmtree(run / "step-000001")
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=said or "checkpoint of another model") as error:
        loaded(settings, run)
    for line in (str(error.value), *capsys.readouterr().out.split("\n")):
        assert line == "" or line.isprintable() and len(line) < 1000


def test_one_rank_resumes_what_two_saved_and_the_other_way_round(settings, tmp_path):
    """The weights are those of an uninterrupted run, to the rounding of sums in another order."""
    longer = ["optim.steps=4", "checkpoint.export=true", "optim.schedule=constant"]
    on_ranks(1, train, [*settings, *longer, f"run.directory={tmp_path}/whole"])
    for first, second in ((1, 2), (2, 1)):
        place = f"run.directory={tmp_path}/{first}"
        on_ranks(first, train, [*settings, place, "optim.schedule=constant"])
        on_ranks(second, train, [*settings, *longer, place, "run.resume=true"])
        assert [line["step"] for line in read_metrics(tmp_path / str(first))] == [1, 2, 3, 4]
        assert largest_difference(tmp_path / "whole", tmp_path / str(first)) < ROUNDING


def test_the_best_by_validation_is_kept_beside_the_newest(settings, tmp_path):
    accuracies = iter([0.2, 0.7, 0.7, 0.1, 0.3])
    config = load_config([*settings, "optim.steps=5", "checkpoint.keep=1", "evaluation.every=1"])

    def run(world: World) -> None:
        loop.train(build(world, config, validate=lambda: {"accuracy": next(accuracies)}))

    on_ranks(1, run)
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-000002", "step-000005"], "the earliest of equals, and the newest"
    assert best_of(kept) == kept[0]


def test_the_log_is_on_the_disk_before_a_checkpoint_has_its_name(settings, tmp_path, monkeypatch):
    """A machine that crashes later must not leave a checkpoint of steps that the log lacks."""
    synced, named = [0], []
    sync, name = log_module.sync, Saver._name

    def noted(path: Path) -> None:
        sync(path)
        if path.name == "metrics.jsonl":
            synced.append(len(read_metrics(tmp_path / "run")))

    def recorded(saver: Saver, writing, written) -> None:
        named.append((writing.manifest.step, synced[-1]))
        name(saver, writing, written)

    monkeypatch.setattr(log_module, "sync", noted)
    monkeypatch.setattr(Saver, "_name", recorded)
    on_ranks(1, train, [*settings, "optim.steps=3", "checkpoint.every=1", f"run.directory={tmp_path}/run"])
    assert [step for step, _ in named] == [1, 2, 3] and all(lines >= step for step, lines in named)


def test_training_goes_on_while_a_checkpoint_is_written(settings, tmp_path, monkeypatch):
    """Writing waits until the next step has begun; what is written is nevertheless what was there when it was saved."""
    import threading

    begun, write = threading.Event(), module.write_shards
    monkeypatch.setattr(module, "write_shards", lambda *words: begun.wait(60) and write(*words))
    config = load_config([*settings, "optim.steps=2", "checkpoint.every=1", "checkpoint.keep=2"])

    def run(world: World) -> None:
        trainer = build(world, config)
        step = trainer.step

        def watched(number: int) -> dict[str, float]:
            values = step(number)
            if number == 1:
                assert not checkpoints(tmp_path / "run" / "checkpoints"), "the first is not written yet"
                begun.set()
            return values

        trainer.step = watched
        loop.train(trainer)

    on_ranks(1, run)
    monkeypatch.undo()
    one = checkpoints(tmp_path / "run" / "checkpoints")[0]
    at_once = [*settings, "checkpoint.background=false", f"run.directory={tmp_path}/once", "optim.steps=2"]
    on_ranks(1, train, at_once)
    other = tmp_path / "once" / "checkpoints" / one.name
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize("required", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before_and_training_goes_on_if_that_is_wanted(
    required, settings, tmp_path, monkeypatch, capsys
):
    write, calls = module.write_shards, []

    def full(shards, path):
        calls.append(path)
        if "step-000002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(shards, path)

    monkeypatch.setattr(module, "write_shards", full)
    words = [*settings, "optim.steps=3", f"checkpoint.required={str(required).lower()}", "checkpoint.keep=3"]
    said = r"step-000002 cannot be written \(No space left on device\); make room there; the checkpoint of step 1 is"
    if required:
        with pytest.raises(CheckpointError, match=said):
            on_ranks(1, train, words)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    else:
        on_ranks(1, train, words)
        assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000001", "step-000003"]
        assert "training goes on without it" in capsys.readouterr().out


class PanicError(BaseException):
    """As a panic in Rust code, which is no Exception."""


def test_a_writer_that_ends_by_a_panic_has_written_nothing(settings, tmp_path, monkeypatch):
    def run(world: World) -> None:
        policy = make_policy(load_config(settings), world)
        saver = Saver(tmp_path / "saved", world, keep=1)
        optimizer = torch.optim.AdamW(policy.parameters())
        saver.save(1, policy, optimizer, at_once=True)
        monkeypatch.setattr(module, "write_shards", panics)
        saver.save(2, policy, optimizer, at_once=True)

    def panics(*_):
        raise PanicError("called `Option::unwrap()` on a `None` value")

    with pytest.raises(CheckpointError, match=r"step-000002 cannot be written \(called "):
        on_ranks(1, run)
    assert [path.name for path in checkpoints(tmp_path / "saved")] == ["step-000001"]


def test_free_space_is_looked_at_before_anything_is_written(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"it takes 0\.\d\d GiB, and 0\.00 GiB are free"):
        on_ranks(1, train, settings)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(settings, tmp_path, capsys):
    resume = [*settings, "run.resume=true"]
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/plain"])
    before = read_metrics(tmp_path / "plain")
    on_ranks(1, train, resume)  # nothing at all is there
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    on_ranks(1, train, resume)  # steps were done, none was saved
    after = read_metrics(tmp_path / "run")
    assert [line["step"] for line in after] == [1, 2]
    assert all(one[name] == two[name] for one, two in zip(before, after, strict=True) for name in computed(one))
    assert "continuing from the beginning: there is no checkpoint yet" in capsys.readouterr().out


def test_an_evaluation_that_a_crash_has_lost_is_done_at_the_resume(settings, tmp_path):
    asked = []

    def run(world: World, words: list[str]) -> None:
        config = load_config([*settings, "evaluation.every=2", *words])
        loop.train(build(world, config, validate=lambda: asked.append(1) or {"accuracy": 0.5}))

    on_ranks(1, run, [])
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert ["event" in json.loads(line) for line in lines] == [False, False, True]
    path.write_text("".join(lines[:2]))
    on_ranks(1, run, ["run.resume=true"])
    on_ranks(1, run, ["run.resume=true"])
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "event" in line] == [2]
    assert len(asked) == 2, "once in the run, once for the lost line"


def test_a_start_that_cannot_write_the_configuration_leaves_that_of_the_run(settings, tmp_path, monkeypatch):
    """Neither its name nor a part of it: the same command goes on when there is room again."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text("run: {seed: 1}\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hark.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        on_ranks(1, train, settings)
    assert (directory / "config.yaml").read_text() == "run: {seed: 1}\n"
    assert not list(directory.glob("config.yaml?*"))


def test_an_evaluation_that_a_signal_cut_short_is_noted_in_its_checkpoint_at_the_resume(settings, tmp_path):
    accuracies = iter([0.9, 0.9, 0.1])

    def run(world: World, words: list[str]) -> None:
        def validate() -> dict[str, float]:
            world.interruption.signal = 0 if words else signal.SIGTERM
            return {"accuracy": next(accuracies)}

        config = load_config([*settings, "evaluation.every=1", "checkpoint.keep=1", *words])
        loop.train(build(world, config, validate=validate))

    with pytest.raises(Interrupted, match="after step 1: .* from the checkpoint of step 1"):
        on_ranks(1, run, [])
    on_ranks(1, run, ["run.resume=true"])
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-000001", "step-000002"], "the best, and the newest"
    assert best_of(kept) == kept[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1e-4"], r"optim.lr has changed from 0.001 to 0.0001.*run.allow_changed=\[optim.lr\]"),
        (["rollout.group_size=2"], r"rollout.group_size has changed from 4 to 2.*allow_changed=\[rollout.group_size\]"),
        (["optim.lr=1e-4", "run.allow_changed=[optim.lr]"], None),
        (["optim.lr=1e-4", "loss.beta=0", "run.allow_changed=[optim.lr]"], r"allow_changed=\[optim.lr,loss.beta\]"),
        (["checkpoint.every=7", "optim.micro_batch=1", "log.completions=3", "run.threads=2"], None),
    ],
)
def test_a_resume_says_what_has_changed_and_takes_it_on_request(words, said, settings, run):
    """The checkpoint is of tests/runs.py, which says nothing of the run: its facts are added."""
    _add_facts(settings, run)
    config = load_config([*settings, *words, "run.resume=true"])
    world = World(0, 1, torch.device("cpu"))
    if said is None:
        changes = check_changes(config, facts(config, world), newest_intact(run))
        assert ["optim.lr has changed" in text for text in changes] == [True] * ("optim.lr=1e-4" in words)
    else:
        with pytest.raises(ConfigError, match=said):
            check_changes(config, facts(config, world), newest_intact(run))


def test_a_resume_says_what_changes_figures_or_which_failures_end_it_and_asks_for_nothing(settings, run):
    _add_facts(settings, run)
    now = {
        "evaluation.limit": 5, "data.max_lost": 0.2, "optim.skip_nonfinite": 3,
        "reward.on_error": "none", "reward.timeout": 9.0, "reward.max_failed": 0.5,
    }  # fmt: skip
    config = load_config([*settings, *(f"{name}={value}" for name, value in now.items())])
    changes = check_changes(config, facts(config, World(0, 1, torch.device("cpu"))), newest_intact(run))
    assert {text.partition(" has changed from ")[0] for text in changes} == now.keys() and len(changes) == len(now)


def test_other_contents_of_clips_are_noticed_wherever_they_lie(settings, tmp_path, monkeypatch):
    """One clip of a directory that data.audio_root names is replaced by another that can be decoded."""
    seen: list[list[str]] = []
    path, other = tmp_path / "run" / "checkpoints" / "step-000001", tmp_path / "other"
    path.mkdir(parents=True)
    other.mkdir()

    def begun(about: dict) -> None:
        Manifest(1, {}, {}, {MOMENTS: {}}, about=about).write(path)

    monkeypatch.setattr(training.loop, "train", lambda trainer, about, changes: begun(about))
    sft.main(settings)
    before = Manifest.read(path).about
    monkeypatch.setattr(
        training.loop, "train", lambda trainer, about, changes: seen.append(changes(Manifest.read(path)))
    )
    words = [*settings, "run.resume=true", f"data.audio_root={other}"]
    for clip in tmp_path.glob("*.wav"):
        shutil.copy(clip, other)
    sft.main(words)
    shutil.copy(tmp_path / "train-2.wav", other / "train-5.wav")
    with pytest.raises(ConfigError, match=r"the contents of clips have changed; .*allow_changed=\[clips\]"):
        sft.main(words)
    sft.main([*words, "run.allow_changed=[clips]"])
    begun({key: value for key, value in before.items() if key != "clips"})  # of an earlier release
    sft.main(words)
    assert seen == [[], ["the contents of clips have changed"], []]


def test_changed_questions_and_another_number_of_ranks_are_noticed(settings, run, tmp_path):
    _add_facts(settings, run)
    config = load_config([*settings, "run.resume=true"])
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"number of ranks has changed from 1 to 2.*allow_changed=\[ranks\]"):
        check_changes(config, facts(config, two), newest_intact(run))
    with open(config.data.train, "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"the contents of .*train.jsonl have changed.*allow_changed=\[data\]"):
        check_changes(config, facts(config, World(0, 1, torch.device("cpu"))), newest_intact(run))


def test_a_checkpoint_of_a_run_with_scheduled_rewards_is_intact_and_an_equal_schedule_is_no_change(settings, tmp_path):
    config, world = scheduled(settings, 0.5), World(0, 1, torch.device("cpu"))
    path = tmp_path / "step-000002"
    path.mkdir()
    Manifest(2, {}, {}, {}, about=facts(config, world)).write(path)
    assert Manifest.read(path).about["config"]["reward"]["schedule"]["accuracy"]["50"] == 0.5
    assert check_changes(config, facts(config, world), Manifest.read(path)) == []
    other = scheduled(settings, 0.4)
    with pytest.raises(ConfigError, match="since its checkpoint of step 2 reward.schedule has changed"):
        check_changes(other, facts(other, world), Manifest.read(path))


@pytest.mark.parametrize(
    ("state", "about"),
    [
        ({"lost": 3}, {}),
        ({"lost": [3]}, {}),
        ({"lost": "train-3"}, {}),
        ({"cursor": "x"}, {}),
        ({"skipped": None}, {}),
        ({"beta": "0.1"}, {}),
        ({"beta": 10**400}, {}),
        ({"failing": 3}, {}),
        ({"failing": [3]}, {}),
        ({"failing": [["3", 0.5]]}, {}),
        ({"failing": [[3, None]]}, {}),
        ({}, {"config": 5}),
        ({}, {"config": {"optim": 5}}),
        ({}, {"data": []}),
        ({}, {"model": ["sha256"]}),
        ({}, {"own_files": "sha256"}),
        ({}, {"left_out": "train-3"}),
        ({}, {"ranks": "1"}),
        ({}, {"validation": []}),
        ({}, {"validation": {"accuracy": "high"}}),
    ],
)
def test_a_manifest_whose_values_are_of_another_kind_is_damaged(state, about, tmp_path):
    """Its own digest is right; a resume would end in a traceback."""
    path = tmp_path / "step-000002"
    path.mkdir()
    Manifest(2, {}, {}, {}, state=state, about=about).write(path)
    with pytest.raises(DamageError, match="hark.json is no manifest"):
        Manifest.read(path)


def test_a_manifest_of_a_whole_state_is_read(tmp_path):
    path = tmp_path / "step-000002"
    path.mkdir()
    state = {"skipped": 1, "lost": ["train-3"], "beta": 0.04, "cursor": None, "failing": [[1, 0.5], [2, 1]]}
    about = {"validation": {"accuracy": None, "questions": 3}, "ranks": 2, "left_out": ["train-5"]}
    Manifest(2, {}, {}, {}, state=state, about=about).write(path)
    assert Manifest.read(path).state == state


def test_a_byte_of_a_manifest_that_changes_no_value_is_noticed_too(tmp_path):
    path = tmp_path / "step-000002"
    path.mkdir()
    Manifest(2, {}, {}, {}).write(path)
    good = (path / "hark.json").read_bytes()
    for other in (good.replace(b",", b", ", 1), good + b"\n", good.replace(b'"step":2', b'"step":3,"step":2')):
        (path / "hark.json").write_bytes(other)
        with pytest.raises(DamageError, match="hark.json does not agree with its own digest"):
            Manifest.read(path)


def test_a_manifest_with_numbers_as_keys_is_read_as_it_was_written(tmp_path):
    """They become text, and the digest must not depend on it."""
    path = tmp_path / "step-000002"
    path.mkdir()
    Manifest(2, {}, {}, {}, state={"at": {0: 1, 50: 2, 100: 3}}).write(path)
    assert Manifest.read(path).state == {"at": {"0": 1, "50": 2, "100": 3}}


def scheduled(settings: list[str], middle: float) -> Config:
    return load_config([*settings, f"reward.schedule={{accuracy: {{0: 1.0, 50: {middle}, 100: 0.1}}}}"])


@pytest.mark.parametrize("value", ["2026-01-31", ".nan", "{2026-01-31: 1}", "!!binary aGFyaw=="])
def test_an_option_that_no_checkpoint_can_hold_ends_a_run_at_its_start(value, settings):
    config = load_config([*settings, f"reward.options={{accuracy: {{since: {value}}}}}"])
    with pytest.raises(ConfigError, match="reward.options holds what no checkpoint can hold .*; expected texts"):
        facts(config, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("allowed", ["[]", "[optim.lr]"])
def test_where_the_newest_checkpoint_is_damaged_the_run_is_compared_with_the_one_that_is_loaded(
    allowed, settings, run, capsys
):
    """Only the manifests are read before the weights: that of the newest is intact, and its learning rate the same."""
    words = [*settings, "rollout.max_new_tokens=40"]
    _add_facts(words, run)
    _add_facts([*words, "optim.lr=0.5"], run, step=1)
    next(run.glob("step-000002/weights-*")).write_bytes(b"")
    command = [*words, "run.resume=true", f"run.allow_changed={allowed}"]
    if allowed == "[]":
        with pytest.raises(ConfigError, match=r"since its checkpoint of step 1 optim.lr has changed from 0.5 to 0.001"):
            train_program.main(command)
    else:
        train_program.main(command)
        assert capsys.readouterr().out.count("since the checkpoint of step 1 optim.lr has changed") == 1


def test_other_models_data_and_own_files_at_the_same_paths_are_noticed(settings, run, qwen2_audio_dir, tmp_path):
    base, table, own = tmp_path / "model", tmp_path / "tables", tmp_path / "own.py"
    shutil.copytree(qwen2_audio_dir, base)
    table.mkdir()
    (table / "a.parquet").write_bytes(b"1")
    own.write_text("reward = 1\n")
    words = [*settings, f"model.path={base}", f"data.train=[{tmp_path}/train.jsonl, {table}, hf:{table}:train]"]
    _add_facts(words, run)
    config, world, manifest = load_config(words), World(0, 1, torch.device("cpu")), newest_intact(run)
    (base / "README.md").write_text("new")
    assert check_changes(config, facts(config, world), manifest) == []
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"the files of .*model have changed; .*allow_changed=\[model\]"):
        check_changes(config, facts(config, world), manifest)
    weights.write_bytes(content)
    (table / "b.parquet").touch()
    with pytest.raises(ConfigError, match=r"contents of hf:.*tables:train have changed; .*allow_changed=\[data\]"):
        check_changes(config, facts(config, world), manifest)
    (table / "b.parquet").unlink()
    from_file(f"{own}:reward")
    text = {"own.py": hashlib.sha256(b"reward = 2\n").hexdigest()}
    before = dataclasses.replace(manifest, about=manifest.about | {"own_files": text})
    with pytest.raises(ConfigError, match=r"the text of own.py has changed; .*allow_changed=\[own_files\]"):
        check_changes(config, facts(config, world), before)


def test_only_the_weights_that_are_read_have_a_digest_and_a_hole_behind_them_is_refused(
    settings, run, qwen2_audio_dir, tmp_path, monkeypatch
):
    base, hashed = tmp_path / "model", []
    shutil.copytree(qwen2_audio_dir, base)
    words = [*settings, f"model.path={base}"]
    config, world = load_config(words), World(0, 1, torch.device("cpu"))
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    about = facts(config, world) | {"model": {str(base): digest_of(base)}}  # as older versions wrote it
    older = dataclasses.replace(newest_intact(run), about=about)
    assert check_changes(config, facts(config, world), older) == []
    monkeypatch.setattr(run_directory, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    with (base / "consolidated.safetensors").open("r+b") as file:
        file.truncate(2**26)
    facts(config, world)
    assert "model.safetensors" in hashed and "consolidated.safetensors" not in hashed
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(2**26)
    hashed.clear()
    with pytest.raises(PolicyError, match=r"model.safetensors: missing or broken \(.*not fully covered.*copy it again"):
        facts(config, world)
    assert "model.safetensors" not in hashed


def _add_facts(settings: list[str], run: Path, *, step: int = 2) -> None:
    path = run / f"step-{step:06d}"
    about = facts(load_config(settings), World(0, 1, torch.device("cpu")))
    dataclasses.replace(Manifest.read(path), about=about).write(path)


def test_what_remains_of_an_older_checkpoint_are_its_weights_and_they_are_checked_too(settings, tmp_path):
    on_ranks(1, train, [*settings, "checkpoint.weights=true", "checkpoint.keep=1"])
    first, second = checkpoints(tmp_path / "run" / "checkpoints")
    assert sorted(path.name for path in first.iterdir()) == ["hark.json", "weights-00000-of-00001.safetensors"]
    assert checkpoints(tmp_path / "run" / "checkpoints", resumable=True) == [second]
    Manifest.read(first)
    file = first / "weights-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")

    def load(world: World) -> None:
        module.load_weights(first, make_policy(load_config(settings), world), world)

    with pytest.raises(CheckpointError, match="step-000001 is damaged: weights-00000.*does not agree with its digest"):
        on_ranks(1, load)


def test_a_manifest_that_cannot_be_read_is_damage(tmp_path):
    with pytest.raises(DamageError, match="hark.json cannot be read"):
        Manifest.read(tmp_path / "step-000001")


@pytest.mark.parametrize(
    "put",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.open("w").truncate(2**31)],
)
def test_a_pipe_a_device_or_a_hole_of_gigabytes_in_place_of_a_manifest_is_damage_at_once(put, tmp_path):
    path = tmp_path / "step-000001" / "hark.json"
    path.parent.mkdir()
    put(path)
    with pytest.raises(DamageError, match="hark.json is not a file of at most 64 MB"):
        Manifest.read(path.parent)


def test_a_saver_that_is_asked_twice_finishes_the_first(settings, tmp_path):
    def run(world: World) -> None:
        policy = make_policy(load_config(settings), world)
        optimizer = torch.optim.AdamW(policy.parameters())
        saver = Saver(tmp_path / "saved", world, keep=5)
        for step in (1, 2):
            saver.save(step, policy, optimizer)
        saver.finish()

    on_ranks(1, run)
    assert [path.name for path in checkpoints(tmp_path / "saved")] == ["step-000001", "step-000002"]
