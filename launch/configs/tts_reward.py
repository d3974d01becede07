"""What the recipe `tts` gives to the reward `artefact`: codec tokens as a waveform, and what a Whisper hears in it.

tts.yaml names its functions `decode` and `intelligible`. The directories are relative to the working directory. Copy
and change the file for another codec or recogniser.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from hark.data.examples import Example
from hark.data.rewards.transcript import error_rate, spoken
from hark.models.codec import Codec, load_codec
from hark.models.codec_tokens import CODEC_TOKEN, code_ids

TTS = "runs/tts"  # of `python -m hark.launch.build_tts runs/tts`: codec and model
WHISPER = "runs/tts/whisper"  # a Hugging Face directory, such as whisper-tiny.en
MOST_TOKENS = 30  # that the recogniser may write


def decode(ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """The waveform (samples,) of the codec tokens of a completion, and its sample rate in Hz."""
    codec, code_of = _codec()
    return codec.decode([code_of[token] for token in ids if token in code_of]).numpy(), codec.settings.sample_rate


def intelligible(waveform: np.ndarray, rate: int, example: Example) -> float:
    """1 - tanh(3 WER) of what is heard, as the CosyVoice2 recipe of verl has it; 0 without a sample.

    The question of the example is the text that was to be said.
    """
    if not len(waveform):
        return 0.0
    said, found = (spoken(text).split() for text in (example.question, heard(waveform, rate)))
    return 1 - math.tanh(3 * error_rate(said, found))


@torch.no_grad()
def heard(waveform: np.ndarray, rate: int) -> str:
    """What the Whisper writes down."""
    extractor, tokenizer, model = _recogniser()
    features = extractor(waveform, sampling_rate=rate, return_tensors="pt").input_features
    (ids,) = model.generate(features, max_new_tokens=MOST_TOKENS)
    return tokenizer.decode(ids, skip_special_tokens=True)


@cache
def _codec() -> tuple[Codec, dict[int, int]]:
    """The codec, and the code of each codec token."""
    ids = code_ids(AutoTokenizer.from_pretrained(f"{TTS}/model", trust_remote_code=False), CODEC_TOKEN)
    return load_codec(f"{TTS}/codec"), {token: code for code, token in enumerate(ids)}


@cache
def _recogniser() -> tuple[Any, Any, Any]:
    model = WhisperForConditionalGeneration.from_pretrained(WHISPER, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(WHISPER, trust_remote_code=False)
    return WhisperFeatureExtractor.from_pretrained(WHISPER), tokenizer, model
