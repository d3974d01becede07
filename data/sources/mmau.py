"""MMAU (Sakshi et al., ICLR 2025): mmau-test-mini.json and mmau-test.json.

Confirmed by the files in Sakshi113/MMAU: all keys below, and the clip's path in `audio_id`. The answers to the 9,000
questions of the test are not public: `answer` is empty there, and null in the converted file.
"""

from hark.data.sources.answers import benchmark_answer
from hark.data.sources.rows import Question, label, text, texts


def question(row: dict) -> Question:
    """The question of a row; its choices are not changed."""
    choices, answer = texts(row, "choices"), label(row, "answer")
    return Question(
        id=text(row, "id"),
        clips=(text(row, "audio_id"),),
        text=text(row, "question"),
        choices=choices,
        answer=benchmark_answer(answer, choices),
        task=label(row, "task"),
        category=label(row, "category"),
        sub_category=label(row, "sub-category"),
        difficulty=label(row, "difficulty"),
    )
