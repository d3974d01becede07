"""Speech by espeak-ng, called through ctypes in the library that the package espeakng-loader contains."""

import ctypes
import shutil
import tempfile
from typing import Any

import numpy as np

from hark.data.mini.clips import resampled, trimmed

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples are passed to a callback before espeak_Synth returns
UTF8 = 1
RATE, PITCH = 1, 3  # espeak_PARAMETER
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# Voice variants for training, and those of the test split. None has "breath", whose noise cannot be seeded.
VOICES = (
    ("m1", "m2", "m3", "m4", "m7", "Mario", "travis", "Denis", "f1", "Annie", "Andrea", "belinda", "anika", "aunty"),
    ("m5", "m6", "m8", "f4", "steph", "grandma"),
)


class Speaker:
    """A newly loaded espeak-ng; ImportError or OSError where it cannot be loaded.

    The library keeps state between utterances (the phase of its flutter) that no call resets: the same text gives other
    samples the second time. Each Speaker therefore loads its own copy of the library, so that its samples depend only
    on what it has spoken before.
    """

    def __init__(self):
        import espeakng_loader

        with tempfile.TemporaryDirectory() as directory:
            self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), directory))
        self._sample_rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self._sample_rate <= 0:
            raise OSError(f"espeak_Initialize returned {self._sample_rate}, expected a sample rate in Hz")
        self._chunks: list[np.ndarray] = []
        self._callback = CALLBACK(self._collect)  # kept, because ctypes frees a callback without a reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, wave: Any, length: int, _events: Any) -> int:
        if wave and length > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (length,)).copy())
        return 0

    def speak(self, text: str, language: str, voice: str, *, rate: int = 175, pitch: int = 50) -> np.ndarray:
        """The waveform of a text in a language ("en-us", "fr", ...); rate in words per minute, pitch 0 to 99."""
        name = f"{language}+{voice}"
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")
        self._library.espeak_SetParameter(RATE, rate, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._chunks.clear()
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, UTF8, None, None)
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng did not speak {text!r} as {name}: status {status}")
        return trimmed(resampled(np.concatenate(self._chunks) / 32768, self._sample_rate))
