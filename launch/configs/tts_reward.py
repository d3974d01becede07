"""The reward of the recipe `tts`: codec tokens as a waveform, what a Whisper hears in it, and how far that is off.

tts.yaml names its function `intelligible`; paths are relative to the working directory. Copy and change it for another
codec or recogniser.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from hark.data.examples import Example
from hark.data.rewards import Group
from hark.models.codec import Codec, load_codec

CODEC = "runs/tts/codec"  # of `python -m hark.launch.build_tts runs/tts`
WHISPER = "runs/tts/whisper"  # a Hugging Face directory, such as whisper-tiny.en
CODE = re.compile(r"<\|s_(\d+)\|>")
MOST_TOKENS = 30  # that the recogniser may write


def intelligible(group: Group) -> list[float]:
    """1 - tanh(3 WER) of what is heard, as the CosyVoice2 recipe of verl has it; 0 without a code."""
    codes = [[int(code) for code in CODE.findall(text)] for text in group.texts]
    return [score(group.example, decode(one)) if one else 0.0 for one in codes]


def decode(codes: Sequence[int]) -> np.ndarray:
    """The waveform (samples,) of codes."""
    return _codec().decode(codes).numpy()


def score(example: Example, waveform: np.ndarray) -> float:
    """1 - tanh(3 WER) of what the recogniser hears, where the question is the text that was to be said."""
    return 1 - math.tanh(3 * word_error_rate(example.question, heard(waveform)))


@torch.no_grad()
def heard(waveform: np.ndarray) -> str:
    """What the Whisper writes down."""
    extractor, tokenizer, model = _recogniser()
    features = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
    (ids,) = model.generate(features, max_new_tokens=MOST_TOKENS)
    return tokenizer.decode(ids, skip_special_tokens=True)


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Insertions, deletions and substitutions of words per word of the reference, without case and punctuation."""
    expected, found = (re.sub(r"[^\w\s']", "", text.lower()).split() for text in (reference, hypothesis))
    costs = list(range(len(found) + 1))
    for row, word in enumerate(expected, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(found, 1):
            before, costs[column] = (
                costs[column],
                min(costs[column] + 1, costs[column - 1] + 1, before + (word != other)),
            )
    return costs[-1] / max(len(expected), 1)


@cache
def _codec() -> Codec:
    return load_codec(CODEC)


@cache
def _recogniser() -> tuple[Any, Any, Any]:
    model = WhisperForConditionalGeneration.from_pretrained(WHISPER).eval()
    return WhisperFeatureExtractor.from_pretrained(WHISPER), AutoTokenizer.from_pretrained(WHISPER), model
