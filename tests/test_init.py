"""`hark init`: configurations that can be read, sample questions that load, nothing overwritten."""

from __future__ import annotations

import pytest

from hark import UserError
from hark.data.examples import load_examples
from hark.launch import init
from hark.launch.common.config_file import load_config


def test_the_files_are_ready_for_both_programs_and_overwrite_nothing(tmp_path, capsys):
    own = tmp_path / "own"
    init.main([str(own)])
    sft, grpo = load_config([str(own / "sft.yaml")]), load_config([str(own / "train.yaml")])
    assert (sft.model.path, grpo.model.path) == (f"{own}/model", f"{sft.run.directory}/model")
    for name in (grpo.data.train, grpo.data.test):
        assert all(example.audio_path.is_file() for example in load_examples(name)[0])
    assert "peak learning rate" in (own / "train.yaml").read_text()
    assert f"hark train {own}/train.yaml" in capsys.readouterr().out
    before = (own / "train.yaml").read_bytes()
    with pytest.raises(UserError, match="exists already; name a new directory"):
        init.main([str(own)])
    assert (own / "train.yaml").read_bytes() == before
