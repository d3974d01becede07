"""How equal the work of ranks is: prompts dealt by their expected length, beside consecutive ones for each rank.

    python launch/studies/dealing.py [--shape qwen2-audio-7b] [--prompts 16] [--steps 1000] [--tokens 40]

Clips of 1 to 30 s and texts of 20 to 100 tokens, uniform; a text has 3 to 5 letters per token, and the deal knows only
its letters. Work is the multiply-adds of grpo/instruments/flops.py, and every completion has the same length. The first
two columns are the work of the slowest rank relative to the mean of the ranks. In the last two, ranks wait for one
another after each micro-batch of one prompt, the longest first, as those of a sharded model do.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import torch

from hark.data.order import dealt, expected_tokens
from hark.grpo.instruments.flops import cost_of, macs
from hark.launch.common.entry import run
from hark.launch.plan import SHAPES
from hark.models.loading import build_from_config
from hark.models.policy import Audio, Policy, Prompt
from hark.shown import say

RANKS = (2, 4, 8)
GROUP = 8
SECONDS, TEXT, LETTERS = (1.0, 30.0), (20, 100), (3.0, 5.0)
AUDIO_ID, TEXT_ID = 0, 1

Deal = Callable[[Sequence[float], int], list[list[int]]]


def main(argv: list[str]) -> None:
    options = parse(argv)
    from transformers import AutoConfig

    policy = build_from_config(AutoConfig.for_model(**SHAPES[options.shape]), None)
    steps = drawn(policy, options)
    say(f"{options.prompts} prompts per step, {options.steps} steps, {GROUP} completions of {options.tokens} tokens")
    say(f"{'ranks':>5}  {'consecutive':>11}  {'dealt':>7}  {'in turn: consecutive':>20}  {'dealt':>7}")
    for ranks in RANKS:
        means = [
            torch.tensor([excess(deal(lengths, ranks), work) for lengths, work in steps]).mean(dim=0)
            for deal in (consecutive, dealt)
        ]
        (whole, turns), (dealt_whole, dealt_turns) = (mean.tolist() for mean in means)
        say(f"{ranks:5}  {whole:11.3f}  {dealt_whole:7.3f}  {turns:20.3f}  {dealt_turns:7.3f}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-audio-7b", help="the model")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step, a multiple of 8")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=40, help="of each completion")
    return parser.parse_args(argv)


def drawn(policy: Policy, options: argparse.Namespace) -> list[tuple[list[float], list[int]]]:
    """For each step the expected tokens of its prompts, and their multiply-adds."""
    cost, numbers = cost_of(policy), random.Random(0)
    lengths = torch.full((GROUP,), options.tokens)

    def prompt() -> tuple[float, int]:
        seconds, text = numbers.uniform(*SECONDS), numbers.randint(*TEXT)
        frames = round(100 * seconds)
        audio = policy.audio_tokens(frames)
        clip = Audio(torch.empty(0), frames, audio)
        ids = torch.tensor([AUDIO_ID] * audio + [TEXT_ID] * text)
        work = macs(cost, [Prompt(ids, (clip,))], lengths, audio_id=AUDIO_ID).step()
        return expected_tokens(seconds, round(text * numbers.uniform(*LETTERS))), work

    steps = [[prompt() for _ in range(options.prompts)] for _ in range(options.steps)]
    return [([length for length, _ in step], [work for _, work in step]) for step in steps]


def consecutive(lengths: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of as many prompts in a row."""
    size = len(lengths) // ranks
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(ranks)]


def excess(deal: list[list[int]], work: Sequence[int]) -> tuple[float, float]:
    """The step of the slowest rank, and the step in which ranks wait after each prompt, relative to the mean rank."""
    own = [sorted((work[index] for index in indices), reverse=True) for indices in deal]
    mean = sum(work) / len(deal)
    return max(map(sum, own)) / mean, sum(map(max, zip(*own, strict=True))) / mean


if __name__ == "__main__":
    run(main)
