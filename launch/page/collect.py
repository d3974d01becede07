"""Collects what runs have written, as parts: one that is always needed, and others that are read when opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hark.data.errors import DataError
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.instruments.record import RecordError, place_of, read_step, recorded_steps
from hark.launch.common.evaluation_file import NAME as EVALUATION
from hark.launch.common.evaluation_file import read_evaluation
from hark.launch.common.plain_yaml import read_options
from hark.launch.common.trained import check_run
from hark.launch.page.curves import curves, warnings
from hark.launch.page.evaluated import figures, rows_part
from hark.launch.page.recorded import step_part
from hark.launch.page.sounds import Sounds

FORMAT = 1  # of the JSON
NAME = re.compile(r"(step|rows)-(\d{1,4})(?:-(\d{1,9}))?")  # of a part of a run


@dataclass(frozen=True)
class Bounds:
    """How much a page holds: recorded steps of a run, questions of a step, clips, questions of an evaluation."""

    steps: int = 50
    groups: int = 4
    clips: int = 150
    questions: int = 1000


class Collection:
    """The parts of a page about some runs."""

    def __init__(self, runs: Sequence[Path], bounds: Bounds):
        for run in runs:
            check_run(run)
        self._runs, self._bounds = list(runs), bounds
        self._names = short_names(self._runs)
        self._sounds = Sounds()

    def main(self) -> dict[str, Any]:
        """The part that is always needed: curves, figures and configurations of the runs."""
        runs = [self._run(number) for number in range(len(self._runs))]
        return {
            "format": FORMAT,
            "live": False,
            "runs": runs,
            "differences": differences([_configuration(run) for run in self._runs]),
            "left_out": [],
        }

    def part(self, name: str) -> dict[str, Any] | None:
        """A part by its name; None if there is no such part. A part names the clips that it needs, which are parts."""
        if name in self._sounds:
            return self._sounds.part(name)
        match = NAME.fullmatch(name)
        if not match or int(match[2]) >= len(self._runs):
            return None
        run = self._runs[int(match[2])]
        return self._rows(run) if match[1] == "rows" else self._step(run, int(match[3] or 0))

    def steps_of(self, run: Path) -> list[int]:
        """The recorded steps of a run that the page shows: evenly spread, the first and the last among them."""
        return spread(recorded_steps(run), self._bounds.steps)

    def _run(self, number: int) -> dict[str, Any]:
        run = self._runs[number]
        lines, evaluation, options = read_metrics(run), _evaluation(run), _configuration(run)
        steps = options.get("optim.steps")
        return {
            "name": self._names[number],
            "directory": str(run),
            **curves(lines),
            "total": steps if isinstance(steps, int) else None,
            "warnings": warnings(lines, str(options.get("model.dtype", "float32"))),
            "recorded": [_recorded(run, number, step) for step in self.steps_of(run)],
            "recorded_in_all": len(recorded_steps(run)),
            "evaluation": evaluation and figures(evaluation) | {"part": f"rows-{number}", "version": _changed(run)},
        }

    def _rows(self, run: Path) -> dict[str, Any] | None:
        evaluation = _evaluation(run)
        return evaluation and rows_part(evaluation, self._sounds, base=base_of(run), limit=self._bounds.questions)

    def _step(self, run: Path, step: int) -> dict[str, Any] | None:
        if step not in recorded_steps(run):
            return None
        try:
            return step_part(read_step(run, step), self._sounds, base=base_of(run), groups=self._bounds.groups)
        except (RecordError, DataError) as error:
            return {"step": step, "problem": str(error)}


def all_parts(collection: Collection, bounds: Bounds) -> tuple[dict[str, Any], dict[str, Any]]:
    """The main part, which also says what was left out, and all other parts by name."""
    main = collection.main()
    runs = main["runs"]
    names = [one["part"] for run in runs for one in run["recorded"]]
    names += [run["evaluation"]["part"] for run in runs if run["evaluation"]]
    parts = {name: part for name in names if (part := collection.part(name))}
    mentioned = clips_of(parts)
    sounds = {name: collection.part(name) for name in mentioned[: bounds.clips]}
    main["left_out"] = list(_left_out(runs, parts, len(mentioned), bounds))
    return main, parts | sounds


def clips_of(parts: dict[str, Any]) -> list[str]:
    """The names of all clips that the parts mention: the first of each part, then the second of each, and so on."""
    mentioned = [list(_mentioned(part)) for part in parts.values()]
    return list(dict.fromkeys(name for turn in zip_longest(*mentioned) for name in turn if name))


def _mentioned(part: dict[str, Any]) -> Iterator[str]:
    for holder in part.get("groups", []) + part.get("rows", []):
        yield from (clip["part"] for clip in holder["clips"])


def _left_out(runs: list[dict], parts: dict[str, Any], clips: int, bounds: Bounds) -> Iterator[str]:
    """A sentence for each bound that was reached."""
    for run in runs:
        if run["recorded_in_all"] > len(run["recorded"]):
            yield f"{run['name']}: {len(run['recorded'])} of {run['recorded_in_all']} recorded steps are here (--steps)"
    questions = max((part["questions"] for part in parts.values() if "groups" in part), default=0)
    if questions > bounds.groups:
        yield f"{bounds.groups} of {questions} questions of a recorded step are here (--groups)"
    asked = max((part["total"] for part in parts.values() if "rows" in part), default=0)
    if asked > bounds.questions:
        yield f"of an evaluation with {asked} questions the first {bounds.questions} are here (--questions)"
    if clips > bounds.clips:
        yield f"{bounds.clips} of {clips} clips can be heard here (--clips)"


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, the last one among them and, if there are two, the first."""
    if len(steps) <= count:
        return list(steps)
    last = len(steps) - 1
    return [steps[last - (last * n) // max(count - 1, 1)] for n in range(count)][::-1]


def short_names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the runs' paths: as many as tell them apart."""
    paths = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def differences(configurations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The options in which configurations differ, apart from their directories, each with all values."""
    names = dict.fromkeys(name for one in configurations for name in one if name != "run.directory")
    values = {name: [one.get(name) for one in configurations] for name in names}
    return [{"name": name, "values": found} for name, found in values.items() if any(one != found[0] for one in found)]


def base_of(run: Path) -> Path:
    """The directory in which a run was started, if the run still lies there as its configuration says; else the
    current one."""
    named = Path(str(_configuration(run).get("run.directory", "")))
    full = run.resolve()
    if not named.is_absolute() and named.parts and full.parts[-len(named.parts) :] == named.parts:
        return Path(*full.parts[: -len(named.parts)])
    return Path()


def _configuration(run: Path) -> dict[str, Any]:
    """The options of a run by name, "section.key"."""
    sections = read_options(run / "config.yaml")
    return {f"{section}.{key}": value for section, options in sections.items() for key, value in options.items()}


def _recorded(run: Path, number: int, step: int) -> dict[str, Any]:
    """A recorded step of a run: its part, and a version that changes when another rank has written its own."""
    return {"step": step, "part": f"step-{number}-{step}", "version": len(list(place_of(run, step).glob("rank-*")))}


def _evaluation(run: Path) -> dict[str, Any] | None:
    """The evaluation of a run; None if there is none, or if it is broken or just being written."""
    try:
        return read_evaluation(run / EVALUATION)
    except DataError:
        return None


def _changed(run: Path) -> int:
    return (run / EVALUATION).stat().st_mtime_ns // 1_000_000
