"""The command `hark`: every command is there, mistakes are one line, and `--processes` runs it on several processes."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from hark.launch import __main__ as cli
from hark.launch.__main__ import COMMANDS, command, module_of, parse

COMMANDS_ON_RANKS = ["train", "sft", "evaluate", "replay", "choose", "export", "pass-rate"]


def hark(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hark.launch", *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_is_a_module_with_a_main_that_takes_the_command_line(name):
    tree = ast.parse(Path(find_spec(module_of(name)).origin).read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert function.args.args[0].arg == "argv"
    assert ast.get_docstring(tree), "its help"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_with_one_line(argv, capsys):
    command(argv)
    printed = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert [line for line in printed.splitlines() if line.split() == [name, *entry.does.split()]]


@pytest.mark.parametrize(
    ("typed", "nearest"), [("trian", "train"), ("evalute", "evaluate"), ("check_data", "check-data")]
)
def test_an_unknown_verb_names_the_nearest(typed, nearest):
    with pytest.raises(SystemExit, match=f"unknown command {typed}; the nearest is {nearest};"):
        command([typed])


@pytest.mark.parametrize("name", ["train", "sft", "choose"])
def test_the_help_of_a_verb_with_a_configuration_is_its_docstring_and_all_options(name, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(module_of(name)).main(["mini", "--help"])
    printed = capsys.readouterr().out
    assert not end.value.code and f"launch/{name}.py" in printed and "optim.lr=1.0e-06" in printed


def test_the_help_of_a_program_is_the_same_without_the_command_and_for_several_processes(tmp_path):
    script = Path(find_spec("hark.launch.train").origin)
    by_itself = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert by_itself.returncode == 0
    assert by_itself.stdout == hark("train", "--processes", "2", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("words", [["--help"], ["grade", "--help"]])
def test_a_reader_that_ends_early_is_no_error(words, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "hark.launch", *words], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert result.stderr == ""


def test_a_verb_gets_its_arguments_and_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda module, run_name: seen.append((module, run_name, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["hark"])
    command(["check-data", "questions.jsonl", "--benchmark"])
    assert seen == [("hark.launch.check_data", "__main__", ["hark check-data", "questions.jsonl", "--benchmark"])]


def test_a_mistake_is_one_line_and_a_status(tmp_path):
    result = hark("plan", "nothing.yaml", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [f"error: nothing.yaml: no such file (working directory {tmp_path})"]


@pytest.mark.parametrize(
    "words", [["--processes", "8", "r1_aqa", "optim.lr=1"], ["r1_aqa", "optim.lr=1", "--processes=8"]]
)
def test_processes_runs_the_verb_with_the_other_arguments(words, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "launch", lambda *args: started.append(args) or 3)
    with pytest.raises(SystemExit) as end:
        command(["train", *words])
    assert started == [(8, ["-m", "hark.launch", "train", "r1_aqa", "optim.lr=1"])] and end.value.code == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_processes_is_for_the_verbs_that_share_their_work(name):
    if name in COMMANDS_ON_RANKS:
        assert parse([name, "--processes", "2", "x"]) == (name, 2, ["x"])
    else:
        with pytest.raises(SystemExit, match=f"{name} runs in one process; .*{', '.join(COMMANDS_ON_RANKS)}"):
            parse([name, "--processes", "2", "x"])


def test_less_than_one_process_is_refused():
    with pytest.raises(SystemExit, match="--processes must be at least 1, not 0"):
        parse(["train", "--processes", "0", "r1_aqa"])


def test_the_command_itself_imports_no_torch(tmp_path):
    code = "import sys, hark.launch.__main__ as cli; cli.command(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0
