"""The commands as a user meets them: what they write, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from hark import UserError
from hark.grpo.config import ConfigError
from hark.grpo.instruments import trackers
from hark.launch import evaluate, sft, train
from tests.clips import write_questions
from tests.conftest import build_causal_lm
from tests.ranks import as_torchrun

pytestmark = pytest.mark.slow

LAUNCH = Path(train.__file__).parent


@pytest.fixture
def config(tmp_path, qwen2_audio_dir) -> Path:
    """A configuration of a run small enough for a test, beside its data."""
    questions = write_questions(tmp_path, 8)
    held_out = write_questions(tmp_path, 4, name="test")
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run, threads: 1}}\n"
        f"model: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{train: {questions}, validation: {held_out}, test: {held_out}}}\n"
        "rollout: {group_size: 2, max_new_tokens: 8}\n"
        "optim: {steps: 2, prompts_per_step: 4, micro_batch: 2}\n"
        "evaluation: {every: 2, batch: 3}\n"
    )
    return path


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run(*words: object) -> subprocess.CompletedProcess:
    """Run a command with one thread per process; its output is captured."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


def test_torchrun_trains_evaluates_and_exports_on_two_processes(config, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    result = run(*torchrun, LAUNCH / "train.py", config, "checkpoint.every=1")
    assert result.returncode == 0, result.stderr
    assert "  rollout.group_size=2 rollout.max_new_tokens=8\n" in result.stdout and "step 2/2" in result.stdout
    assert f"exported to {tmp_path}/run/model" in result.stdout and f"{tmp_path}/run/config.yaml" in result.stdout
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert {"reward", "reward/accuracy", "reward/format", "kl", "entropy", "sampler_gap", "seconds/rollout"} <= lines[
        0
    ].keys()
    assert lines[-1]["event"] == "evaluation" and 0 <= lines[-1]["accuracy"] <= 1
    assert (tmp_path / "run" / "config.yaml").exists()
    as_torchrun(2, evaluate.main, [f"{tmp_path}/run", "--silent"])
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "silent_accuracy" in evaluation
    assert [row["id"] for row in evaluation["rows"]] == [f"test-{n}" for n in range(4)], (
        "each once, in the file's order"
    )


def test_a_mistake_is_one_line_and_no_traceback(config):
    result = run(LAUNCH / "train.py", config, "optim.stepz=3")
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == "error: override optim.stepz=3: unknown key optim.stepz; the nearest key is optim.steps"
    )


