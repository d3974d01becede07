"""The console: a line of each step that fits the terminal, and below it events, warnings and completions."""

from __future__ import annotations

import ast
import io
import sys
import types
from pathlib import Path

import pytest

from hark.grpo.instruments import console as console_module
from hark.grpo.instruments.console import PACE, Completion, Console, excerpt
from hark.grpo.trainer import Trainer
from hark.shown import LONGEST, say
from tests.clips import HOSTILE

# A step of the demo.
VALUES = {
    "reward": 1.4123, "reward/accuracy": 0.4167, "equal_reward_share": 0.1875, "reward/format": 0.9948,
    "completion_tokens": 7.9115, "kl": 0.01234, "entropy": 0.3123, "loss": -0.001234, "grad_norm": 0.5123,
    "sampler_gap": 5.3e-8, "hidden": 1.0,
}  # fmt: skip
WHOLE = (
    "step 100/300 [##......] left 2:22 reward 1.41 acc 0.417 equal 0.188 format 0.995 len 7.91 kl 0.012 "
    "entropy 0.312 loss -0.001 grad 0.512 s/step 0.71 gap 5e-08"
)


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test moves by hand."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console_module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns) makes stdout a terminal of that width, and returns what it gets."""

    def terminal(columns: int) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        return stream

    return terminal


def step_100(clock) -> None:
    """Show step 100 of 300, each of 0.71 s."""
    console = Console(300, Trainer.shown)
    for step in range(1, 101):
        clock.seconds += 0.71
        console.step(step, VALUES)
    console.flush()


def test_the_line_has_bar_time_left_and_the_values_in_their_order(capsys, clock):
    step_100(clock)
    assert capsys.readouterr().out.splitlines()[-1] == WHOLE


def test_a_terminal_of_160_columns_shows_all_and_narrower_ones_the_first_values_whole(terminal, clock):
    for columns, shown in ((160, WHOLE), (80, WHOLE[: WHOLE.index(" format")]), (36, WHOLE[: WHOLE.index(" reward")])):
        stream = terminal(columns)
        step_100(clock)
        last = stream.getvalue().split("\r\x1b[K")[-1]
        assert last == shown + "\n" and len(shown) < columns


def test_an_event_ends_the_line_that_is_overwritten(terminal, clock):
    stream = terminal(80)
    console = Console(10, ())
    for step in (1, 2):
        console.step(step, {})
    console.event("evaluation", 2, {"accuracy": 0.5})
    console.step(3, {})
    console.flush()
    _, second, third = stream.getvalue().split("\r\x1b[K")[1:]
    assert second.split("\n")[1:] == ["evaluation at step 2  accuracy 0.5", ""]
    assert third.startswith("step 3/10") and third.endswith("\n")


def test_an_event_has_all_its_values_after_the_step_before_it(capsys, clock):
    console = Console(10, ())
    console.step(1, {})
    console.step(2, {})
    console.event("evaluation", 2, {"accuracy": 0.25, "accuracy/task/sound": 1000})
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("step 2/10")
    assert out[2] == "evaluation at step 2  accuracy 0.25  accuracy/task/sound 1000"


