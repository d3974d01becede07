"""An example as JSON, for the records of a run: its row, as a file of questions holds it, and its clips."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hark.data.clip import Cell
from hark.data.examples import Example, parse_example

OWN = ("task", "category", "sub_category", "difficulty", "pass_rate", "target")
FIELDS = {"dataset_name": "dataset"} | {name: name for name in OWN}


def described(example: Example) -> dict[str, Any]:
    """The row of an example, the line where it was read, and where its clips are.

    Its choices are in the order in which they were asked.
    """
    digests = example.digests or ("",) * len(example.clips)
    clips = [
        {"source": str(clip.source), "start": clip.start, "end": clip.end, "sha256": digest}
        for clip, digest in zip(example.clips, digests, strict=True)
    ]
    return {"row": _row(example), "line": example.line, "clips": clips}


def example_of(record: dict[str, Any]) -> Example:
    """The example that `described` wrote, without its clips; enough for rewards."""
    row = {key: value for key, value in record["row"].items() if not key.startswith("audio_path")}
    return parse_example(row, root=Path(), line=record["line"], require_audio=False, benchmark=True)


def row_in(example: Example, root: Path) -> dict[str, Any]:
    """The row of a file of questions from which this example is read; its relative paths are relative to `root`."""
    row, clips = _row(example), example.clips
    row.pop("audio_paths", None)
    lists: dict[str, list[Any]] = {"audio_path": [_path_from(root, clip.source) for clip in clips]}
    if any(clip.is_window for clip in clips):
        lists |= {"start": [clip.start for clip in clips], "end": [clip.end for clip in clips]}
    if len(clips) == 1:
        return row | {key: values[0] for key, values in lists.items()}
    return row | ({"audio_paths": lists.pop("audio_path")} | lists if clips else {})


def _path_from(root: Path, source: Path | Cell) -> str:
    return os.path.relpath(source, root) if isinstance(source, Path) and not source.is_absolute() else str(source)


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """What a described row says: its id, question and choices, the index of the right one, and the right answers."""
    choices: list[Any] = row.get("multi_choice") or []
    answer: Any = row.get("answer")
    is_index = isinstance(answer, int) and 0 <= answer < len(choices)
    accepted = [choices[answer]] if is_index else answer if isinstance(answer, list) else [answer]
    return {
        "id": row.get("id", ""),
        "question": row.get("question_text", ""),
        "choices": choices,
        "right": answer if is_index else None,
        "accepted": [str(one) for one in accepted if one is not None],
    }


def _row(example: Example) -> dict[str, Any]:
    values: dict[str, Any] = {"id": example.id, "question_text": example.question}
    if example.clips:
        values["audio_paths"] = [str(clip.source) for clip in example.clips]
    if example.choices:
        values["multi_choice"] = list(example.choices)
    values["answer"] = (list(example.accepted) or None) if example.answer is None else example.answer
    if example.system:
        values["system"] = example.system
    if example.messages:
        values["messages"] = [{"role": turn.role, "content": turn.text} for turn in example.messages]
    others = {key: getattr(example, name) for key, name in FIELDS.items() if getattr(example, name) not in ("", None)}
    return _plain(dict(example.extra)) | values | others


def _plain(extra: dict[str, Any]) -> dict[str, Any]:
    """Further keys of a row; a value that JSON cannot hold, such as bytes of a table, as text."""
    return json.loads(json.dumps(extra, default=str))
