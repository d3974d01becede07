"""What is fuzzed: the files of each kind, how they are read, and what an accepted one may not hold.

Each reader is what a command uses. A `NonsenseError` says that something was accepted that cannot be meant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import soundfile
import torch

from hark import UserError, load_policy, sample
from hark.data.benchmarks.answer_files import BENCHMARKS
from hark.data.benchmarks.grading import grade_file
from hark.data.clip import Clip
from hark.data.clips import Rules, inspect
from hark.data.decoding import MAX_PEAK, Samples, attempt
from hark.data.errors import AudioError
from hark.data.examples import Example, load_questions
from hark.data.json_files import write_json
from hark.grpo.config import Config, to_yaml
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.instruments.record import TENSORS, VALUES, entry_of, read_step
from hark.grpo.learner import Learner
from hark.grpo.runtime.checkpoint import best_of, checkpoints, load_checkpoint
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.runtime.manifest import NAME as MANIFEST
from hark.grpo.runtime.manifest import signed
from hark.launch import step as step_command
from hark.launch.common import row_file
from hark.launch.common.config_file import CONFIGS, load_config
from hark.launch.common.evaluation_file import read_evaluation
from hark.launch.common.run_directory import check_changes, facts
from hark.launch.common.trained import best_step
from hark.launch.page.collect import Bounds, Collection, all_parts
from hark.launch.page.document import document
from hark.launch.pass_rate import is_measured
from hark.launch.studies.mutations import of_values, restored
from hark.models.lora import read_lora

RULES = Rules(sample_rate=16_000, max_seconds=5.0, crop=True)
SMALL, LARGE = 1 << 30, 3 << 30  # bytes that reading may take beyond what the process has; LARGE with a model
MARKUP = ("</script><b", "<img src=x", "<b>")  # as a text in a page would have it if it were markup
TRAINED = (
    "optim.steps=2", "optim.prompts_per_step=2", "optim.micro_batch=2", "rollout.group_size=4",
    "rollout.max_new_tokens=12", "checkpoint.every=1", "evaluation.every=1", "record.every=1", "record.likeliest=2",
)  # fmt: skip


class NonsenseError(AssertionError):
    """Something was accepted that cannot be meant."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise NonsenseError(what)


@dataclass(frozen=True)
class Input:
    """Files in `place`, of which the one at `path` was changed; `good` is what it held."""

    place: Path
    path: Path
    good: bytes
    chance: random.Random


@dataclass(frozen=True)
class Target:
    """A kind of input. begin: puts its good files into a directory. read: reads them, when one of them was changed.

    files: which of them are changed, as patterns. inputs: how many are tried. memory: bytes that reading may take.
    """

    inputs: int
    files: tuple[str, ...]
    begin: Callable[[Path, Path], None]
    read: Callable[[Input], None]
    memory: int = SMALL


def make_project(project: Path) -> None:
    """Questions, a small model, a run of two steps with all that it writes, and one that trains adapters."""
    if (project / "rates.jsonl.settings.json").exists():
        return
    shutil.rmtree(project, ignore_errors=True)
    train = ("train", project / "train.yaml", f"model.path={project}/model", *TRAINED)
    for words in (
        ("init", project),
        ("new-model", "--data", project / "train.jsonl", "--size", "tiny", "--out", project / "model"),
        (*train, f"run.directory={project}/full"),
        (*train, f"run.directory={project}/lora", "lora.rank=2"),
        ("evaluate", project / "full"),
        ("pass-rate", project / "full", "--out", project / "rates.jsonl"),
    ):
        command = [sys.executable, "-m", "hark.launch", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}")


def copied(*names: str) -> Callable[[Path, Path], None]:
    """Files and directories of the project, copied."""

    def begin(project: Path, place: Path) -> None:
        for name in names:
            source, target = project / name, place / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)

    return begin


# Questions ------------------------------------------------------------------------------------------------------------


def begin_questions(project: Path, place: Path) -> None:
    """Questions of every form, as JSON lines and as an array."""
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()[:6]]
    rows[1] |= {"start": 0.1, "end": 0.9, "difficulty": "hard", "pass_rate": 0.5, "target": "<answer>two</answer>"}
    rows[2] |= {
        "system": "Listen.",
        "messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "A"}],
    }
    rows[3] = {key: value for key, value in rows[3].items() if key != "multi_choice"} | {"answer": ["four", "4"]}
    rows[4] |= {
        "audio_paths": [rows[4].pop("audio_path"), rows[5]["audio_path"]],
        "start": [0, None],
        "end": [1.0, 0.5],
    }
    shutil.copytree(project / "audio", place / "audio")
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "train.json").write_text(json.dumps(rows))


