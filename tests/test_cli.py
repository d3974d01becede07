"""The command `hark`: every command is there, mistakes are one line, and `--processes` starts torchrun's launcher."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hark.launch import __main__ as cli
from hark.launch.__main__ import COMMANDS, main, module_of, parse

COMMANDS_ON_RANKS = ["train", "sft", "evaluate", "choose", "export"]


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
    main(argv)
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert [line for line in printed.splitlines() if line.split() == [name, *command.does.split()]]


@pytest.mark.parametrize(
    ("typed", "nearest"), [("trian", "train"), ("evalute", "evaluate"), ("check_data", "check-data")]
)
def test_an_unknown_verb_names_the_nearest(typed, nearest):
    with pytest.raises(SystemExit, match=f"unknown command {typed}; the nearest is {nearest};"):
        main([typed])


@pytest.mark.parametrize("name", ["train", "sft", "choose"])
def test_the_help_of_a_verb_without_a_parser_is_its_docstring_and_all_options(name, capsys):
    main([name, "--help"])
    printed = capsys.readouterr().out
    assert f"launch/{name}.py" in printed and "optim.lr=1.0e-06" in printed


def test_the_help_of_a_program_is_the_same_without_the_command(tmp_path):
    script = Path(find_spec("hark.launch.train").origin)
    by_itself = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert by_itself.returncode == 0 and by_itself.stdout == hark("train", "--help", cwd=tmp_path).stdout


def test_a_verb_gets_its_arguments_and_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda module, run_name: seen.append((module, run_name, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["hark"])
    main(["check-data", "questions.jsonl", "--benchmark"])
    assert seen == [("hark.launch.check_data", "__main__", ["hark check-data", "questions.jsonl", "--benchmark"])]


def test_a_mistake_is_one_line_and_a_status(tmp_path):
    result = hark("plan", "nothing.yaml", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [f"error: nothing.yaml: no such file (working directory {tmp_path})"]


@pytest.mark.parametrize(
    "words", [["--processes", "8", "r1_aqa", "optim.lr=1"], ["r1_aqa", "optim.lr=1", "--processes=8"]]
)
def test_processes_starts_the_launcher_with_the_other_arguments(words, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda path, words, environment: started.append((words, environment)))
    main(["train", *words])
    ((command, environment),) = started
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert command == [sys.executable, *torchrun, "-m", "hark.launch.train", "r1_aqa", "optim.lr=1"]
    assert environment["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")


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
    code = "import sys, hark.launch.__main__ as cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0
