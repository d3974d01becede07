"""A handful of audio questions on disk: enough to train on, small enough for a test."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import soundfile

HOSTILE = "\x1b[2J\x1b]0;gone\x07\u202e\n" + "x" * 10_000  # as a name: steers a terminal, breaks the line, is long
WORDS = ("rain", "a bell", "a dog", "wind")


def waveform(seconds: float, seed: int) -> np.ndarray:
    """Noise through a slow envelope: unlike its neighbour frames everywhere, the last one included."""
    noise = np.random.default_rng(seed).normal(size=round(16_000 * seconds))
    return (0.1 * noise * (1.2 + np.sin(np.arange(len(noise)) / 900))).astype(np.float32)


def write_questions(directory: Path, count: int, *, name: str = "train", **changes: dict) -> Path:
    """Write `count` clips of 0.3 s and more with questions; `changes` maps "lineN" to keys to replace in line N."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        soundfile.write(directory / f"{name}-{n}.wav", waveform(0.3 + 0.07 * n, n), 16_000)
        record = {
            "id": f"{name}-{n}",
            "audio_path": f"{name}-{n}.wav",
            "question_text": "What do you hear?" if n % 2 else "What is making this sound, and how often?",
            "multi_choice": list(WORDS),
            "answer": n % len(WORDS),
            "dataset_name": "test",
            "task": "sound",
        }
        lines.append(json.dumps(record | changes.get(f"line{n + 1}", {})))
    path = directory / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def grown_by(work):
    """The bytes by which the largest size of this process grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
