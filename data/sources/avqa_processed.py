"""gijs/avqa-processed: AVQA with the options in the question ("...?\\nChoices:\\nA. 3\\nB. One"), "B. One" as answer.

Confirmed by NeMo-RL's reader of it: `question`, `answer`, `audio`, and by another trainer's: `file_name`. The data set
is published as Arrow files with the audio inside: write it out as JSON lines and audio files first, for instance with
the datasets library. It has no `id` that is known of: without one, a question is called by its clip.
"""

from pathlib import PurePath

from hark.data.sources.answers import find_answer, split_options
from hark.data.sources.avqa import heard
from hark.data.sources.rows import Question, label, text


def question(row: dict) -> Question:
    """A row as a question; "video" in its text becomes "audio", as in AVQA."""
    audio = row.get("audio")
    clip = text({**row, **audio} if isinstance(audio, dict) else row, "file_name", "audio_path", "path", "audio")
    asked, choices = split_options(text(row, "question"))
    return Question(
        id=label(row, "id") or PurePath(clip).stem,
        clips=(clip,),
        text=heard(asked),
        choices=choices,
        answer=find_answer(text(row, "answer"), choices),
    )