def test_control_c_in_a_run_of_two_processes_is_one_sentence_that_says_how_to_resume(config):
    words = ["optim.steps=10000", "checkpoint.every=1", "log.completions=1", "evaluation.every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hark.launch", "train", "--processes", "2", config, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert process.stdout
    while not process.stdout.readline().startswith("completions of step 2:"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    sentence = (
        r"SIGINT after step (\d+): the same command with run\.resume=true continues from the checkpoint of step \1\n"
    )
    assert re.fullmatch(sentence, errors), errors


def test_evaluate_counts_every_question_and_asks_again_for_each_control(config, tmp_path, capsys):
    evaluate.main([str(config), "--silent", "--shuffled-audio", "evaluation.batch=2", "--shuffle-choices"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["id"] for row in result["rows"]] == [f"test-{n}" for n in range(4)]
    assert result["chance"] == result["always_first_accuracy"] == 0.25 and result["longest_choice_accuracy"] == 0.25
    assert {"accuracy", "accuracy_interval", "accuracy/task/sound"} <= result.keys()
    for control in ("silent", "shuffled_audio", "shuffled_choices"):
        assert {f"{control}_accuracy", f"{control}_accuracy_interval"} <= result.keys()
    assert result["config"]["evaluation"]["batch"] == 2, "the resolved configuration is saved"
    said = capsys.readouterr().out
    assert "on 4 questions" in said and "sound removed" in said and "choices in another order" in said
    evaluate.main([str(config), "evaluation.limit=3"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(result["rows"]) == 3 and "silent_accuracy" not in result


def test_evaluate_without_a_test_file_says_so(config):
    with pytest.raises(UserError, match="data.test is missing"):
        evaluate.main([str(config), "data.test=null"])


def test_controls_of_sound_need_a_model_that_hears(config, tmp_path):
    build_causal_lm(tmp_path / "text")
    with pytest.raises(UserError, match="takes text only; --silent and --shuffled-audio"):
        evaluate.main([str(config), f"model.path={tmp_path}/text", "--shuffled-audio"])


def test_the_silent_control_of_training_needs_a_model_that_hears(config, tmp_path):
    build_causal_lm(tmp_path / "text")
    with pytest.raises(ConfigError, match="text takes text only, and evaluation.silent needs sound"):
        train.main([str(config), f"model.path={tmp_path}/text", "evaluation.silent=true"])


def test_a_tracker_that_is_not_installed_ends_a_run_before_it_begins(config, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names trackio, which is not installed; run: pip install trackio"):
        train.main([str(config), "log.trackers=[trackio]"])


def test_clips_for_a_model_that_reads_text_only_are_refused(config, tmp_path):
    build_causal_lm(tmp_path / "text")
    with pytest.raises(UserError, match=r"takes text only, and .*jsonl:\d+ has a clip"):
        evaluate.main([str(config), f"model.path={tmp_path}/text"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CONFIG", "--json", "out.json"], "unrecognized arguments: --json"),
        (["CONFIG", "--silence"], "unrecognized arguments: --silence"),
    ],
)
def test_flags_that_evaluate_does_not_know_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(words)
    assert message in capsys.readouterr().err


def test_text_only_policies_train_on_questions_without_clips(config, tmp_path):
    build_causal_lm(tmp_path / "text")
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps({key: line[key] for key in line if key != "audio_path"}) for line in lines)
    (tmp_path / "text.jsonl").write_text(text)
    overrides = [
        f"model.path={tmp_path}/text",
        f"data.train={tmp_path}/text.jsonl",
        "data.validation=null",
        "evaluation.every=0",
    ]
    for number, verb in enumerate((train, sft)):
        verb.main([str(config), *overrides, f"run.directory={tmp_path}/run{number}"])
        assert len(metrics(tmp_path / f"run{number}")) == 2


def broken(tmp_path: Path, what: str) -> list[str]:
    """Overrides that lead to a training file with one fault in its line 3."""
    changes = {
        "missing file": {"audio_path": "nowhere.wav"},
        "unreadable": {"audio_path": "unreadable.wav"},
        "empty": {"audio_path": "empty.wav"},
        "silent": {"audio_path": "silent.wav"},
        "too long": {"audio_path": "long.wav"},
        "answer out of range": {"answer": 4},
    }
    path = write_questions(tmp_path / "broken", 6, line3=changes.get(what, {}))
    (tmp_path / "broken" / "unreadable.wav").write_bytes(b"no sound at all")
    (tmp_path / "broken" / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "broken" / "silent.wav", [0.0] * 8000, 16_000)
    soundfile.write(tmp_path / "broken" / "long.wav", [0.1] * 32_000, 16_000)
    if what == "bad JSON":
        lines = path.read_text().splitlines()
        lines[2] = lines[2][:-5]
        path.write_text("\n".join(lines))
    return [
        f"data.train={path}",
        "data.max_seconds=1",
        "data.validation=null",
        "evaluation.every=0",
        "optim.prompts_per_step=6",
    ]


FAULTS = {
    "missing file": r"train.jsonl:3: .*nowhere.wav: no such file.*check audio_path",
    "unreadable": r"train.jsonl:3: .*unreadable.wav: cannot be decoded .*expected wav, flac, ogg or mp3",
    "empty": r"train.jsonl:3: .*empty.wav: is empty.*copy it again",
    "silent": r"train.jsonl:3: .*silent.wav: is silent .*remove the example or replace",
    "too long": r"train.jsonl:3: .*long.wav: is 2.00 s long; expected at most 1 s.*long_clips",
    "answer out of range": r"train.jsonl:3: .*answer.* 4.*0 to 3",
    "bad JSON": r"train.jsonl:3: not valid JSON .*one JSON object per line",
}


@pytest.mark.parametrize("what", FAULTS)
def test_bad_input_stops_with_where_what_and_how_to_fix_it(what, config, tmp_path):
    with pytest.raises(UserError, match=FAULTS[what]):
        train.main([str(config), *broken(tmp_path, what)])


@pytest.mark.parametrize("what", FAULTS)
def test_with_skip_bad_it_is_counted_listed_and_left_out(what, config, tmp_path, capsys):
    train.main([str(config), *broken(tmp_path, what), "data.skip_bad=true"])
    assert len([line for line in metrics(tmp_path / "run") if "reward" in line]) == 2
    listed = tmp_path / "run" / "bad.jsonl"
    (line,) = listed.read_text().splitlines()
    assert json.loads(line)["file"] == f"{tmp_path}/broken/train.jsonl:3"
    said = capsys.readouterr().out
    assert (
        f"1 bad examples skipped, listed in {listed}" in said
        or f"1 more bad examples skipped, listed in {listed}" in said
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere"], "nowhere: no such directory"),
        (["data.template=anser"], "did you mean 'answer'"),
        (["reward.weights={acuracy: 1}"], "did you mean 'accuracy'"),
        (["data.train=null"], "data.train is missing"),
        (["rollout.group_size=1"], "rollout.group_size must be at least 2"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["model.attention=flex"], "model.attention=flex needs a GPU"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(overrides, message, config):
    with pytest.raises(UserError, match=message):
        train.main([str(config), *overrides])
