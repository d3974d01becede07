"""A checkpoint is chosen on validation questions, and only that one sees the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hark.data.benchmarks.report import Share
from hark.grpo.config import ConfigError
from hark.grpo.runtime.checkpoint import CheckpointError, checkpoints
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.manifest import signed
from hark.launch import choose, sft
from hark.launch.common.trained import find_trained, highest
from tests.clips import write_questions


def test_the_best_checkpoint_is_the_earliest_of_equals():
    shares = {100: Share(1, 4), 200: Share(3, 4), 300: Share(3, 4), 400: Share(2, 4)}
    assert highest({step: share.accuracy for step, share in shares.items()}) == 200
    assert choose.table(shares, 200).splitlines()[2].split() == ["200", "3/4", "75.0", "30.1", "-", "95.4", "chosen"]


@pytest.fixture
def run(settings, tmp_path):
    """A run that learns its three answers by heart, with all of its checkpoints' weights."""
    questions = write_questions(tmp_path / "few", 4)
    return [
        *settings, f"run.directory={tmp_path}/run", f"data.train={questions}", f"data.validation={questions}",
        "optim.steps=24", "optim.lr=3e-3", "data.shuffle_choices=false", "rollout.max_new_tokens=20",
        "checkpoint.every=12", "checkpoint.keep=1", "checkpoint.weights=true", "checkpoint.export=false",
    ]  # fmt: skip


def test_a_run_is_chosen_from_and_its_test_reported_once(run, tmp_path, capsys):
    sft.main(run)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 2
    assert len(checkpoints(tmp_path / "run" / "checkpoints", resumable=True)) == 1, "the optimizer of the newest alone"
    capsys.readouterr()
    test = write_questions(tmp_path / "test", 3, name="test")
    choose.main([str(tmp_path / "run"), f"data.test={test}", "evaluation.benchmark=mmau"])
    said = capsys.readouterr().out
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    accuracies = {int(step): record["accuracy"] for step, record in choice["validation"].items()}
    assert accuracies.keys() == {12, 24} and accuracies[24] == 1.0
    assert choice["step"] == min(step for step in accuracies if accuracies[step] == 1.0)
    assert f"step {choice['step']} of {tmp_path}/run on 3 questions of {test}, by the rule of mmau" in said
    assert said.count("by the rule of mmau") == 1
    result = json.loads((tmp_path / "run" / "chosen" / "evaluation.json").read_text())
    assert [row["id"] for row in result["rows"]] == ["test-0", "test-1", "test-2"]


def test_the_weights_of_each_checkpoint_are_its_own(run, tmp_path):
    """Answers of the chosen checkpoint are those of its export."""
    from hark.launch import evaluate, export

    sft.main([*run, "optim.steps=24", "optim.schedule=linear"])
    test = write_questions(tmp_path / "test", 3, name="test")
    choose.main([str(tmp_path / "run"), f"data.test={test}"])
    chosen = json.loads((tmp_path / "run" / "choice.json").read_text())["step"]
    rows = json.loads((tmp_path / "run" / "chosen" / "evaluation.json").read_text())["rows"]
    export.main([str(tmp_path / "run"), "--step", str(chosen), "--to", str(tmp_path / "model")])
    evaluate.main([*run, f"model.path={tmp_path}/model", f"run.directory={tmp_path}/again", f"data.test={test}"])
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["rows"] == rows
    evaluate.main([str(tmp_path / "run"), "--step", str(chosen), f"data.test={test}"])
    found = json.loads((tmp_path / "run" / f"step-{chosen:06d}" / "evaluation.json").read_text())
    assert found["rows"] == rows and found["step"] == chosen


def test_a_run_of_two_replicas_is_chosen_from_and_exported_by_one_process(run, tmp_path):
    from hark.launch import export

    sft.main([*run, "optim.steps=12"])
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("replicas: 1", "replicas: 2"))
    choose.main([str(tmp_path / "run")])
    export.main([str(tmp_path / "run")])
    assert (tmp_path / "run" / "model-000012").is_dir()


def test_nothing_to_choose_from_or_by_is_said(tmp_path, settings, qwen2_audio_dir):
    with pytest.raises(ConfigError, match="the first argument must be the run.directory"):
        choose.main(["data.test=x.jsonl"])
    (tmp_path / "config.yaml").write_text(f"model: {{path: {qwen2_audio_dir}}}\n")
    with pytest.raises(CheckpointError, match="the run has no checkpoints; train with checkpoint.every above 0"):
        choose.main([str(tmp_path)])
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "hark.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither data.validation nor data.held_out is set"):
        choose.main([str(tmp_path)])


def predictions(directory) -> list[str]:
    return [row["prediction"] for row in json.loads((directory / "evaluation.json").read_text())["rows"]]


