"""Conversations in the format of Audio Flamingo 3: AudioSkills-XL, AF-Think, and your own in the same format.

Confirmed by NVIDIA/audio-flamingo: an array of {id, sound, duration, conversations}, where a human asks
"<sound>\\nQuestion" and gpt answers; by its AF_Reasoning_Eval: options as "(A) one. (B) two." on one line or several,
answers as "(B) two", and "Output the answer with <SUMMARY>, ... tags." after the options; ids are names of clips, so
several rows may have the same id. Not confirmed: in which words each part of AF-Think concludes. A row whose
answer is not found, an open question, and a conversation with several questions or clips are left out and listed.
"""

import re
import reprlib

from hark.data.sources.answers import find_answer, split_options
from hark.data.sources.rows import Question, SourceError, text, value

TAG = re.compile(r"<(?:sound|speech|audio)>\s*")
INSTRUCTION = re.compile(r"\s*(?:Output the answer with <|Please think and reason about the input audio).*", re.DOTALL)
CONCLUSION = re.compile(r"<(CONCLUSION|answer)>(.*?)</\1>", re.DOTALL)


def question(row: dict) -> Question:
    """The question of a conversation with one question and one answer."""
    asked, reply = _turns(row)
    asked, choices = split_options(INSTRUCTION.sub("", TAG.sub("", asked)))
    sound = value(row, "sound")
    if isinstance(sound, list) and len(sound) != 1:
        raise SourceError("several clips", f'"sound" names {len(sound)} clips; expected one')
    return Question(
        id=text(row, "id"),
        clips=(text({"sound": sound[0] if isinstance(sound, list) else sound}, "sound"),),
        text=asked,
        choices=choices,
        answer=_answer(reply, choices),
    )


def _turns(row: dict) -> tuple[str, str]:
    turns = value(row, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SourceError(
            'wrong "conversations"', f'"conversations" is {reprlib.repr(turns)}; expected a list of turns'
        )
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise SourceError("not one question and one answer", f"has {len(turns)} turns; expected human, gpt")
    return text(turns[0], "value"), text(turns[1], "value")


def _answer(reply: str, choices: list[str]) -> int:
    """The choice that a reply names: by its conclusion or all of it, by its last line, or after "answer is"."""
    concluded = CONCLUSION.search(reply)
    reply = (concluded[2] if concluded else reply).strip()
    for part in (reply, reply.split("\n")[-1], reply.rpartition("answer is")[2]):
        try:
            return find_answer(part, choices)
        except SourceError as error:
            fault = error
    raise fault
