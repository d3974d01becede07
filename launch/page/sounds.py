"""Clips for the page: each once, as an encoded sound and a small spectrogram."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.errors import AudioError
from hark.data.features import log_mel

RATE = 16_000  # Hz, of the sounds on the page
MAX_SECONDS = 30.0  # of a clip that the page plays; a longer one is cut
MELS, MAX_FRAMES = 48, 200  # of a spectrogram
FORMATS = (("MP3", "audio/mpeg"), ("FLAC", "audio/flac"))  # the first that this build of libsndfile can write


class Sounds:
    """The clips that a page mentions, by the names of their parts, such as "clip-1f0c..."."""

    def __init__(self) -> None:
        self._clips: dict[str, Clip] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._clips

    def add(self, clip: Clip, base: Path) -> dict[str, str]:
        """What a part says about a clip: the name of the clip's own part, and where the clip is, seen from `base`."""
        name = f"clip-{hashlib.sha256(clip.key.encode()).hexdigest()[:16]}"
        self._clips[name] = clip
        return {"part": name, "source": str(clip).removeprefix(f"{base}/")}

    def part(self, name: str) -> dict[str, Any]:
        """The sound and the spectrogram of a clip; for one that cannot be decoded what is wrong with it."""
        try:
            waveform = load_waveform(self._clips[name], sample_rate=RATE, max_seconds=MAX_SECONDS, long_clips="crop")
        except AudioError as error:
            return {"problem": str(error)}
        return {"seconds": round(len(waveform) / RATE, 3), "sound": encoded(waveform)} | spectrogram(waveform)


def clip_of(record: dict[str, Any], base: Path) -> Clip:
    """The clip that a recorded step names; a relative path is one below `base`, where the run was started."""
    source = base / record["source"]
    return Clip(source, record.get("start") or 0.0, record.get("end"))


def encoded(waveform: np.ndarray) -> str:
    """A waveform as a data URI of a compressed sound."""
    kind, mime = next(pair for pair in FORMATS if pair[0] in soundfile.available_formats())
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), RATE, format=kind)
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spectrogram(waveform: np.ndarray) -> dict[str, Any]:
    """The log-mel of a waveform, averaged to at most MAX_FRAMES columns: one byte per value, rows from low to high."""
    mel = log_mel(waveform, n_mels=MELS)
    frames = min(mel.shape[1], MAX_FRAMES)
    pooled = torch.nn.functional.adaptive_avg_pool1d(mel[None], frames)[0]
    low, high = pooled.min(), pooled.max()
    levels = ((pooled - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8)
    return {"mels": MELS, "frames": frames, "levels": base64.b64encode(levels.numpy().tobytes()).decode()}
