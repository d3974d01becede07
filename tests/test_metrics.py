"""grpo.metrics: every step stands once in the file, only rank 0 writes, and sums over ranks are exact."""

import io
import json
import math
import sys
import types

import pytest
import torch
import torch.distributed as dist

import hark.grpo.instruments.metrics as metrics_module
from hark.grpo.instruments.metrics import Metrics
from hark.grpo.runtime.collectives import World, reduce_max, reduce_sums
from tests.ranks import on_ranks


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test moves by hand."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metrics_module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def board(monkeypatch):
    """What TensorBoard was given: the constructor's purge_step, then (name, value, step)."""
    calls = []

    class SummaryWriter:
        def __init__(self, directory, purge_step=None):
            calls.append(purge_step)

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """None in sys.modules makes the import fail, as it does where tensorboard is not installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def lines(directory) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def logged(directory, steps, **options) -> Metrics:
    metrics = Metrics(directory, rank=0, total_steps=10, **options)
    for step in steps:
        metrics.log(step, {"reward": step / 10})
    return metrics


def test_a_step_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    logged(tmp_path / "new" / "run", [1, 2])
    assert lines(tmp_path / "new" / "run") == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}]


def test_only_rank_0_writes(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run", rank=1, total_steps=2, show=("reward",))
    metrics.truncate(0)
    metrics.log(2, {"reward": 1.0})
    metrics.log_event("evaluation", {"accuracy": 1.0})
    metrics.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_no_step_occurs_twice_after_a_resume(tmp_path):
    metrics = logged(tmp_path, [1, 2, 3])
    metrics.log_event("evaluation", {"accuracy": 0.5})
    metrics.log(4, {"reward": 0.4})
    resumed = Metrics(tmp_path, rank=0, total_steps=10)
    resumed.truncate(3)
    resumed.log(3, {"reward": 0.9})
    assert lines(tmp_path) == [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.2},
        {"step": 3, "reward": 0.9},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_event_of_the_checkpointed_step_survives_the_resume(tmp_path):
    logged(tmp_path, [1, 2]).log_event("evaluation", {"accuracy": 0.5})
    Metrics(tmp_path, rank=0, total_steps=10).truncate(3)
    assert lines(tmp_path)[-1] == {"event": "evaluation", "step": 2, "accuracy": 0.5}


def test_an_event_right_after_a_resume_stands_at_the_step_resumed_from(tmp_path):
    metrics = logged(tmp_path, [])
    metrics.truncate(3)
    metrics.log_event("evaluation", {"accuracy": 0.5})
    assert lines(tmp_path) == [{"event": "evaluation", "step": 2, "accuracy": 0.5}]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    logged(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    logged(tmp_path, []).truncate(3)
    assert lines(tmp_path) == [{"step": 1, "reward": 0.1}]


def test_truncate_at_0_starts_afresh_and_needs_no_file(tmp_path):
    Metrics(tmp_path, rank=0, total_steps=10).truncate(0)
    logged(tmp_path, []).log_event("evaluation", {"accuracy": 0.1})
    Metrics(tmp_path, rank=0, total_steps=10).truncate(0)
    assert lines(tmp_path) == []


def test_an_event_before_the_first_step_stands_at_step_0(tmp_path):
    logged(tmp_path, []).log_event("evaluation", {"accuracy": 0.1})
    assert lines(tmp_path) == [{"event": "evaluation", "step": 0, "accuracy": 0.1}]


def test_an_event_may_name_its_own_step(tmp_path):
    logged(tmp_path, [1]).log_event("evaluation", {"step": 7, "accuracy": 0.1})
    assert lines(tmp_path)[-1]["step"] == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_null_in_the_file_and_named_on_the_console(tmp_path, capsys, value):
    metrics = logged(tmp_path, [], show=("loss",))
    metrics.log(1, {"loss": value})
    metrics.log_event("evaluation", {"by_task": {"sound": [value]}, "accuracy": value})
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[1]["by_task"] == {"sound": [None]}
    out = capsys.readouterr().out
    assert f"loss {value}" in out and f"accuracy {value}" in out


def test_tensors_and_ints_are_logged_as_floats(tmp_path):
    metrics = logged(tmp_path, [])
    metrics.log(1, {"tokens": 3, "loss": torch.tensor(0.5)})
    assert lines(tmp_path) == [{"step": 1, "tokens": 3.0, "loss": 0.5}]


def test_the_console_line_has_bar_values_pace_and_time_left(tmp_path, capsys, clock):
    metrics = Metrics(tmp_path, rank=0, total_steps=200, show=("reward", "kl", "loss"))
    for step in range(1, 101):
        clock.seconds += 1.5
        metrics.log(step, {"loss": -0.01, "reward": 0.6123, "hidden": 1.0})
    metrics.close()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 100/200 [#####.....]  reward 0.612  loss -0.01  1.5 s/step  left 2:30"


def test_the_pace_forgets_the_first_slow_step(tmp_path, capsys, clock):
    metrics = Metrics(tmp_path, rank=0, total_steps=100)
    clock.seconds = 500.0
    for step in range(1, 101):
        clock.seconds += 2.0
        metrics.log(step, {})
    assert "  2 s/step  left 0:00" in capsys.readouterr().out.splitlines()[-1]


def test_a_console_that_is_no_terminal_gets_a_line_every_few_seconds_and_the_last(tmp_path, capsys, clock):
    metrics = Metrics(tmp_path, rank=0, total_steps=100)
    for step in range(1, 101):
        clock.seconds += 1.0
        metrics.log(step, {})
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [*range(1, 100, 5), 100]


def test_a_run_that_stops_early_still_prints_its_last_step(tmp_path, capsys, clock):
    metrics = logged(tmp_path, [1, 2, 3])
    metrics.close()
    metrics.close()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/10", "3/10"]


def test_an_event_prints_its_numbers_after_the_step_it_belongs_to(tmp_path, capsys, clock):
    metrics = logged(tmp_path, [1, 2])
    metrics.log_event("evaluation", {"accuracy": 0.25, "examples": 1000, "note": "x", "done": True})
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("step 2/10")
    assert out[2] == "evaluation at step 2  accuracy 0.25  examples 1000"


def test_a_terminal_gets_one_updating_line_cut_to_its_width(tmp_path, monkeypatch, clock):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "30")
    metrics = logged(tmp_path, [1, 2], show=("reward",))
    metrics.log_event("evaluation", {"accuracy": 0.5})
    metrics.log(3, {})
    metrics.close()
    first, second, third = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == "step 1/10 [#.........]  rewar"
    assert second.split("\n")[1:] == ["evaluation at step 2  accuracy 0.5", ""]
    assert third.startswith("step 3/10") and third.endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (151, "2:31"), (3599.4, "59:59"), (3600, "1:00:00"), (1e6, "277:46:40")],
)
def test_time_left_is_minutes_or_hours(seconds, text, tmp_path, clock, capsys):
    metrics = Metrics(tmp_path, rank=0, total_steps=2)
    clock.seconds += seconds
    metrics.log(1, {})
    assert capsys.readouterr().out.endswith(f"  left {text}\n")


@pytest.mark.parametrize(
    ("value", "text"), [(0.00312, "0.00312"), (1e-6, "1e-06"), (999.4, "999"), (12345.6, "12346"), (1e9, "1e+09")]
)
def test_numbers_are_short(value, text, tmp_path, capsys):
    Metrics(tmp_path, rank=0, total_steps=2, show=("loss",)).log(1, {"loss": value})
    assert f"  loss {text}  " in capsys.readouterr().out


def test_tensorboard_gets_steps_and_events_where_it_is_installed(tmp_path, no_tensorboard, board):
    metrics = logged(tmp_path, [])
    metrics.truncate(3)
    metrics.log(3, {"reward": 0.5})
    metrics.log_event("evaluation", {"accuracy": 0.25, "note": "x"})
    metrics.close()
    assert board == [3, ("reward", 0.5, 3), ("evaluation/accuracy", 0.25, 3), "closed"]


WORLD = World(0, 1, torch.device("cpu"))


def test_reduce_sums_of_one_process_is_a_copy():
    values = {"b": 2, "a": 1.0}
    assert reduce_sums(values, WORLD) == {"a": 1.0, "b": 2.0}
    assert reduce_sums({}, WORLD) == {}


def _reduce_on_rank(world: World, out: str) -> None:
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **options: calls.append(tensor.dtype) or all_reduce(tensor, **options)
    # The ranks name their values in different orders; 1 + 2**-40 is lost in float32.
    mine = [{"reward": 1.0, "count": 2.0**-40}, {"count": 1.0, "reward": 10.0}][world.rank]
    result = {"sums": reduce_sums(mine, world), "float64_calls": [dtype == torch.float64 for dtype in calls]}
    result["largest"] = reduce_max(7 - 2 * world.rank, world)
    try:
        reduce_sums({["loss", "kl"][world.rank]: 1.0}, world)
    except ValueError as error:
        result["error"] = str(error)
    with open(f"{out}{world.rank}", "w") as file:
        json.dump(result, file)


def test_reduce_sums_over_two_ranks_is_one_exact_call_that_checks_the_names(tmp_path):
    on_ranks(2, _reduce_on_rank, str(tmp_path / "out"))
    for rank, name in enumerate(["loss", "kl"]):
        result = json.loads((tmp_path / f"out{rank}").read_text())
        assert result["sums"] == {"count": 1.0 + 2.0**-40, "reward": 11.0}
        assert result["float64_calls"] == [True]
        assert result["largest"] == 7
        assert f"this one passed {name}" in result["error"]


def test_the_pace_leaves_out_what_came_before_the_first_step(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 100.0, 103.0])  # made, started, one step done
    monkeypatch.setattr("hark.grpo.instruments.metrics.time.monotonic", lambda: next(clock))
    metrics = Metrics(tmp_path, rank=0, total_steps=2)
    metrics.truncate(0)
    metrics.log(1, {})
    assert "3 s/step" in capsys.readouterr().out
