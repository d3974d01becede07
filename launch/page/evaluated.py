"""The evaluation of a run on data.test: its figures, and each question with its clip and its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hark import UserError
from hark.data.clip import Clip
from hark.data.described import asked, described
from hark.data.examples import Example, load_questions
from hark.launch.common.evaluation_file import CONTROLS
from hark.launch.page.numbers import rounded
from hark.launch.page.sounds import Sounds

COLUMNS = ("task", "category", "prediction", "correct", "stopped", "confidence")


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation, without its rows and its configuration."""
    return rounded({name: value for name, value in evaluation.items() if name not in ("rows", "config")})


def rows_part(evaluation: dict[str, Any], sounds: Sounds, *, base: Path, limit: int) -> dict[str, Any]:
    """The first `limit` rows, each with its question; without the questions if their file cannot be read."""
    examples, problem = _questions((evaluation.get("config") or {}).get("data", {}), base)
    rows = [_row(row, examples.get(row["id"]), sounds, base) for row in evaluation["rows"][:limit]]
    return {"rows": rows, "total": len(evaluation["rows"]), "problem": problem}


def _questions(data: dict[str, Any], base: Path) -> tuple[dict[str, Example], str]:
    """The questions of data.test by id, and what is wrong with its file."""
    file, root = data.get("test"), data.get("audio_root")
    if not file:
        return {}, "the evaluation does not say which file it is of"
    try:
        questions = load_questions(
            file if ":" in file else base / file,
            audio_root=root and base / root,
            columns=data.get("columns") or {},
            require_audio=False,
            skip_bad=True,
            benchmark=True,
            allow_outside=data.get("allow_outside") is True,
        )
    except (UserError, OSError) as error:
        return {}, str(error)
    return {one.id: one for one in questions if isinstance(one, Example)}, ""


def _row(row: dict[str, Any], example: Example | None, sounds: Sounds, base: Path) -> dict[str, Any]:
    question = asked(described(example)["row"] if example else {"id": row["id"]})
    clips: tuple[Clip, ...] = example.clips if example else ()
    controls = {name: row[name] for name in CONTROLS if name in row}
    answers = {name: {"text": one["prediction"], "right": one["correct"]} for name, one in controls.items()}
    columns = {name: row.get(name) for name in COLUMNS}
    return rounded(question | columns | {"answers": answers, "clips": [sounds.add(clip, base) for clip in clips]})
