"""`hark init`: what it writes is read by the other commands as it is, and nothing is overwritten."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from hark.data.errors import DataError
from hark.launch import init
from hark.launch.__main__ import module_of
from hark.launch.common.config_file import HINTS, load_config


def test_the_whole_chain_runs_as_it_is_written_in_an_empty_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    init.main(["mine"])
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    hark ")]
    assert [words[1] for words in commands] == ["new-model", "sft", "train", "evaluate"]
    few = ["optim.steps=1", "optim.prompts_per_step=2", "evaluation.every=0", "log.completions=0"]
    for _, *words in commands:
        more = few if words[0] in ("sft", "train") else []
        import_module(module_of(words[0])).main([*words[1:], *more])
    found = json.loads((tmp_path / "mine" / "grpo" / "evaluation.json").read_text())
    assert found["step"] == 1 and found["total"] == 16 and "silent_accuracy" in found


def test_every_option_has_the_comment_of_the_option_itself(tmp_path):
    init.main([str(tmp_path / "mine")])
    for name in ("sft.yaml", "train.yaml"):
        load_config([str(tmp_path / "mine" / name)])
        lines = (tmp_path / "mine" / name).read_text().splitlines()
        options = [line for line in lines if line.startswith("  ")]
        assert len(options) >= 18 and all("  # " in line for line in options)
        assert (
            "  held_out: 8  # without a validation file: how many examples of `train` to hold out, by whole clips"
            in lines
        )
        assert {line.split(":")[0].strip() for line in options} <= {name.partition(".")[2] for name in HINTS}


def test_an_existing_project_is_not_overwritten(tmp_path):
    (tmp_path / "train.yaml").write_text("mine")
    with pytest.raises(DataError, match="train.yaml: exists already; name a new directory"):
        init.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    with pytest.raises(DataError, match="exists already"):
        init.main([str(tmp_path / "train.yaml")])
