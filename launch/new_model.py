"""Write a small model with random weights for your own questions, with a tokenizer trained on their texts.

    python launch/new_model.py --data train.jsonl --out DIR [--size small] [--family qwen2_audio] [--tower-from WHISPER]

DIR becomes a Hugging Face checkpoint directory, to name in model.path. Prints its sizes, the longest prompt and answer
of the data, and the next commands. WHISPER is the directory of a Whisper checkpoint, such as whisper-tiny; its encoder
becomes the audio tower, which otherwise has random weights and the size that --size says.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hark.data.clips import Rules, clips_in, usable
from hark.data.examples import Example, load_examples
from hark.data.prompts import find_template, render, target, text_of, texts_of
from hark.grpo.config import DataConfig
from hark.launch.check_data import SAMPLE_RATE
from hark.launch.common.clips import decoded
from hark.launch.common.entry import run
from hark.launch.common.new_directory import check_new
from hark.models.loading import build_policy
from hark.models.mini import SIZES, build_mini, check_whisper
from hark.models.mini_families import FAMILIES
from hark.models.policy import Policy, completion_lengths
from hark.shown import say_text

MAX_NEW_TOKENS = 12  # rollout.max_new_tokens in the configurations that are named as the next ones


class Lengths(NamedTuple):
    """The longest prompt and answer of a data set, in tokens; the answer with its end token."""

    prompt: int
    audio: int  # of the prompt
    answer: int


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    template, out = arguments.template, arguments.out
    check_new(out)
    find_template(template)
    if arguments.tower_from is not None:
        check_whisper(arguments.tower_from)
    examples, _ = load_examples(arguments.data, allow_outside=arguments.allow_outside)
    examples_with_clips = measured(examples)
    family, tower = arguments.family, arguments.tower_from
    build_mini(out, texts_of(examples, template), family=family, tower_from=tower, **SIZES[arguments.size])
    policy = build_policy(out)
    lengths = longest(policy, examples_with_clips, template)
    say_text(report(policy, lengths, out))
    say_text(next_commands(out, arguments.data, template, lengths))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=size_table(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="JSONL file of the training questions")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    add("--size", choices=SIZES, default="small", help="of the decoder and the tower, see below (small)")
    add("--family", choices=FAMILIES, default="qwen2_audio", help="of docs/families.md (%(default)s)")
    add("--tower-from", type=Path, metavar="WHISPER", help="take the audio tower of this Whisper checkpoint")
    add("--template", default=DataConfig.template, metavar="NAME", help="as data.template (%(default)s)")
    add("--allow-outside", action="store_true", help="accept clips outside of the directory of FILE")
    return parser.parse_args(argv)


def size_table() -> str:
    lines = ["sizes:     layers and width of the decoder, of the tower; most tokens (small is the demo's)"]
    for name, size in SIZES.items():
        decoder, tower = (f"{size[f'{part}layers']} x {size[f'{part}hidden']}" for part in ("", "tower_"))
        lines.append(f"  {name:8} {decoder:9} {tower:9} {size['vocabulary']}")
    return "\n".join(lines)


def measured(examples: Sequence[Example]) -> list[Example]:
    """The examples whose clips can be used, with the lengths of the clips."""
    found = decoded(clips_in(examples), Rules(SAMPLE_RATE, DataConfig.max_seconds), workers=os.cpu_count() or 1)
    return usable(examples, found, long_clips=DataConfig.long_clips, skip_bad=True)[0]


def longest(policy: Policy, examples: Sequence[Example], template: str) -> Lengths:
    """The longest prompt and answer; lengths of clips are rounded to a token of audio to find it."""
    durations = [example.seconds or 0.0 for example in examples]
    texts = [text_of(render(example, template)) for example in examples]
    of_text = completion_lengths(policy.tokenizer, texts)
    index = max(range(len(texts)), key=lambda n: of_text[texts[n]] + round(25 * durations[n]))
    clips = len(examples[index].clips)
    silence = np.zeros(round(durations[index] / clips * SAMPLE_RATE), np.float32)
    ids = policy.prepare(render(examples[index], template), *[silence] * clips).ids
    answers = completion_lengths(
        policy.tokenizer, (target(example, template) for example in examples if example.has_answer)
    )
    return Lengths(len(ids), ids.tolist().count(policy.audio_id), max(answers.values(), default=0))


def report(policy: Policy, lengths: Lengths, out: Path) -> str:
    vocabulary = len(policy.tokenizer)
    assert policy.tower is not None  # a Qwen2-Audio
    tower, whole = (sum(p.numel() for p in module.parameters()) for module in (policy.tower, policy))
    return "\n".join(
        [
            f"wrote {out}: {whole / 1e6:.2f} M random parameters",
            f"  decoder and projector   {(whole - tower) / 1e6:.2f} M parameters",
            f"  audio tower             {tower / 1e6:.2f} M parameters",
            f"  vocabulary              {vocabulary} tokens",
            f"  longest prompt          {lengths.prompt} tokens, {lengths.audio} of them audio",
            f"  longest answer          {lengths.answer} tokens, the least for rollout.max_new_tokens",
        ]
    )


def next_commands(out: Path, data: Path, template: str, lengths: Lengths) -> str:
    """The warm start, without which a model of random weights never answers right, and then GRPO."""
    project = out.parent
    if all((project / name).exists() for name in ("sft.yaml", "train.yaml")):  # of `hark init`
        sft, grpo = [str(project / "sft.yaml"), f"model.path={out}"], [str(project / "train.yaml")]
        both: list[str] = []
    else:
        sft = ["mini_sft", f"model.path={out}", f"run.directory={project / 'warm'}"]
        grpo = ["mini", f"model.path={project / 'warm' / 'model'}", f"run.directory={project / 'grpo'}"]
        both = [f"data.train={data}", "data.validation=null", "data.test=null", "evaluation.every=0"]
    both += [f"rollout.max_new_tokens={lengths.answer}"] if lengths.answer > MAX_NEW_TOKENS else []
    both += [f"data.template={template}"] if template != DataConfig.template else []
    return "\n".join(
        [
            "next, the warm start, which teaches the form of an answer, and GRPO:",
            f"  hark sft {shlex.join([*sft, *both])}",
            f"  hark train {shlex.join([*grpo, *both])}",
        ]
    )


if __name__ == "__main__":
    run(main)
