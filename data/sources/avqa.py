"""AVQA (Yang et al., ACM Multimedia 2022): train_qa.json, val_qa.json; the questions that R1-AQA trains on.

Confirmed by the README of R1-AQA: the keys below, `answer` as an index, and a clip named "-HG3Omg_89c_30.wav" for the
`video_name` "-HG3Omg_89c_000030"; AVQA's own repository names it "-HG3Omg_89c_000030.wav". Both names are looked for.
"""

import re

from hark.data.sources.rows import Question, label, text, texts, value

# Not "coloratura", which is heard.
COLOUR = re.compile(r"\bcolou?r(?:s|ed|ful|ing)?\b", re.IGNORECASE)


def question(row: dict) -> Question:
    """A row as a question; "video" in its text becomes "audio", as R1-AQA has it."""
    name = text(row, "video_name")
    return Question(
        id=text(row, "id"),
        clips=_clip_names(name),
        text=heard(text(row, "question_text")),
        choices=texts(row, "multi_choice"),
        answer=value(row, "answer"),
        category=label(row, "question_type"),
        sub_category=label(row, "question_relation"),
    )


def is_visual(row: dict) -> bool:
    """Whether the answer has to be seen: a question about the View (others are about Sound or Both), or a colour."""
    return label(row, "question_relation") == "View" or COLOUR.search(label(row, "question_text")) is not None


def heard(question: str) -> str:
    """The question asked of a listener."""
    for video, audio in (("video", "audio"), ("Video", "Audio"), ("VIDEO", "AUDIO")):
        question = question.replace(video, audio)
    return question


def _clip_names(name: str) -> tuple[str, ...]:
    stem, _, start = name.rpartition("_")
    return (name, f"{stem}_{int(start)}") if stem and re.fullmatch(r"[0-9]+", start) else (name,)