def read_questions(one: Input) -> None:
    questions = load_questions(one.path, skip_bad=one.chance.random() < 0.7, benchmark=one.chance.random() < 0.3)
    for question in questions:
        if isinstance(question, Example):
            check_example(question, one.place)
        else:
            expect("\n" not in question.json_line()[:-1], "a bad example of several lines")


def check_example(example: Example, place: Path) -> None:
    """What no question may hold."""
    expect(bool(example.question.strip()) and bool(example.id or example.line), "a question without text")
    for text in (example.id, example.question, example.target, example.system, *example.choices, *example.accepted):
        expect(isinstance(text, str), "a text of another kind")
        text.encode()
    expect(example.answer is None or 0 <= example.answer < len(example.choices), "an answer that is no choice")
    expect(len(example.choices) != 1, "one choice")
    expect(example.pass_rate is None or 0 <= example.pass_rate <= 1, "a pass rate that is no share")
    for clip in example.clips:
        expect(0 <= clip.start < math.inf and (clip.end is None or clip.start < clip.end < math.inf), "an odd window")
        if isinstance(clip.source, Path):
            inside = Path(os.path.realpath(clip.source)).is_relative_to(os.path.realpath(place))
            expect(inside, "a clip elsewhere")


def begin_tables(project: Path, place: Path) -> None:
    """Questions in parquet, once with paths and once with the bytes of the clips."""
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()[:6]]
    shutil.copytree(project / "audio", place / "audio")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "paths.parquet")
    for row in rows:
        path = row.pop("audio_path")
        row["audio"] = {"bytes": (project / path).read_bytes(), "path": path}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "bytes.parquet", compression="none")


def read_tables(one: Input) -> None:
    for question in load_questions(one.path, skip_bad=one.chance.random() < 0.7):
        if isinstance(question, Example):
            check_example(question, one.place)
            for clip in question.clips[:1]:
                check_clip(clip)


# Audio ----------------------------------------------------------------------------------------------------------------


def begin_audio(*files: tuple[str, int, int, str | None]) -> Callable[[Path, Path], None]:
    """A second of sound in files with a name, a rate, a number of channels, and a subtype."""

    def begin(project: Path, place: Path) -> None:
        for name, rate, channels, subtype in files:
            times = np.arange(rate)[:, None] / rate
            sound = 0.4 * np.sin(2 * np.pi * (300 + 40 * np.arange(channels)) * times)
            soundfile.write(place / name, sound, rate, subtype=subtype)

    return begin


def read_audio(one: Input) -> None:
    start = one.chance.choice((0.0, 0.0, 0.3))
    check_clip(Clip(one.path, start, one.chance.choice((None, None, start + 0.5))))


def check_clip(clip: Clip) -> None:
    """Decode a clip; raises its fault."""
    finding = inspect(clip, RULES)
    if finding.fault:
        raise AudioError(f"{clip}: {finding.reason}")
    _, samples = attempt(clip, RULES.sample_rate, RULES.max_seconds, "crop")
    expect(isinstance(samples, Samples), "a clip that is good and bad")
    assert isinstance(samples, Samples)
    expect(np.isfinite(samples.values).all(), "samples that are not finite")
    expect(float(np.abs(samples.values).max()) <= MAX_PEAK, "samples beyond full scale")
    expect(finding.seconds is not None and 0 < finding.seconds <= RULES.max_seconds + 0.01, "an odd length")


# Configurations -------------------------------------------------------------------------------------------------------


def begin_configurations(project: Path, place: Path) -> None:
    for path in (*CONFIGS.glob("*.yaml"), project / "train.yaml"):
        shutil.copy(path, place / path.name)


def read_configuration(one: Input) -> None:
    config = load_config([str(one.path)])
    for section in dataclasses.asdict(config).values():
        for value in section.values():
            expect(not isinstance(value, float) or not math.isnan(value), "an option that is no number")
    again = one.place / "again" / "again.yaml"
    again.parent.mkdir(exist_ok=True)
    again.write_text(to_yaml(config), encoding="utf-8")
    expect(load_config([str(again)]) == config, "options that are others when they are written and read")


# Models ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def sound() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)


