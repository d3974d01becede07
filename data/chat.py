"""A prompt as turns of a conversation, with marks in the texts where the clips stand."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from hark.data.errors import DataError

AUDIO = "<audio>"  # in the text of a turn: a clip stands here


class Turn(NamedTuple):
    """What one role says: "system", "user" or "assistant"."""

    role: str
    text: str


Chat: TypeAlias = str | Sequence[Turn]  # a text alone is one turn of the user


def messages(chat: Chat, clips: int) -> list[dict]:
    """The turns in the chat format of transformers, with one {"type": "audio"} for each of the clips.

    Without a mark the clips come first in the last turn. A turn without a clip keeps its text as one string. Raises
    DataError if there are marks, but not one for each clip.
    """
    turns = [Turn("user", chat)] if isinstance(chat, str) else list(chat)
    marks = sum(turn.text.count(AUDIO) for turn in turns)
    if clips and not marks:
        turns[-1] = Turn(turns[-1].role, AUDIO * clips + turns[-1].text)
    elif clips and marks != clips:
        raise DataError(f"{marks} marks {AUDIO} in the texts for {clips} clips; expected one for each clip, or none")
    return [{"role": turn.role, "content": _content(turn.text) if clips else turn.text} for turn in turns]


def _content(text: str) -> str | list[dict]:
    first, *rest = text.split(AUDIO)
    if not rest:
        return text
    parts = [{"type": "text", "text": first}]
    for part in rest:
        parts += [{"type": "audio", "audio": ""}, {"type": "text", "text": part}]
    return [part for part in parts if part.get("text") != ""]
