"""An example as JSON, for the records of a run: its row, as a file of questions holds it, and its clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