def read_model(one: Input) -> None:
    use_model(one.place / "model")


def use_model(path: Path, **more: Any) -> None:
    """Load a model, and let it answer."""
    policy = load_policy(path, **more)
    for name, parameter in policy.named_parameters():
        expect(bool(parameter.isfinite().all()), f"{name} is not finite")
    prompt = policy.prepare("Which sound is this?", sound())
    with torch.no_grad():
        rollout = sample(policy, [prompt], group_size=2, max_new_tokens=2, temperature=0.0)
    expect(bool(rollout.logprobs.isfinite().all()), "logprobs that are not finite")
    policy.completion_texts(rollout.tokens, rollout.mask)


def read_adapters(one: Input) -> None:
    use_model(one.place / "model", lora=read_lora(one.place / "adapters"))


@functools.lru_cache(maxsize=1)
def trained(directory: str) -> tuple[Any, Any]:
    policy = load_policy(directory)
    return policy, torch.optim.AdamW(policy.parameters())


@functools.lru_cache(maxsize=1)
def resumed(path: str) -> tuple[Config, dict[str, Any]]:
    """The configuration of the run of the checkpoints, and its facts."""
    config = load_config([path])
    with joined_world() as world:
        return config, facts(config, world)


def read_checkpoint(one: Input) -> None:
    """Resume. A changed file must be noticed; a manifest that was signed anew may be another one, but not nonsense."""
    if one.path.name == MANIFEST and one.path.is_file() and one.chance.random() < 0.6:
        sign_another(one)
    policy, optimizer = trained(str(one.place / "model"))
    place = one.place / "checkpoints"
    with joined_world() as world, contextlib.redirect_stdout(io.StringIO()):
        manifest = load_checkpoint(place, policy, optimizer, world)
    assert manifest is not None
    is_changed = not one.path.is_file() or one.path.read_bytes() != one.good
    if is_changed and one.path.parent.name == "step-000002" and one.path.name != MANIFEST:
        expect(manifest.step == 1, "a changed file of a checkpoint")
    for parameter in policy.parameters():
        expect(bool(parameter.isfinite().all()), "weights that are not finite")
    Learner.restore(cast(Learner, SimpleNamespace(data=SimpleNamespace())), manifest.state)
    check_changes(*resumed(str(one.place / "config.yaml")), manifest)
    best_of(checkpoints(place))


def sign_another(one: Input) -> None:
    """Put a manifest with other values in the place of the good one, with a right digest of itself."""
    body = {key: value for key, value in json.loads(one.good).items() if key != "sha256"}
    restored(one.path, one.good)
    with contextlib.suppress(ValueError, RecursionError):  # values that no manifest can hold
        changed = of_values(body, one.chance)
        one.path.write_bytes(signed(changed if isinstance(changed, dict) else {"body": changed}))


# Records and results --------------------------------------------------------------------------------------------------


def read_record(one: Input) -> None:
    """What `hark step` prints of the record of a run."""
    run = one.place / "full"
    words = one.chance.choice(([], ["--show", "loss"], ["--show", "likeliest"], ["--completion", "2"]))
    with record_signed(one), contextlib.redirect_stdout(io.StringIO()):
        step_command.main([str(run), "1", *words])
        read_step(run, 1)


def read_page(one: Input) -> None:
    """The page of `hark report`."""
    with record_signed(one):
        page = document(*all_parts(Collection([one.place / "full"], Bounds()), Bounds()))
    expect(not any(mark in page for mark in MARKUP), "markup in a page")


@contextlib.contextmanager
def record_signed(one: Input) -> Iterator[None]:
    """In the block a changed record mostly has right digests: without them its values are never read."""
    path = one.path.with_name(VALUES)
    if one.path.name not in (VALUES, TENSORS) or not one.path.is_file() or one.chance.random() > 0.6:
        yield
        return
    before = path.read_bytes()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # no JSON, no object, or too deep
        body = {key: value for key, value in json.loads(before).items() if key != "sha256"}
        path.write_bytes(signed(body | ({"tensors": entry_of(one.path)} if one.path.name == TENSORS else {})))
    try:
        yield
    finally:
        path.write_bytes(before)