def test_a_run_directory_stands_for_its_trained_model_and_gets_no_other_figures(run, tmp_path, questions):
    from hark.launch import evaluate

    few = tmp_path / "few" / "train.jsonl"
    sft.main([*run, "evaluation.every=12"])
    directory = tmp_path / "run"
    with pytest.raises(ConfigError, match=f"holds a training run.*`hark evaluate {directory}` evaluates that"):
        evaluate.main([*run, f"data.test={few}"])
    assert not (directory / "evaluation.json").exists()
    with pytest.raises(ConfigError, match="data.test is missing"):
        evaluate.main([str(directory)])
    evaluate.main([str(directory), f"data.test={few}"])
    evaluate.main([str(directory), "--best", f"data.test={few}"])
    evaluate.main([str(directory), "--step", "12", f"data.test={few}"])
    evaluate.main([*run, f"run.directory={tmp_path}/before", f"data.test={few}"])
    last = predictions(directory)
    right = [f"<answer>{row['multi_choice'][row['answer']]}</answer>" for row in map(json.loads, few.open())]
    assert last == right, "learnt by heart"
    assert predictions(tmp_path / "before") != last
    accuracy = {line["step"]: line["accuracy"] for line in map(json.loads, (directory / "metrics.jsonl").open())
                if line.get("event") == "evaluation"}  # fmt: skip
    best = min(step for step in accuracy if accuracy[step] == max(accuracy.values()))
    record = json.loads((directory / "chosen" / "evaluation.json").read_text())
    assert record["step"] == best and record["accuracy"] == accuracy[best]
    assert json.loads((directory / "step-000012" / "evaluation.json").read_text())["step"] == 12
    with pytest.raises(CheckpointError, match="no checkpoint after step 5; the run has 12, 24"):
        evaluate.main([str(directory), "--step", "5", f"data.test={few}"])
    with pytest.raises(ConfigError, match="--step and --best need the run.directory"):
        evaluate.main([*run, "--best", f"data.test={few}"])


def test_a_run_without_checkpoints_stands_for_its_exported_model(run, tmp_path):
    from hark.launch import evaluate, export

    few = tmp_path / "few" / "train.jsonl"
    sft.main([*run, "checkpoint.every=0", "checkpoint.export=true"])
    evaluate.main([str(tmp_path / "run"), f"data.test={few}"])
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert record["step"] == 24 and record["accuracy"] == 1.0
    with pytest.raises(ConfigError, match="kept no checkpoints; its model is in .*/run/model already"):
        export.main([str(tmp_path / "run")])


def test_a_finished_run_needs_nothing_but_its_export_and_a_continued_one_its_newest_checkpoint(run, tmp_path):
    directory, more = tmp_path / "run", ["checkpoint.export=true", "evaluation.every=0"]
    sft.main([*run, *more])
    finished = find_trained(directory, [])
    assert finished.checkpoint is None and finished.config.model.path == str(directory / "model")
    assert find_trained(directory, [], step=24).checkpoint == directory / "checkpoints" / "step-000024"
    longer = ["optim.steps=36", "run.resume=true", "run.allow_changed=[optim.steps]"]
    sft.main([*run, *more, *longer, "checkpoint.export=false"])
    assert find_trained(directory, []).checkpoint == directory / "checkpoints" / "step-000036", "the export is older"


def flip(file: Path) -> None:
    """Change the last byte of a file."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_export_is_named_and_the_checkpoint_of_the_same_step_is_used(run, tmp_path, capsys):
    from hark.launch import evaluate, export

    directory, model, few = tmp_path / "run", tmp_path / "run" / "model", tmp_path / "few" / "train.jsonl"
    sft.main([*run, "checkpoint.export=true", "evaluation.every=0"])
    evaluate.main([str(directory), f"data.test={few}"])
    right = predictions(directory)
    assert "warning" not in capsys.readouterr().out
    flip(model / "model.safetensors")
    evaluate.main([str(directory), f"data.test={few}"])
    said = capsys.readouterr().out
    assert f"warning: {model} is damaged: model.safetensors does not agree with its digest; {directory}/checkpo" in said
    assert f"now with the weights of step 24 of {directory}" in said and predictions(directory) == right
    export.main([str(directory), "--to", str(model)])
    with pytest.raises(ConfigError, match="its model is in .*/run/model already"):
        export.main([str(directory)])


def test_a_damaged_export_without_a_checkpoint_is_an_error_and_one_without_digests_is_used(run, tmp_path):
    from hark.launch import ask, pass_rate

    directory, world = tmp_path / "run", World(0, 1, torch.device("cpu"))
    model = directory / "model"
    sft.main([*run, "checkpoint.export=true", "checkpoint.every=0", "evaluation.every=0", "optim.steps=1"])
    found = find_trained(directory, [])
    assert found.intact(world) is found
    for damage, reason in (
        (lambda: flip(model / "tokenizer.json"), "tokenizer.json does not agree with its digest"),
        (lambda: (model / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda: flip(model / "hark.json"), "hark.json is not that of an export"),
        (lambda: (model / "hark.json").write_bytes(signed({"files": 1})), "hark.json is not that of an export"),
        (
            lambda: (model / "hark.json").write_bytes(signed({"files": {"../config.yaml": {"size": 1, "sha256": ""}}})),
            "hark.json is not that of an export",
        ),
    ):
        damage()
        with pytest.raises(CheckpointError, match=f"{model} is damaged: {reason}.*; the run has no checkpoint to use"):
            found.intact(world)
    question = [str(tmp_path / "few" / "train-0.wav"), "Which?"]
    for command in (
        lambda: ask.main([str(directory), *question]),
        lambda: pass_rate.main([str(directory), "--out", str(tmp_path / "rates.jsonl")]),
    ):
        with pytest.raises(CheckpointError, match="is damaged"):
            command()
    (model / "hark.json").unlink()
    assert found.intact(world) is found


def test_the_best_step_without_its_checkpoint_is_said(run, tmp_path):
    sft.main([*run, "evaluation.every=6", "checkpoint.weights=false"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "accuracy": 2.0}) if '"step": 6,' in line else line for line in lines]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(changed))
    with pytest.raises(CheckpointError, match="the checkpoint of its best step, 6, was deleted; checkpoint.weights"):
        find_trained(tmp_path / "run", [], best=True)
