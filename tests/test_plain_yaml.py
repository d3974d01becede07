"""Configurations that somebody made to do harm: each is an error of one short line, at once."""

import ast
import os
import re
import time
from pathlib import Path

import pytest

from hark.grpo.config import ConfigError
from hark.launch.common.config_file import load_config
from hark.launch.common.plain_yaml import MOST_BYTES, plain_yaml, read_options

ROOT = Path(__file__).parents[1]
BOMB = "".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
ALIASES = f"loss:\n  a: &a [0, 0]\n{BOMB}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "anchors and aliases"),
        ("loss: {a: *b}", "anchors and aliases"),
        ("loss: &loss {beta: 0.1}", "anchors and aliases"),
        ("optim: {lr: " + "[" * 50_000, "nested more than 20 deep|not YAML"),
        ("optim: {lr: " + "[" * 30 + "]" * 30 + "}", "nested more than 20 deep"),
        ("optim: {steps: " + "9" * 100_000 + "}", "a number of 100000 characters"),
        ("optim: {steps: 1" + ":59" * 80_000 + "}", "a number of"),
        ("optim: {steps: 1" + ":59" * 200 + ".5}", "a number of|not YAML|must be"),
        ("optim: {lr: 2026-99-99}", "not YAML"),
        ("optim: {lr: !!python/object/apply:os.system [ls]}", "not YAML|could not determine"),
        ("reward: {weights: {accuracy: 1, accuracy: 2}}", "given twice"),
        ("reward: {options: {a.py:b: {x: {y: 1, y: 2}}}}", "given twice"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "given twice"),
        ("optim: {lr: [" + "\x1b]0;x\x07" * 10 + "]}", "not YAML"),
        ("x" * 900 + ": 1", "unknown key x+ ... x+;"),
        ("optim: {lr: " + "x" * 3000 + "}", "optim.lr must be a finite number, not 'x+ ... x+'"),
        ("#" * (MOST_BYTES + 1), "not a file of at most"),
    ],
)
def test_a_hostile_configuration_is_one_short_line_at_once(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.monotonic()
    for read in (lambda: load_config([str(path)]), lambda: read_options(path)):
        try:
            read()
        except ConfigError as error:
            assert len(str(error)) < 800 and str(error).isprintable()
    assert time.monotonic() - start < 5
    with pytest.raises(ConfigError, match=message):
        load_config([str(path)])


@pytest.mark.parametrize("text", [ALIASES, "a: {b: 1, b: 2}", "[1]", "a: 1", "a: {b: 1", "a: {1: 2, 1: 3}"])
def test_the_configuration_of_a_run_is_read_back_by_the_same_rules(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_options(tmp_path / "config.yaml")
    assert len(str(error.value)) < 800 and str(error.value).isprintable()


def test_an_empty_configuration_of_a_run_which_a_full_disk_leaves_is_that_of_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert read_options(tmp_path / "config.yaml") == {} == read_options(tmp_path / "missing.yaml")


def test_a_pipe_in_place_of_a_configuration_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    for read in (lambda: load_config([str(tmp_path / "config.yaml")]), lambda: read_options(tmp_path / "config.yaml")):
        with pytest.raises(ConfigError, match="not a file of at most"):
            read()


def test_an_override_of_a_text_may_begin_like_an_alias_and_other_overrides_may_not():
    assert plain_yaml("[1, 2.5, 1e-3, a]") == [1, 2.5, "1e-3", "a"]
    with pytest.raises(ConfigError, match="override optim.lr=.*: the value is not YAML: anchors and aliases"):
        load_config(["mini", "optim.lr=*a"])
    assert load_config(["mini", "run.directory=*a"]).run.directory == "*a"


def test_a_long_override_is_cut_in_its_error():
    with pytest.raises(ConfigError) as error:
        load_config(["mini", "optim.lr=" + "x" * 3000])
    assert len(str(error.value)) < 800


def test_no_other_file_reads_yaml():
    readers = re.compile(r"yaml\.(safe_load|load|full_load|unsafe_load|SafeLoader|compose|parse)")
    files = [file for name in ("data", "grpo", "launch", "models", "hark") for file in (ROOT / name).rglob("*.py")]
    used = {file.name: ast.unparse(ast.parse(file.read_text())) for file in files if "yaml" in file.read_text()}
    assert [name for name, text in used.items() if readers.search(text)] == ["plain_yaml.py"]