def test_the_pace_forgets_the_first_slow_step(capsys, clock):
    console = Console(100, (PACE,))
    clock.seconds = 500.0
    for step in range(1, 101):
        clock.seconds += 2.0
        console.step(step, {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 0:00 s/step 2")


def test_the_pace_leaves_out_what_came_before_the_first_step(capsys, clock):
    console = Console(2, (PACE,))
    clock.seconds = 100.0
    console.start()
    clock.seconds = 103.0
    console.step(1, {})
    assert "s/step 3" in capsys.readouterr().out


def test_a_console_that_is_no_terminal_gets_a_line_every_few_seconds_and_the_last(capsys, clock):
    console = Console(100, ())
    for step in range(1, 101):
        clock.seconds += 1.0
        console.step(step, {})
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [*range(1, 100, 5), 100]


def test_a_run_that_stops_early_still_prints_its_last_step_once(capsys, clock):
    console = Console(10, ())
    for step in (1, 2, 3):
        console.step(step, {})
    console.flush()
    console.flush()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/10", "3/10"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (151, "2:31"), (3599.4, "59:59"), (3600, "1:00:00"), (1e6, "277:46:40")],
)
def test_time_left_is_minutes_or_hours(seconds, text, clock, capsys):
    console = Console(2, ())
    clock.seconds += seconds
    console.step(1, {})
    assert capsys.readouterr().out.endswith(f" left {text}\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.4167, "0.417"), (-0.0012, "-0.001"), (1.2e-6, "1e-06"), (999.4, "999"), (12345.6, "12346"),
        (1e9, "1e+09"), (float("nan"), "nan"), (float("-inf"), "-inf"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text, capsys):
    Console(2, ("loss", PACE)).step(1, {"loss": value})
    assert f" loss {text} s/step" in capsys.readouterr().out


def completion(question: str, text: str, reward: float) -> Completion:
    return Completion(question, question, text, {"accuracy": reward - 1, "format": 1.0}, reward, advantage=-0.25)


def test_completions_stand_below_their_question_with_advantage_reward_and_its_parts(capsys):
    shown = [completion("Which sound?", "<answer>rain</answer>", 2.0), completion("Which sound?", " ", 1.0)]
    Console(10, ()).completions(5, [*shown, completion("Who?", "me", 1.5)])
    assert capsys.readouterr().out.splitlines() == [
        "completions of step 5: advantage, reward, accuracy, format",
        "  Which sound?",
        "    -0.25     2     1     1  <answer>rain</answer>",
        "    -0.25     1     0     1  (empty)",
        "  Who?",
        "    -0.25   1.5   0.5     1  me",
    ]


def test_completions_fit_the_terminal(terminal):
    stream = terminal(60)
    shown = completion("Which of these sounds do you hear? " * 2, "one two three " * 9, 1.0)
    Console(10, ()).completions(5, [shown])
    lines = stream.getvalue().splitlines()
    assert all(len(line) < 60 for line in lines)
    text = " ".join(line.strip() for line in lines[2:])
    assert text.endswith(("one two three " * 9).strip()) and text.startswith("-0.25")


@pytest.mark.parametrize(
    ("text", "longest", "shown"),
    [
        ("It rains.\n\x1b[2J\u202e", 40, r"It rains.\n\x1b[2J\u202e"),
        ("abcdefghijklmnopqrstuvwxyz", 15, "abcde ... vwxyz"),
        ("Grüße 雨", 40, "Grüße 雨"),
    ],
)
def test_an_excerpt_is_one_line_with_both_ends_and_no_control_characters(text, longest, shown):
    assert excerpt(text, longest) == shown


def test_what_stdout_cannot_encode_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert excerpt("Grüße", 40) == r"Gr\xfc\xdfe"


# What is printed at all -----------------------------------------------------------------------------------------------

PRINTS = {
    "print", "sys.stdout.write", "sys.stderr.write", "sys.stdout.writelines", "sys.stderr.writelines", "os.write",
    "warnings.warn", "traceback.print_exc", "traceback.print_exception", "logging.warning", "logging.error",
}  # fmt: skip


def test_everything_is_printed_by_one_function_that_escapes_and_cuts():
    """But the console's line of a step, which steers the terminal itself, and what studies print of their own."""
    root = Path(__file__).parents[1]
    files = [file for name in ("data", "grpo", "hark", "launch", "models") for file in (root / name).rglob("*.py")]
    calls = [
        (file.relative_to(root).as_posix(), ast.unparse(node))
        for file in sorted(files)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTS and "studies" not in file.parts
    ]
    assert [file for file, _ in calls] == ["grpo/instruments/console.py", "hark/shown.py"]
    assert calls[0][1].startswith(r"print(f'\r\x1b[K{self._pending}'")


def test_a_printed_text_is_one_line_of_bounded_length_without_control_characters(capsys):
    say(HOSTILE, "next")
    first, second = capsys.readouterr().out.split("\n")[:-1]
    assert first.isprintable() and len(first) <= LONGEST and second == "next"


def test_names_in_the_data_cannot_steer_the_terminal_by_a_line_of_the_console(capsys):
    console = Console(10, (f"accuracy/task/{HOSTILE}", "loss"))
    console.event("evaluation", 3, {f"accuracy/task/{HOSTILE}": 0.5, "loss": 1.0})
    console.step(10, {f"accuracy/task/{HOSTILE}": 0.5, "loss": 1.0})
    for line in capsys.readouterr().out.split("\n")[:-1]:
        assert line.isprintable() and len(line) < 400 and "loss 1" in line
