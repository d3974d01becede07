"""AudioMCQ (He et al., ICLR 2026): JSON lines, also AudioMCQ-StrongAC-GeminiCoT's data.jsonl.

Confirmed by the card of inclusionAI/AudioMCQ and by NeMo-RL's reader of the subset: `source_dataset`, `id`,
`question_type`, `audio_path` relative to the data set's directory, `question`, `choices`, `answer` as the text of a
choice. Not confirmed: that rows have `audio-contribution` (weak or strong), and that ids differ between source data
sets; the converter numbers repeated ids. The reasoning in the rows is ignored.
"""

from hark.data.sources.answers import find_answer, unlabelled
from hark.data.sources.rows import Question, label, text, texts


def question(row: dict) -> Question:
    """The question of a row; its type (sound, music, speech, temporal) is the task, the clip's source the category."""
    choices = unlabelled(texts(row, "choices", "multi_choice"))
    return Question(
        id=text(row, "id"),
        clips=(text(row, "audio_path", "audio"),),
        text=text(row, "question"),
        choices=choices,
        answer=find_answer(text(row, "answer"), choices),
        task=label(row, "question_type"),
        category=label(row, "source_dataset"),
        sub_category=label(row, "audio-contribution", "audio_contribution"),
    )
