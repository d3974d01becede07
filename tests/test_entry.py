"""How a program ends: one sentence for one error, whatever the number of processes, and a status for each end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason

# What the first argument names happens on the ranks that the second one lists; the others wait for them.
PROGRAM = """
import os, signal, sys, time
from hark import UserError
from hark.launch.common.entry import run

def main(argv):
    what, ranks = argv
    if os.environ.get("RANK", "0") not in ranks.split(","):
        time.sleep(60)
    if what == "user error":
        raise UserError("a.yaml:3: no such key")
    if what == "bug":
        raise KeyError("a bug")
    if what == "exit":
        sys.exit(7)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    if what == "interrupt":
        try:
            os.write(1, b"ready\\n")
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted after step 3") from None

run(main)
"""
LAUNCH = "import sys; from hark.launch.common.torchrun import launch; sys.exit(launch(2, sys.argv[1:]))"


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def start(*words: str | Path) -> subprocess.Popen:
    """A program that Ctrl-C reaches, also where these tests run in the background of a shell, which ignore it."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The exit status, and what was printed as an error."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_of_two_processes_one_prints_one_sentence_and_its_status_is_passed_on(program):
    ends = {
        ("user error", "0,1"): (1, "error: a.yaml:3: no such key\n"),
        ("user error", "1"): (1, "error: a.yaml:3: no such key\n"),
        ("exit", "1"): (7, ""),
        ("killed", "1"): (137, "error: process 1 was ended by SIGKILL; the system does this when memory runs out, see"),
    }
    started = {case: start("-c", LAUNCH, program, *case) for case in ends}  # all at once
    for case, (status, message) in ends.items():
        code, errors = ended(started[case])
        assert code == status and errors.startswith(message), (case, errors)
        assert errors.count("\n") == (message != ""), errors


def test_a_bug_shows_its_traceback_once(program):
    code, errors = ended(start("-c", LAUNCH, program, "bug", "0,1"))
    assert code == 1 and errors.count("Traceback") == 1 and errors.endswith("KeyError: 'a bug'\n")


def test_under_plain_torchrun_the_sentence_stands_once(program):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, errors = ended(start(*torchrun, program, "user error", "0,1"))
    assert code == 1 and errors.count("no such key") == 1


def test_control_c_is_one_sentence_of_all_processes_and_status_130(program):
    process = start("-c", LAUNCH, program, "interrupt", "0,1")
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted after step 3\n")


def test_control_c_in_one_process_has_status_130(program):
    """torchrun has a status of its own for a signal; alone, the process gives it."""
    process = start(program, "interrupt", "0")
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted after step 3\n")


def test_one_process_ends_in_the_same_ways(program):
    assert ended(start(program, "user error", "0")) == (1, "error: a.yaml:3: no such key\n")
    assert ended(start(program, "exit", "0")) == (7, "")
    code, errors = ended(start(program, "memory", "0"))
    assert code == 1 and errors.startswith("error: out of memory (DefaultCPU") and "`hark plan`" in errors


def test_a_panic_of_a_tokenizer_is_one_sentence(tmp_path):
    path = tmp_path / "panic.py"
    path.write_text(
        "from tokenizers import Regex, Tokenizer, models, pre_tokenizers\n"
        "from hark.launch.common.entry import run\n"
        "def main(argv):\n"
        "    tokenizer = Tokenizer(models.BPE())\n"
        "    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('(a|aa)+$'), 'isolated')\n"
        "    tokenizer.encode('a' * 500 + '!')\n"
        "run(main)\n"
    )
    code, errors = ended(start(path))
    said = errors.splitlines()[-1]
    assert code == 1 and said.startswith("error: compiled code gave up (") and "Traceback" not in errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "DefaultCPUAllocator: can't allocate memory",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (MemoryError(), "MemoryError"),
        (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
    ],
)
def test_every_allocators_error_is_known(error, said):
    assert is_out_of_memory(error) and reason(error) == said


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("out of memory")]
)
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)
