"""grpo.metrics: every step stands once in the file, only rank 0 writes, and sums over ranks are exact."""

import errno
import json
import math
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hark.grpo.instruments.console import Completion
from hark.grpo.instruments.log_file import LogError
from hark.grpo.instruments.metrics import Metrics
from hark.grpo.runtime.collectives import World, reduce_max, reduce_sums
from tests.ranks import on_ranks


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
    metrics.show_completions(2, [Completion("q", "Which?", "rain", {}, 1.0, 0.0)])
    metrics.close()
    assert metrics.step == 2
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


def test_a_damaged_line_is_dropped_and_a_text_with_line_separators_is_kept_as_it_was(tmp_path):
    logged(tmp_path, [1]).log_event("note", {"text": "rain\u2028snow"})
    (tmp_path / "completions.jsonl").write_bytes(
        '{"step": 1, "text": "a\u2028b"}\n'.encode() + b'{"step": 1, "\xff": 0}\n'
    )
    logged(tmp_path, []).truncate(2)
    assert lines(tmp_path)[1]["text"] == "rain\u2028snow"
    assert (tmp_path / "completions.jsonl").read_text() == '{"step": 1, "text": "a\u2028b"}\n'


def test_steps_whose_lines_are_lost_are_named_at_a_resume(tmp_path, capsys):
    """Lines that a crash of the machine lost, one that is damaged, and an event of its step, which is no line of it."""
    logged(tmp_path, [1, 2, 5, 7]).log_event("evaluation", {"step": 3, "accuracy": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"step": 2', '"step"; 2'))
    capsys.readouterr()
    logged(tmp_path, []).truncate(8)
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path}/metrics.jsonl has no line of step 2 to 4, 6: ")
    logged(tmp_path / "whole", [1, 2]).truncate(3)
    assert "warning" not in capsys.readouterr().out
    logged(tmp_path / "sparse", range(1, 42, 2)).truncate(42)
    assert "step 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, ...: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.open("w").truncate(2**31)])
def test_a_pipe_or_a_hole_of_gigabytes_in_place_of_a_log_is_an_error_at_once(put, name, tmp_path):
    put(tmp_path / name)
    with pytest.raises(LogError, match=f"{name}: not a file of at most 1024 MB; expected the log of a run"):
        Metrics(tmp_path, rank=0, total_steps=10).truncate(3)


class FullDisk:
    """A file that takes a few bytes of what is written, and then has no room; it may be switched off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.full, opened = True, Path.open

        def limited(path: Path, mode: str = "r", **options):
            file = opened(path, mode, **options)
            if "a" in mode and self.full:
                write = file.write
                file = SimpleNamespace(
                    write=lambda data: (write(data[:7]), file.close(), self.fail()), close=file.close
                )
                return closing(file)
            return file

        monkeypatch.setattr(Path, "open", limited)

    def fail(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_that_a_full_disk_refuses_are_kept_until_there_is_room(tmp_path, capsys, monkeypatch):
    metrics = logged(tmp_path, [1], required=False)
    disk = FullDisk(monkeypatch)
    for step in (2, 3):
        metrics.log(step, {"reward": step / 10})
    assert lines(tmp_path) == [{"step": 1, "reward": 0.1}], "no part of a line"
    metrics.sync()
    disk.full = False
    metrics.log(4, {"reward": 0.4})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    disk.full = True
    metrics.log(5, {"reward": 0.5})
    metrics.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.rpartition("; ")[2] for line in warnings] == [
        "its lines are kept until they can be (checkpoint.required=false)",
        "its lines are kept until they can be (checkpoint.required=false)",
        "lines that are lost: 1",
    ]


def test_a_line_that_a_full_disk_refuses_ends_the_run_and_leaves_no_part(tmp_path, monkeypatch):
    metrics = logged(tmp_path, [1])
    FullDisk(monkeypatch)
    with pytest.raises(LogError, match=r"metrics.jsonl cannot be written \(No space left on device\); make room"):
        metrics.log(2, {"reward": 0.2})
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
