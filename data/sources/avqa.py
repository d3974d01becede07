"""AVQA (Yang et al., ACM Multimedia 2022): train_qa.json, val_qa.json; the questions that R1-AQA trains on.

Confirmed by the README of R1-AQA: the keys below, `answer` as an index, and the clip "-HG3Omg_89c_30.wav" for the
`video_name` "-HG3Omg_89c_000030". In AVQA's own repository the clip is "-HG3Omg_89c_000030.wav". Both names are tried.
"""

import re

from hark.data.sources.rows import Question, label, text, texts, value

# Must not match "coloratura", a style of singing.
COLOUR = re.compile(r"\bcolou?r(?:s|ed|ful|ing)?\b", re.IGNORECASE)


def question(row: dict) -> Question:
    """The question of a row; "video" in its text is replaced by "audio", as in R1-AQA."""
    name = text(row, "video_name")
    return Question(
        id=text(row, "id"),
        clips=_clip_names(name),
        text=about_audio(text(row, "question_text")),
        choices=texts(row, "multi_choice"),
        answer=value(row, "answer"),
        category=label(row, "question_type"),
        sub_category=label(row, "question_relation"),
    )


def is_visual(row: dict) -> bool:
    """Whether the question is about the picture: its relation is View (not Sound or Both), or it names a colour."""
    return label(row, "question_relation") == "View" or COLOUR.search(label(row, "question_text")) is not None


def about_audio(question: str) -> str:
    """The question with "video" replaced by "audio"."""
    for video, audio in (("video", "audio"), ("Video", "Audio"), ("VIDEO", "AUDIO")):
        question = question.replace(video, audio)
    return question


def _clip_names(name: str) -> tuple[str, ...]:
    stem, _, start = name.rpartition("_")
    return (name, f"{stem}_{int(start)}") if stem and re.fullmatch(r"[0-9]+", start) else (name,)
