"""Measure a step of GRPO against the R1-AQA procedure (launch/studies/baseline.py), both in one run.

    python launch/studies/benchmark.py [--shape A|B|both] [--prompts 1 4] [--group 8] [--new-tokens 24] [--threads 1 2]
                               [--repeat 3] [--micro-batch 1] [--quick] [--json FILE]

A Qwen2-Audio of 42 M random float32 weights hears clips of 10 s (shape A) or 30 s (shape B). Baseline and Hark take
turns, and the medians over the turns are compared. Both have the same weights and score the same tokens; a difference
of more than 1e-4 in their numbers fails the run. --micro-batch is how many prompts are scored at a time, on both sides.
--quick: shape A, one prompt, one turn; under a minute.

Memory is the peak of the bytes of a side's live tensors in a step before those that are timed: weights, reference,
gradients and optimizer included, what kernels need for themselves not.

    python launch/studies/benchmark.py --device cuda [--model qwen2-audio-7b] [--dtype bfloat16] [--attention flex]
                               [--prompts 8 32] [--micro-batch 4] [--shape ...] [--repeat ...] [--json FILE]

is another study, of how near a GPU's limits a step is: launch/studies/benchmark_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hark.grpo.instruments.flops import best_matmul_rate, cost_of, macs
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.loss import policy_loss, token_weights
from hark.grpo.optimizer import build_optimizer, clip_gradients
from hark.grpo.runtime.sharding import gathered, release
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import Batch, Rollout
from hark.launch.common import run
from hark.launch.studies.baseline import Baseline, grpo_loss
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from hark.models.policy import Policy

SECONDS = {"A": 10.0, "B": 30.0}
TARGETS = {
    "A": dict(rollout_speedup=5.0, score_speedup=8.0, step_speedup=7.0, limit_share=0.5, memory_ratio=1 / 3),
    "B": dict(rollout_speedup=5.5, score_speedup=7.5, step_speedup=7.0, limit_share=0.5, memory_ratio=1 / 4),
}
PARITY = 1e-4
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": dict(prompts=[1, 4], micro_batch=1),
    "cuda": dict(prompts=[8, 32], micro_batch=4, model="qwen2-audio-7b", dtype="bfloat16", attention="sdpa"),
}
CLIP, BETA = 0.2, 0.04
QUESTION = "How often does the bell ring? Choose: ['once', 'twice']."


@dataclass(frozen=True)
class Size:
    """Sizes of the model; heads are 64 wide, and the proportions those of Qwen2-Audio-7B."""

    vocabulary: int = 8192
    hidden: int = 512
    inner: int = 1408
    layers: int = 8
    tower_hidden: int = 384
    tower_layers: int = 4


@dataclass(frozen=True)
class Work:
    """One step: prompts about clips of so many seconds, completions of each, and prompts scored at a time."""

    seconds: float
    prompts: int
    group_size: int
    new_tokens: int
    micro_batch: int = 1

    def waveforms(self) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        samples = round(16_000 * self.seconds)
        return [0.1 * random.standard_normal(samples, dtype=np.float32) for _ in range(self.prompts)]

    def advantages(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.randn(self.prompts * self.group_size, generator=torch.Generator().manual_seed(0)).to(device)

    def micro_batches(self) -> Iterator[tuple[slice, slice]]:
        """The prompts and the completions that are scored together."""
        for first in range(0, self.prompts, self.micro_batch):
            last = first + self.micro_batch
            yield slice(first, last), slice(first * self.group_size, last * self.group_size)


class HarkSide:
    """A step of this engine, phase by phase; with `shard` on all ranks, each doing the work."""

    graphs = False  # whether decode steps are recorded

    def __init__(self, directory: Path, work: Work, *, shard: Callable[[Policy], None] | None = None):
        self.work = work
        self.policy, self.frozen = (load_policy(directory, train=train, shard=shard) for train in (True, False))
        # The placeholder is never drawn, so with it as the only stop token every completion has all its tokens.
        self.policy.model.generation_config.eos_token_id = self.policy.audio_id
        self.prompts = tuple(self.policy.prepare(QUESTION, waveform) for waveform in work.waveforms())
        # At rate 0 an update costs the same, and every turn begins with the same weights.
        self.optimizer = build_optimizer(self.policy, weight_decay=0.0, betas=(0.9, 0.999))
        self.model, self.reference_model = self.policy.model, self.frozen.model

    def rollout(self) -> Rollout:
        keys = [(0, 0, n) for n in range(self.work.prompts)]
        sizes = dict(group_size=self.work.group_size, max_new_tokens=self.work.new_tokens)
        with gathered(self.policy):
            return sample(self.policy, self.prompts, temperature=1.0, keys=keys, graphs=self.graphs, **sizes)

    @torch.no_grad()
    def reference(self, drawn: Rollout) -> torch.Tensor:
        parts = [
            score(self.frozen, self.prompts[n], drawn.tokens[b], drawn.mask[b], group_size=self.work.group_size)[0]
            for n, b in self.work.micro_batches()
        ]
        release(self.frozen)
        return torch.cat(parts)

    def score(self, drawn: Rollout, ref_logprobs: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the logprobs (B, T)."""
        weights = token_weights(drawn.mask, kind="sequence-mean", completions=len(drawn.mask), tokens=0)
        batch = Batch(
            self.prompts, self.work.group_size, drawn.tokens, drawn.mask, weights, drawn.logprobs, ref_logprobs,
            self.work.advantages(drawn.mask.device),
        )  # fmt: skip
        logprobs = torch.zeros_like(drawn.logprobs)
        for groups in batch.split_by_length(self.work.micro_batch):
            logprobs[batch.rows(groups)] = self._accumulate(batch.select(groups))
        return logprobs

    def optimizer_step(self) -> None:
        clip_gradients(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _accumulate(self, micro: Batch) -> torch.Tensor:
        size = micro.group_size
        logprobs, _ = score(self.policy, micro.prompts, micro.tokens, micro.mask, group_size=size)
        ours = micro.old_logprobs, micro.ref_logprobs, micro.advantages, micro.weights
        policy_loss(logprobs, *ours, clip_low=CLIP, clip_high=CLIP, beta=BETA)[0].backward()
        return logprobs.detach()


class BaselineSide:
    """The same step as R1-AQA goes about it."""

    def __init__(self, directory: Path, work: Work):
        self.work = work
        self.policy, self.frozen = Baseline.load(directory), Baseline.load(directory)
        self.frozen.model.requires_grad_(False)
        self.inputs = self.policy.inputs([QUESTION] * work.prompts, work.waveforms())
        self.model, self.reference_model = self.policy.model, self.frozen.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def rollout(self) -> torch.Tensor:
        size, limit = self.work.group_size, self.work.new_tokens
        return self.policy.rollout(self.inputs, group_size=size, new_tokens=limit)

    @torch.no_grad()
    def reference(self, drawn: Rollout) -> torch.Tensor:
        return torch.cat([self._logprobs(self.frozen, drawn, *part) for part in self.work.micro_batches()])

    def score(self, drawn: Rollout, ref_logprobs: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the logprobs (B, T)."""
        advantages, parts = self.work.advantages(drawn.mask.device), []
        for n, b in self.work.micro_batches():
            logprobs = self._logprobs(self.policy, drawn, n, b)
            loss = grpo_loss(
                logprobs, logprobs.detach(), ref_logprobs[b], advantages[b], drawn.mask[b], clip=CLIP, beta=BETA
            )
            (loss * len(logprobs) / len(drawn.mask)).backward()
            parts.append(logprobs.detach())
        return torch.cat(parts)

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logprobs(self, baseline: Baseline, drawn: Rollout, n: slice, b: slice) -> torch.Tensor:
        inputs = {name: tensor[n] for name, tensor in self.inputs.items()}
        return baseline.logprobs(inputs, drawn.tokens[b], group_size=self.work.group_size)


SIDES: dict[str, Callable[[Path, Work], Any]] = {"baseline": BaselineSide, "hark": HarkSide}


def main(argv: list[str], size: Size | None = None) -> None:
    arguments = parse(argv)
    silence()
    if arguments.device == "cuda":
        from hark.launch.studies import benchmark_gpu  # which imports this file

        benchmark_gpu.main(arguments)
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_model(directory, size or Size())
        print(heading(), flush=True)
        for shape in arguments.shape:
            print(target_line(shape), flush=True)
            for prompts in arguments.prompts:
                sizes = arguments.group, arguments.new_tokens, arguments.micro_batch
                work = Work(SECONDS[shape], prompts, *sizes)
                for result in compare(directory, work, arguments.threads, arguments.repeat):
                    results.append({"shape": shape} | result)
                    print(result_line(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    worst = max(result["parity"] for result in results)
    if worst > PARITY:
        print(f"the numbers differ by {worst:.1e}, more than {PARITY:.0e}: no speed-up counts", file=sys.stderr)
        raise SystemExit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("A", "B", "both"), default="both")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--model", choices=("small", "qwen2-audio-7b"), help="with --device cuda: the 7B by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --device cuda: bfloat16 by default")
    parser.add_argument(
        "--attention", choices=("sdpa", "flex"), help="with --device cuda: of scored rows, sdpa by default"
    )
    parser.add_argument("--prompts", type=int, nargs="+", help="1 4; with --device cuda 8 32")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each completion")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3, help="turns, of which the median counts")
    parser.add_argument(
        "--micro-batch", type=int, help="prompts scored at a time: 1; with --device cuda 4, of Hark only"
    )
    parser.add_argument("--quick", action="store_true", help="shape A, one prompt, one turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    given = [f"--{name}" for name in ("model", "dtype", "attention") if getattr(arguments, name) is not None]
    if arguments.device == "cpu" and given:
        parser.error(f"{', '.join(given)} needs --device cuda; on the CPU a small model is measured in float32")
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.quick:
        threads = min(2, os.cpu_count() or 1)
        arguments.shape, arguments.prompts, arguments.threads, arguments.repeat = "A", [1], [threads], 1
    arguments.shape = ["A", "B"] if arguments.shape == "both" else [arguments.shape]
    if min(*arguments.prompts, *arguments.threads, arguments.repeat, arguments.micro_batch, arguments.new_tokens) < 1:
        parser.error("prompts, threads, repeat, micro-batch and new tokens must be at least 1")
    if arguments.group < 2:
        parser.error("--group must be at least 2")
    return arguments


def build_model(directory: Path, size: Size) -> None:
    """Write a Qwen2-Audio of a size with random weights, with the tokenizer and processor of the small one.

    The tokenizer has fewer tokens than the model; nothing that is drawn is read.
    """
    from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

    # So few merges are learnt that the question around the audio has about 60 tokens, as a real one has.
    build_mini(directory, [QUESTION], vocabulary=275, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    audio_id = AutoConfig.from_pretrained(directory).audio_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2AudioForConditionalGeneration(model_config(size, audio_id)).save_pretrained(directory)


def model_config(size: Size, audio_id: int):
    """The transformers config of a Qwen2-Audio of a size."""
    from transformers import Qwen2AudioConfig

    text = dict(
        model_type="qwen2", vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=4096, initializer_range=size.hidden**-0.5 / 2,
    )  # fmt: skip
    audio = dict(
        model_type="qwen2_audio_encoder", num_mel_bins=80, d_model=size.tower_hidden, encoder_layers=size.tower_layers,
        encoder_attention_heads=size.tower_hidden // 64, encoder_ffn_dim=4 * size.tower_hidden,
        initializer_range=size.tower_hidden**-0.5 / 2,
    )  # fmt: skip
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_id)


def compare(directory: Path, work: Work, threads: Sequence[int], repeat: int) -> Iterator[dict[str, Any]]:
    """The figures of one kind of step for each number of threads."""
    torch.set_num_threads(max(threads))
    sides = {name: make(directory, work) for name, make in SIDES.items()}
    drawn = sides["hark"].rollout()  # what both score
    memory = {name: peak_memory(side, drawn) for name, side in sides.items()}
    for count in threads:
        torch.set_num_threads(count)
        yield (
            {"prompts": work.prompts, "threads": count}
            | measure(sides, drawn, repeat)
            | {
                "memory_ratio": memory["hark"] / memory["baseline"],
                "memory_gib": {name: peak / 2**30 for name, peak in memory.items()},
                "work": asdict(work),
            }
        )


def peak_memory(side: Any, drawn: Rollout) -> int:
    """Bytes of tensors at the height of a step of a side, which is its warm-up too."""
    with MemoryTracker() as tracker:
        tracker.add([*side.model.parameters(), *side.reference_model.parameters()])
        for parameter in side.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        side.optimizer_step()  # AdamW's moments come with the first step
        side.rollout()
        side.score(drawn, side.reference(drawn))
        side.optimizer_step()
    return tracker.peak


def measure(sides: dict[str, Any], drawn: Rollout, repeat: int) -> dict[str, Any]:
    """Let the sides take turns, and compare the medians of their phases and their numbers."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    parity, rate = 0.0, 0.0
    for _ in range(repeat):
        rate = max(rate, best_matmul_rate())
        outputs = {name: timed_passes(side, drawn, turns[name]) for name, side in sides.items()}
        parity = max(parity, *differences(outputs, sides))
        for name, side in sides.items():
            finish_turn(side, turns[name])
    seconds = {name: medians(taken) for name, taken in turns.items()}
    speedups = {f"{phase}_speedup": seconds["baseline"][phase] / s for phase, s in seconds["hark"].items()}
    hark = sides["hark"]
    needed = macs(cost_of(hark.policy), hark.prompts, drawn.mask.sum(dim=1), audio_id=hark.policy.audio_id).step()
    return speedups | {
        "limit_share": needed / rate / seconds["hark"]["step"],
        "parity": parity,
        "seconds": seconds,
        "necessary_gmacs": needed / 1e9,
        "matmul_gmacs_per_second": rate / 1e9,
        "prompt_tokens": len(hark.prompts[0].ids),
    }


def timed_passes(side: Any, drawn: Rollout, turns: list[dict[str, float]]) -> torch.Tensor:
    """One turn up to the gradients, its times appended to `turns`; the policy's logprobs."""
    rollout, _ = timed(side.rollout)
    reference, ref_logprobs = timed(side.reference, drawn)
    seconds, logprobs = timed(side.score, drawn, ref_logprobs)
    turns.append({"rollout": rollout, "reference": reference, "score": seconds})
    return logprobs


def finish_turn(side: Any, turns: list[dict[str, float]]) -> None:
    """Make the step of a turn whose gradients are there, and add up its times."""
    turns[-1]["optimizer"] = timed(side.optimizer_step)[0]
    turns[-1]["step"] = sum(turns[-1].values())


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def differences(logprobs: dict[str, torch.Tensor], sides: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of a logprob, and of a gradient relative to the largest one of its tensor."""
    theirs = dict(sides["baseline"].model.named_parameters())
    gradients = []
    for name, parameter in sides["hark"].model.named_parameters():
        if parameter.requires_grad:
            expected = theirs[name].grad
            gradients.append(((parameter.grad - expected).abs().max() / expected.abs().max()).item())
    return (logprobs["hark"] - logprobs["baseline"]).abs().max().item(), max(gradients)


def silence() -> None:
    """Leave the console to the table."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def machine() -> dict[str, Any]:
    import transformers

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


COLUMNS = (
    ("rollout_speedup", "rollout", "{:.2f} x"),
    ("reference_speedup", "reference", "{:.2f} x"),
    ("score_speedup", "score", "{:.2f} x"),
    ("optimizer_speedup", "optimizer", "{:.2f} x"),
    ("step_speedup", "step", "{:.2f} x"),
    ("limit_share", "of limit", "{:.2f}"),
    ("memory_ratio", "memory", "{:.2f}"),
    ("parity", "parity", "{:.0e}"),
)


def heading() -> str:
    columns = "".join(f"{title:>11}" for _, title, _ in COLUMNS)
    return f"{'shape':7}{'prompts':>8}{'threads':>8}{'baseline':>10}{'hark':>9}{columns}"


def target_line(shape: str) -> str:
    cells = {name: form.format(TARGETS[shape][name]) for name, _, form in COLUMNS if name in TARGETS[shape]}
    return f"{shape:7}{'target':>35}" + "".join(f"{cells.get(name, ''):>11}" for name, _, _ in COLUMNS)


def result_line(result: dict[str, Any]) -> str:
    seconds = "".join(
        f"{result['seconds'][name]['step']:{width}.2f} s" for name, width in (("baseline", 8), ("hark", 7))
    )
    cells = "".join(f"{form.format(result[name]):>11}" for name, _, form in COLUMNS)
    return f"{result['shape']:7}{result['prompts']:8}{result['threads']:8}{seconds}{cells}"


if __name__ == "__main__":
    run(main)
