"""MMAR (Ma et al., 2025): MMAR-meta.json, an array, or MMAR-meta.jsonl.

Confirmed by MMAR-meta.jsonl in ddlBoJack/MMAR: all keys below. An answer that is none of the choices is kept as text,
and graded by its words as in MMAR's script.
"""

from hark.data.sources.answers import benchmark_answer
from hark.data.sources.rows import Question, label, text, texts


def question(row: dict) -> Question:
    """The question of a row; its modality (sound, music, speech and their mixes) is the task."""
    choices = texts(row, "choices")
    return Question(
        id=text(row, "id"),
        clips=(text(row, "audio_path"),),
        text=text(row, "question"),
        choices=choices,
        answer=benchmark_answer(text(row, "answer"), choices),
        task=label(row, "modality"),
        category=label(row, "category"),
        sub_category=label(row, "sub-category", "subcategory", "sub_category"),
    )
