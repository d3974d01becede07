"""gijs/avqa-processed: AVQA with the options in the question ("...?\\nChoices:\\nA. 3\\nB. One"), "B. One" as answer.

Confirmed by NeMo-RL's reader: `question`, `answer`, `audio`; by another trainer's reader: `file_name`. The data set is
published as Arrow files that contain the audio: write them out as JSON lines and audio files first, for instance with
the datasets library. No `id` is documented; a row without one gets the name of its clip as its id.
"""

from pathlib import PurePath

from hark.data.sources.answers import find_answer, split_options
from hark.data.sources.avqa import about_audio
from hark.data.sources.rows import Question, label, text


def question(row: dict) -> Question:
    """The question of a row; "video" in its text is replaced by "audio", as for AVQA."""
    audio = row.get("audio")
    clip = text({**row, **audio} if isinstance(audio, dict) else row, "file_name", "audio_path", "path", "audio")
    asked, choices = split_options(text(row, "question"))
    return Question(
        id=label(row, "id") or PurePath(clip).stem,
        clips=(clip,),
        text=about_audio(asked),
        choices=choices,
        answer=find_answer(text(row, "answer"), choices),
    )
