"""The longest clip and the longest text of a configuration's questions, for predictions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hark.data.clip import Clip
from hark.data.clips import clips_in
from hark.data.decoding import read_header, seconds_of
from hark.data.errors import AudioError
from hark.data.examples import Example, joined, load_examples
from hark.data.loader import CANDIDATES
from hark.data.parallel import in_threads
from hark.data.prompts import render, text_of
from hark.grpo.config import Config
from hark.launch.common.questions import weighted
from hark.models.loading import load_tokenizer
from hark.models.policy import PolicyError, text_ids

TEXT = 60  # tokens of a prompt without its audio, where there is no data
CHAT = 25  # tokens that a chat template adds to a text
LETTERS = 3  # per token, where the tokenizer cannot be loaded; English texts have more


def lengths(config: Config, options: argparse.Namespace) -> tuple[float, int, str]:
    """Seconds of the longest clip and tokens of the longest text, and where they come from; flags come first."""
    seconds, text = options.seconds, options.text
    path, examples = (None, []) if seconds and text else planned_examples(config)
    sources = ["--seconds" if seconds else "", "--text" if text else ""]
    if seconds is None:
        found = longest_clip(examples, config)
        seconds, sources[0] = (found, f"{path}") if found else (config.data.max_seconds, "data.max_seconds")
    if text is None:
        text, sources[1] = (longest_text(examples, config), f"{path}") if examples else (TEXT, "assumed")
    if sources[0] == sources[1]:
        return seconds, text, f"the longest of {path}"
    clip, words = (f"the longest of {source}" if source == path else source for source in sources)
    return seconds, text, f"clips: {clip}; texts: {words}"


def planned_examples(config: Config) -> tuple[str | None, list[Example]]:
    """The first of data.train and data.test that is there, and its examples."""
    named = [weighted(files)[0] for files in (config.data.train, config.data.test) if files]
    files = next((files for files in named if all(Path(file).exists() for file in files)), None)
    if files is None:
        return None, []
    data = config.data
    read = partial(load_examples, audio_root=data.audio_root, columns=data.columns, allow_outside=data.allow_outside)
    found = [read(file, require_audio=False, skip_bad=True, benchmark=True)[0] for file in files]
    return ", ".join(files), joined(found)


def longest_clip(examples: Sequence[Example], config: Config) -> float | None:
    """The length that the headers of the clips of an example give; None if no header can be read.

    A clip counts at most data.max_seconds, and the clips of an example are added up.
    """

    def seconds(clip: Clip) -> float:
        try:
            return seconds_of(clip, read_header(clip)) or 0.0
        except AudioError:  # training says what is wrong with it
            return 0.0

    clips = clips_in(examples)
    found = dict(zip(clips, in_threads(seconds, clips, workers=os.cpu_count() or 1), strict=True))
    own = [[min(found[clip], config.data.max_seconds) for clip in example.clips] for example in examples]
    return max(map(sum, own), default=0.0) or None


def longest_text(examples: Sequence[Example], config: Config) -> int:
    """Tokens of the longest text with its chat template, estimated from its letters if there is no tokenizer."""
    texts = sorted({text_of(render(example, config.data.template)) for example in examples}, key=len)
    try:
        tokenizer = load_tokenizer(config.model.path)
    except PolicyError:
        return CHAT + -(-len(texts[-1]) // LETTERS)
    return CHAT + max(len(text_ids(tokenizer, text)) for text in texts[-CANDIDATES:])