def read_results(one: Input) -> None:
    """What commands read of a run beside its model: evaluation, log, choice and pass rates."""
    run = one.place / "full"
    evaluation = read_evaluation(run / "evaluation.json")
    accuracy = evaluation.get("accuracy")
    expect(accuracy is None or math.isfinite(accuracy), "an accuracy that is no number")
    for line in read_metrics(run):
        expect(isinstance(line["step"], int), "a step that is no number")
    best_step(run)
    settings = json.loads((one.place / "settings.json").read_text())
    for row in row_file.begin(one.place / "rates.jsonl", settings, is_measured):
        expect(0 <= row["pass_rate"] <= 1, "a pass rate that is no share")


def begin_results(project: Path, place: Path) -> None:
    copied("full", "rates.jsonl", "rates.jsonl.settings.json")(project, place)
    shutil.copy(project / "rates.jsonl.settings.json", place / "settings.json")
    write_json(place / "full" / "choice.json", {"step": 1, "validation": []})


def begin_answers(project: Path, place: Path) -> None:
    """The answers of the run, and files of the benchmarks in their own forms."""
    rows = json.loads((project / "full" / "answers.json").read_text())
    (place / "answers.json").write_text(json.dumps(rows[:6]))
    choices = {"choices": ["rain", "dog"], "answer": "rain"}
    mmar = [
        {"id": str(n), "question": "Which?", "modality": "sound", "category": "a", "sub-category": "b"}
        for n in range(4)
    ]
    (place / "mmar.json").write_text(json.dumps([row | choices | {"answer_prediction": "(A) rain"} for row in mmar]))
    mmsu = {
        "choice_a": "rain",
        "choice_b": "dog",
        "choice_c": "",
        "answer_gt": "rain",
        "task_name": "t",
        "response": "A",
    }
    lines = [json.dumps({"id": str(n), "question": "Which?", "category": "a"} | mmsu) for n in range(4)]
    (place / "mmsu.jsonl").write_text("\n".join(lines) + "\n")


def read_answers(one: Input) -> None:
    out = one.place / "out" / "graded.json"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        grade_file(str(one.path), benchmark=one.chance.choice(list(BENCHMARKS)), out=str(out))
    expect("\x1b" not in text.getvalue(), "an escape sequence on the terminal")
    accuracy = json.loads(out.read_text())["accuracy"]
    expect(accuracy is None or 0 <= accuracy <= 1, "an accuracy that is no share")


# All ------------------------------------------------------------------------------------------------------------------

WAV = (("a.wav", 16_000, 1, None), ("b.wav", 44_100, 2, "FLOAT"), ("c.wav", 22_050, 1, "PCM_24"))
OF_A_PAGE = ("full/record/*/*/*", "full/evaluation.json", "full/metrics.jsonl", "full/config.yaml")
RESULTS = ("full/evaluation.json", "full/metrics.jsonl", "full/choice.json", "rates.jsonl*")
RESUMED = copied("model", "full/checkpoints", "full/config.yaml")
TARGETS: dict[str, Target] = {
    "questions, JSON": Target(30_000, ("train.jsonl", "train.json"), begin_questions, read_questions),
    "questions, parquet": Target(8_000, ("*.parquet",), begin_tables, read_tables),
    "wav": Target(6_000, ("*.wav",), begin_audio(*WAV), read_audio),
    "flac": Target(6_000, ("*.flac",), begin_audio(("a.flac", 16_000, 1, None)), read_audio),
    "ogg": Target(6_000, ("*.ogg",), begin_audio(("a.ogg", 16_000, 2, None)), read_audio),
    "mp3": Target(6_000, ("*.mp3",), begin_audio(("a.mp3", 16_000, 1, None)), read_audio),
    "configurations": Target(12_000, ("*.yaml",), begin_configurations, read_configuration),
    "model directories": Target(1_000, ("model/*",), copied("model"), read_model, LARGE),
    "adapters": Target(1_000, ("adapters/*",), copied("model", "lora/adapters"), read_adapters, LARGE),
    "checkpoints": Target(1_500, ("checkpoints/*/*",), RESUMED, read_checkpoint, LARGE),
    "records": Target(6_000, ("full/record/*/*/*",), copied("full"), read_record),
    "pages of runs": Target(2_000, OF_A_PAGE, copied("full"), read_page),
    "results of runs": Target(5_000, RESULTS, begin_results, read_results),
    "answer files": Target(10_000, ("*.json", "*.jsonl"), begin_answers, read_answers),
}  # fmt: skip


def changed_files(target: Target, place: Path) -> Iterator[Path]:
    """The files of which one is changed in each input."""
    for pattern in target.files:
        yield from sorted(path for path in place.glob(pattern) if path.is_file())
