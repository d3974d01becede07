"""English sentences of the demo, read aloud by espeak-ng: data for speech recognition and for text to speech."""

import json
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator, default_rng

from hark.data.mini import espeak
from hark.data.mini.clips import PEAK, SAMPLE_RATE, normalised
from hark.data.mini.speech import BEGINNINGS, ENDINGS

VOICE = "m1"
HELD_OUT = 5  # beginning n with ending n (mod 8) is only in the test split, for as many beginnings as there are


def build_sentences(directory: str | Path, *, seed: int = 0, train: int = 240, test: int = 15) -> None:
    """Write `directory/{train,test}.jsonl`, one sentence each line with its clip, 16 kHz mono, in `directory/audio`.

    The answer is the sentence, the question asks for it. Sentences combine a beginning with an ending; those of the
    test split are combinations that training does not have. Raises ImportError or OSError without espeak-ng.
    """
    directory, speaker = Path(directory), espeak.Speaker()
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    for number, (split, size) in enumerate({"train": train, "test": test}.items()):
        rng, chosen = default_rng([seed, number]), sentences()[split]
        lines = []
        for n in range(size):
            name, text = f"{split}-{n:04d}", chosen[n % len(chosen)]
            soundfile.write(directory / "audio" / f"{name}.wav", _spoken(speaker, text, rng), SAMPLE_RATE)
            row = {"id": name, "audio_path": f"audio/{name}.wav", "question_text": "What is said?", "answer": text}
            lines.append(json.dumps(row) + "\n")
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def sentences() -> dict[str, list[str]]:
    """The sentences of each split: those of the test split are no others' combination of beginning and ending."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for b, beginning in enumerate(BEGINNINGS["english"]):
        for e, ending in enumerate(ENDINGS["english"]):
            splits["test" if (b - e) % HELD_OUT == 0 else "train"].append(f"{beginning} {ending}")
    return splits


def _spoken(speaker: espeak.Speaker, text: str, rng: Generator) -> np.ndarray:
    rate, pitch = int(rng.integers(150, 180)), int(rng.integers(45, 55))
    return PEAK * normalised(speaker.speak(f"{text}.", "en-us", VOICE, rate=rate, pitch=pitch))
