"""Prepare text to speech: train a codec, write each clip as codec tokens, and give a language model these tokens.

    python -m hark.launch.build_tts DIRECTORY [--data FILE] [--text MODEL] [--codes 512]

FILE is a file of clips whose answers are what is said, as for speech recognition; without it, sentences of the demo
are read aloud by espeak-ng. MODEL is the Hugging Face directory of a language model; without it, the model is a small
one with random weights. Writes DIRECTORY/codec, DIRECTORY/data/train.jsonl, whose questions are the texts and whose
answers the codec tokens, and DIRECTORY/model. Of the demo's sentences, data/test.jsonl has those held out.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hark.data.audio import load_waveform
from hark.data.clips import Rules, clips_in, usable
from hark.data.examples import Example, load_examples
from hark.data.mini.sentences import build_sentences
from hark.launch.common.clips import decoded
from hark.launch.common.entry import run
from hark.launch.common.new_directory import check_new
from hark.models.codec import Codec, Settings, train_codec
from hark.models.codec_tokens import CODEC_TOKEN, add_codec
from hark.models.compose import language_model
from hark.models.loading import load_tokenizer
from hark.models.mini import SIZES, build_mini_speaker
from hark.shown import say

MAX_SECONDS = 30.0


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    out = arguments.directory
    check_new(out)
    files = {"train": arguments.data}
    if arguments.data is None:
        build_sentences(out / "speech")
        files = {split: out / "speech" / f"{split}.jsonl" for split in ("train", "test")}
    parts = {split: load_examples(file, allow_outside=arguments.allow_outside)[0] for split, file in files.items()}
    parts = {split: checked(examples) for split, examples in parts.items()}
    build_model(out / "model", [example.answer_text for example in parts["train"]], arguments.codes, arguments.text)
    codec = train_codec([_waveform(example) for example in parts["train"]], Settings(codes=arguments.codes))
    codec.save(out / "codec")
    for split, examples in parts.items():
        write_tokens(out / "data" / f"{split}.jsonl", examples, codec)
    say(f"wrote {out}: a codec of {arguments.codes} codes of {1000 * codec.seconds:.0f} ms, data and model")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIRECTORY", help="a new or empty directory")
    add("--data", type=Path, metavar="FILE", help="JSONL file of clips and what is said in them")
    add("--text", type=Path, metavar="MODEL", help="a language model to add the codec tokens to")
    add("--codes", type=int, default=Settings.codes, help="of the codec (%(default)s)")
    add("--allow-outside", action="store_true", help="accept clips outside of the directory of FILE")
    return parser.parse_args(argv)


def checked(examples: Sequence[Example]) -> list[Example]:
    """The examples whose clips can be used; the others are printed."""
    found = decoded(clips_in(examples), Rules(Settings.sample_rate, MAX_SECONDS), workers=os.cpu_count() or 1)
    good, bad = usable(examples, found, long_clips="error", skip_bad=True)
    for one in bad:
        say(f"left out: {one.line}: {one.reason}")
    return good


def write_tokens(path: Path, examples: Sequence[Example], codec: Codec) -> None:
    """One question per clip: the text to say, and the clip's codec tokens as the answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            tokens = "".join(map(CODEC_TOKEN.format, codec.encode(_waveform(example))))
            row = {"id": example.id, "question_text": example.answer_text, "answer": tokens}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_model(out: Path, texts: Sequence[str], codes: int, text: Path | None) -> None:
    """The language model of a directory with the codec tokens; without one, a small new model."""
    if text is None:
        return build_mini_speaker(out, texts, codes=codes, **SIZES["small"])
    model, tokenizer = language_model(text), load_tokenizer(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the new embeddings
        add_codec(model, tokenizer, codes)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _waveform(example: Example) -> torch.Tensor:
    (clip,) = example.clips
    return torch.from_numpy(load_waveform(clip, sample_rate=Settings.sample_rate, max_seconds=MAX_SECONDS))


if __name__ == "__main__":
    run(main)
