"""Turns and marks of clips, in the chat format of transformers."""

import pytest

from hark.data.chat import Turn, messages
from hark.data.errors import DataError

AUDIO, OTHER = {"type": "audio", "audio": ""}, {"type": "text", "text": "Which?"}


def test_a_text_is_one_turn_of_the_user():
    assert messages("Which?", 0) == [{"role": "user", "content": "Which?"}]


def test_clips_without_marks_come_first_in_the_last_turn():
    turns = [Turn("system", "Be brief."), Turn("user", "Hello."), Turn("assistant", "Yes?"), Turn("user", "Which?")]
    *before, last = messages(turns, 2)
    assert [turn["content"] for turn in before] == ["Be brief.", "Hello.", "Yes?"]
    assert last == {"role": "user", "content": [AUDIO, AUDIO, OTHER]}


def test_a_mark_says_where_its_clip_stands_in_any_turn():
    turns = [Turn("user", "First <audio>then <audio>"), Turn("assistant", "Yes?"), Turn("user", "<audio>Which?")]
    first, _, last = messages(turns, 3)
    texts = [{"type": "text", "text": text} for text in ("First ", "then ")]
    assert first["content"] == [texts[0], AUDIO, texts[1], AUDIO] and last["content"] == [AUDIO, OTHER]


def test_marks_that_are_not_as_many_as_clips_are_refused():
    with pytest.raises(DataError, match="1 marks <audio> in the texts for 2 clips; expected one for each clip"):
        messages("Which <audio>?", 2)


def test_a_text_without_clips_keeps_its_marks():
    assert messages("What does <audio> mean?", 0) == [{"role": "user", "content": "What does <audio> mean?"}]
