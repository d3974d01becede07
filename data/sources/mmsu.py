"""MMSU (Wang et al., 2025): question/mmsu.jsonl of ddwang2000/MMSU.

Confirmed by mmsu_inference.py in dingdongwang/MMSU: all keys below, and that `choice_c` and `choice_d` may be missing.
Confirmed by a published reader: that choices and answers may be numbers.
"""

from hark.data.sources.answers import benchmark_answer
from hark.data.sources.rows import Question, label, text


def question(row: dict) -> Question:
    """The question of a row; its `task_name` is one of 47, its category Perception or Reasoning."""
    choices = [text(row, "choice_a"), text(row, "choice_b")]
    choices += [text(row, key) for key in ("choice_c", "choice_d") if row.get(key) not in (None, "")]
    return Question(
        id=text(row, "id"),
        clips=(text(row, "audio_path"),),
        text=text(row, "question"),
        choices=choices,
        answer=benchmark_answer(text(row, "answer_gt"), choices),
        task=label(row, "task_name"),
        category=label(row, "category"),
        sub_category=label(row, "sub-category"),
    )
