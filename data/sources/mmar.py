"""MMAR (Ma et al., 2025): MMAR-meta.json, an array, or MMAR-meta.jsonl.

Confirmed by the columns of copies on the hub and by published readers: all keys below. A few answers are none of the
choices; they stay as they are, to be judged as MMAR's script does.
"""

from hark.data.sources.answers import benchmark_answer
from hark.data.sources.rows import Question, label, text, texts


def question(row: dict) -> Question:
    """A row as a question: its modality (sound, music, speech and their mixes) is the task."""
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
