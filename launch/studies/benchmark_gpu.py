"""Compare a step of GRPO with the limits of a GPU and with the R1-AQA procedure (launch/studies/baseline.py).

    python launch/studies/benchmark_gpu.py [--model qwen2-audio-7b|small] [--dtype bfloat16|float32]
                                           [--attention auto|sdpa|flex] [--compile] [--shape A|B|both]
                                           [--prompts 8 32] [--group 8] [--new-tokens 24] [--micro-batch N]
                                           [--repeat 3] [--json FILE]

Random weights of Qwen2-Audio-7B's shape, 8.4 billion, are created on the device and never written to a file. The policy
and the reference have separate weights; the baseline computes with the same tensors as they do. Clips last 10 s (shape
A) or 30 s (shape B). For each shape and number of prompts it reports:

    completions/s  of a whole step: rollout, reference, forward and backward, and AdamW's update if it fits in memory
    peak           peak memory of a step up to its gradients, the weights of both models included, AdamW's moments not
    decode         time of one decode step, relative to reading the weights it needs once, at the rate of a large copy
    matmul         necessary multiply-adds of forward and backward per second, relative to the best measured matmul rate

The update is the same work on both sides and is timed once. The baseline generates for 4 prompts at a time and scores
the group of one prompt at a time, because it computes each prompt G times and needs the memory for that. If the numbers
of the two sides differ by more than the rounding of the dtype explains, the program fails. The program has not been run
on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from hark.grpo.attention_check import chosen_attention
from hark.grpo.config import ConfigError
from hark.grpo.instruments.flops import Cost, best_matmul_rate, cost_of, fastest, macs
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.optimizer import build_optimizer, clip_gradients
from hark.grpo.recorded import recorded_steps
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.shards import allocate_moments
from hark.grpo.types import Rollout
from hark.launch.common.entry import run
from hark.launch.studies.baseline import Baseline
from hark.launch.studies.sides import (
    SECONDS,
    BaselineSide,
    HarkSide,
    Size,
    Work,
    machine,
    medians,
    model_config,
    silence,
    timed,
    timed_passes,
)
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B, Qwen2AudioPolicy
from hark.models.loading import build_from_config, meta_parameters
from hark.models.policy import Audio, Policy, Prompt
from hark.models.whisper import CONV_REACH, audio_tokens

TARGETS = dict(decode_over_weights=1.5, matmul_share=0.45)
TEXT = 60  # tokens of a prompt beside its audio
MICRO_BATCH = {"A": 4, "B": 2}  # what fits a GPU of 80 GB with both models, by grpo/instruments/memory.py
GENERATED = 4  # prompts for which the baseline generates at a time
COPIED = {"cuda": 4 * 2**30, "cpu": 2**24}  # bytes of the copy that measures the memory rate
# Bounds of the mean absolute difference of a logprob, and of the relative difference of a gradient by norm. In bfloat16
# a logprob of -12 is rounded to 1/16, and the output of a layer to 1/256 of its size. With 16 layers on the CPU this
# gives 0.02 and 0.04. A wrong mask, under which completions attend to one another, gives 0.4 and more than 1.
BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.2)}
# The compared gradients: those of the first layers, which depend on the whole backward pass. Queries and keys are left
# out, because their gradients are not larger than rounding.
COMPARED = ("layers.0.mlp.down_proj.weight", "layers.0.self_attn.o_proj.weight", "audio_tower.conv1.weight")


@dataclass(frozen=True)
class Setting:
    """The model, the device and the dtype of a study."""

    config: Callable[[], Any]  # makes a new transformers config; each model needs its own because it changes it
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"
    compiled: bool = False
    repeat: int = 3


class Models:
    """The policy, the reference and the models of the baseline, and the rates that the device reaches."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.policy, self.frozen = random_policy(setting, seed=0), random_policy(setting, seed=0)
        self.frozen.requires_grad_(False)
        self.theirs, self.their_frozen = plain_model(setting, self.policy), plain_model(setting, self.frozen)
        self.their_frozen.requires_grad_(False)
        self.recorded = recorded_steps(self.policy, wanted=True)
        self.matmul_rate = best_matmul_rate(setting.device, setting.dtype)
        self.copy_rate = copy_rate(setting.device)


class DeviceHarkSide(HarkSide):
    """A step of Hark with the models of `Models`."""

    def __init__(self, models: Models, work: Work):
        self.work, self.policy, self.frozen = work, models.policy, models.frozen
        self.recorded = models.recorded
        self.prompts = random_prompts(models.policy, work)
        self.model = self.policy.model


class DeviceBaselineSide(BaselineSide):
    """A step of the R1-AQA procedure with the models of `Models`."""

    def __init__(self, models: Models, work: Work, prompts: Sequence[Prompt]):
        self.work = replace(work, micro_batch=1)
        audio_id, device = models.policy.audio_id, models.setting.device
        self.policy, self.frozen = (Baseline(m, None, audio_id) for m in (models.theirs, models.their_frozen))
        self.model = self.policy.model
        self.inputs = {name: tensor.to(device) for name, tensor in padded(models.policy, prompts).items()}

    def rollout(self) -> torch.Tensor:
        size, limit = self.work.group_size, self.work.new_tokens
        parts = [slice(first, first + GENERATED) for first in range(0, self.work.prompts, GENERATED)]
        rows = ({name: tensor[part] for name, tensor in self.inputs.items()} for part in parts)
        return torch.cat([self.policy.rollout(row, group_size=size, new_tokens=limit) for row in rows])


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    silence()
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device was found; launch/studies/benchmark.py measures on the CPU")
    configs = {"qwen2-audio-7b": large_config, "small": small_config}
    dtype = getattr(torch, arguments.dtype)
    chosen = arguments.attention, arguments.compile, arguments.repeat
    setting = Setting(configs[arguments.model], torch.device("cuda"), dtype, *chosen)
    results = []
    for result in study(setting, works_of(arguments)):
        results.append(result)
        print("\n".join(lines(result)), flush=True)
        if arguments.json:
            figures = {"machine": machine() | device_of(setting), "results": results}
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if unequal := [result for result in results if not result["equal"]]:
        print(
            f"the numbers differ in {len(unequal)} of {len(results)} cases: the speed-ups are not valid",
            file=sys.stderr,
        )
        raise SystemExit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("qwen2-audio-7b", "small"), default="qwen2-audio-7b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex"), default="auto", help="in scoring")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers of Hark's side")
    parser.add_argument("--shape", choices=("A", "B", "both"), default="both")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each completion")
    parser.add_argument("--micro-batch", type=int, help="prompts that Hark scores at a time (A: 4, B: 2)")
    parser.add_argument("--repeat", type=int, default=3, help="turns; their median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    arguments.shape = ["A", "B"] if arguments.shape == "both" else [arguments.shape]
    counts = *arguments.prompts, arguments.repeat, arguments.new_tokens, arguments.micro_batch or 1
    if min(counts) < 1:
        parser.error("prompts, repeat, micro-batch and new tokens must be at least 1")
    if arguments.group < 2:
        parser.error("--group must be at least 2")
    return arguments


def works_of(arguments: argparse.Namespace) -> list[tuple[str, Work]]:
    """The shape and the sizes of each step."""
    sizes = arguments.group, arguments.new_tokens
    batches = {shape: arguments.micro_batch or MICRO_BATCH[shape] for shape in arguments.shape}
    return [(s, Work(SECONDS[s], n, *sizes, micro)) for s, micro in batches.items() for n in arguments.prompts]


def large_config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**QWEN2_AUDIO_7B)


def small_config(size: Size | None = None) -> Any:
    size = size or Size()
    return model_config(size, audio_id=size.vocabulary - 1)


def study(setting: Setting, works: Sequence[tuple[str, Work]]) -> Iterator[dict[str, Any]]:
    """The figures of each work."""
    models = Models(setting)
    if setting.attention == "auto":
        choose_attention(models, works[0][1])
    update = update_seconds(models.policy)
    for shape, work in works:
        yield {"shape": shape, "prompts": work.prompts} | measure(models, work, update)


def choose_attention(models: Models, work: Work) -> None:
    """Give the models the attention that a run with model.attention=auto would choose for the sizes of the works."""
    world, sizes = World(0, 1, models.setting.device), dict(branches=work.group_size, max_new_tokens=work.new_tokens)
    choice, reason = chosen_attention(models.policy, world, **sizes, apart=[False])
    models.policy.attention = models.frozen.attention = choice
    print(f"attention: {choice}, because {reason}", flush=True)


def measure(models: Models, work: Work, update: float | None) -> dict[str, Any]:
    """Run the sides in turns on one work. A first turn, not timed, is the warm-up and measures the peak memory."""
    setting, hark = models.setting, DeviceHarkSide(models, work)
    sides: dict[str, Any] = {"baseline": DeviceBaselineSide(models, work, hark.prompts), "hark": hark}
    drawn, memory = hark.rollout(), {}
    for name, side in list(sides.items()):
        try:
            memory[name] = peak_bytes(setting.device, models, partial(timed_passes, side, drawn))
        except torch.OutOfMemoryError:
            if name == "hark":
                raise
            print(f"the baseline runs out of memory with {work.prompts} prompts: only Hark is measured", flush=True)
            del sides[name]
        drop_gradients(side)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(setting.repeat):
        outputs = {}
        for name, side in sides.items():
            phases, logprobs = timed_passes(side, drawn)
            turns[name].append(phases)
            outputs[name] = logprobs.float(), compared_gradients(side)
            drop_gradients(side)
    seconds = {name: medians(taken) for name, taken in turns.items()}
    for phases in seconds.values():
        phases |= {} if update is None else {"optimizer": update}
        phases["step"] = sum(phases.values())
    completions = work.prompts * work.group_size
    differences = compare(**outputs) if "baseline" in outputs else None
    return {
        "seconds": seconds,
        "completions_per_second": {name: completions / phases["step"] for name, phases in seconds.items()},
        "speedups": {p: seconds["baseline"][p] / s for p, s in seconds["hark"].items()} if differences else None,
        "memory_gib": {name: peak / 2**30 for name, peak in memory.items()},
        "moments_gib": 2 * sum(p.nbytes for p in models.policy.parameters() if p.requires_grad) / 2**30,
        "differences": differences,
        "equal": differences is None or all(d <= b for d, b in zip(differences, BOUNDS[setting.dtype], strict=True)),
        "prompt_tokens": len(hark.prompts[0].ids),
        "attention": models.policy.attention,
        "compiled": models.setting.compiled,
    } | limits(models, hark, drawn, seconds["hark"])


def limits(models: Models, hark: DeviceHarkSide, drawn: Rollout, seconds: dict[str, float]) -> dict[str, Any]:
    """Decoding and scoring relative to the limits of the device."""
    cost, itemsize = cost_of(hark.policy), models.setting.dtype.itemsize
    passes = macs(cost, hark.prompts, drawn.mask.sum(dim=1), audio_id=hark.policy.audio_id)
    step = decode_seconds(models, hark.work, seconds["rollout"])
    # A linear layer has as many weights as multiply-adds per token.
    weights = (cost.token + cost.head) * itemsize
    cache = cache_bytes(cost, hark.prompts, hark.work, itemsize)
    needed = passes.forward + passes.backward
    return {
        "decode_step_seconds": step,
        "decode_over_weights": step / (weights / models.copy_rate),
        "decode_over_weights_and_cache": step / ((weights + cache) / models.copy_rate),
        "matmul_share": needed / models.matmul_rate / seconds["score"],
        "limit_share": passes.step() / models.matmul_rate / seconds["step"],
        "weights_gib": weights / 2**30,
        "copied_gb_per_second": models.copy_rate / 1e9,
        "matmul_gmacs_per_second": models.matmul_rate / 1e9,
        "necessary_gmacs": passes.step() / 1e9,
    }


def decode_seconds(models: Models, work: Work, rollout: float) -> float:
    """Seconds of one decode step, from the difference between a rollout and one with half as many tokens.

    Prefill happens once in both and cancels out. The first call records its CUDA graphs.
    """
    tokens = max(work.new_tokens // 2, 1)
    half = DeviceHarkSide(models, replace(work, new_tokens=tokens))
    half.rollout()
    seconds = median(timed(models.setting.device, half.rollout)[0] for _ in range(models.setting.repeat))
    return (rollout - seconds) / max(work.new_tokens - tokens, 1)


def cache_bytes(cost: Cost, prompts: Sequence[Prompt], work: Work, itemsize: int) -> float:
    """Bytes of keys and values that a decode step reads on average: each prompt's once, and those of each branch."""
    tokens = sum(len(prompt.ids) for prompt in prompts) + len(prompts) * work.group_size * work.new_tokens / 2
    return tokens * cost.pair * len(cost.windows) * itemsize  # as many key and value numbers as multiply-adds per pair


def peak_bytes(device: torch.device, models: Models, function: Callable[[], Any]) -> int:
    """Peak bytes of all tensors during a call, weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    with MemoryTracker() as tracker:
        tracker.add([*models.policy.parameters(), *models.frozen.parameters()])
        function()
    return tracker.peak


def update_seconds(policy: Policy) -> float | None:
    """Seconds of gradient clipping and AdamW's step, or None if its moments do not fit in memory."""
    try:
        optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999))
        allocate_moments(optimizer)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return timed(policy.device, lambda: (clip_gradients(policy, 1.0), optimizer.step()))[0]
    except torch.OutOfMemoryError:
        print("AdamW's moments do not fit in memory: steps are measured without the update", flush=True)
        return None
    finally:
        policy.zero_grad()


def drop_gradients(side: Any) -> None:
    for parameter in side.model.parameters():
        parameter.grad = None


def compared_gradients(side: Any) -> list[torch.Tensor]:
    named = side.model.named_parameters()
    return [parameter.grad.float() for name, parameter in named if name.endswith(COMPARED)]


def compare(
    baseline: tuple[torch.Tensor, list[torch.Tensor]], hark: tuple[torch.Tensor, list[torch.Tensor]]
) -> tuple[float, float]:
    """The mean absolute difference of the logprobs, and the largest relative difference of a gradient tensor."""
    gradients = [((a - b).norm() / b.norm()).item() for a, b in zip(hark[1], baseline[1], strict=True)]
    return (hark[0] - baseline[0]).abs().mean().item(), max(gradients)


def copy_rate(device: torch.device, repeat: int = 5) -> float:
    """Bytes per second of a large copy on the device, reads and writes both counted."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / fastest(device, target.copy_, source, repeat=repeat)


def random_policy(setting: Setting, seed: int) -> Qwen2AudioPolicy:
    """A policy with random weights and without tokenizer; its completions always run to the token limit."""
    policy = build_from_config(setting.config())
    assert isinstance(policy, Qwen2AudioPolicy)
    policy.audio_id = policy.model.config.audio_token_id
    policy.suppressed_ids = (policy.audio_id,)
    policy.model.generation_config.eos_token_id = policy.audio_id  # never sampled
    policy.tokenizer = SimpleNamespace(pad_token_id=0)
    policy.device, policy.attention = setting.device, setting.attention
    if setting.compiled:
        policy.compile_layers()
    generator = torch.Generator(setting.device).manual_seed(seed)
    weights = {name: random_weight(name, p.shape, setting, generator) for name, p in policy.model.named_parameters()}
    take(policy.model, weights, setting.device)
    return policy


def random_weight(name: str, shape: torch.Size, setting: Setting, generator: torch.Generator) -> torch.Tensor:
    """Weights of norms 1, biases 0, all others normal with standard deviation 1 / sqrt(inputs).

    This keeps the variance of activations, so that attention weights are not uniform.
    """
    weight = torch.empty(shape, dtype=setting.dtype, device=setting.device)
    if len(shape) > 1:
        return weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    return weight.fill_(float(name.endswith("weight")))


def plain_model(setting: Setting, policy: Policy) -> Any:
    """Hugging Face's own model; its parameters share the storage of the policy's."""
    with meta_parameters():
        model = type(policy).build(setting.config())
    take(model, policy.model.state_dict(), setting.device)
    model.model.audio_tower.embed_positions.requires_grad_(False)  # as launch/studies/baseline.py loads it
    return model.eval()


def take(model: torch.nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Assign tensors to a model's parameters, and move its buffers to the device."""
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        module._buffers |= {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}


def random_prompts(policy: Qwen2AudioPolicy, work: Work) -> tuple[Prompt, ...]:
    """Prompts of TEXT random text tokens with the placeholders of a random clip among them."""
    generator = torch.Generator().manual_seed(0)
    audio = policy.model.config.audio_config
    frames, most = round(100 * work.seconds), 2 * audio.max_source_positions
    prompts = []
    for n in range(work.prompts):
        text = torch.randint(1, policy.audio_id, (TEXT,), generator=generator)
        tokens = audio_tokens(frames)
        placeholders = torch.full((tokens,), policy.audio_id)
        mel = torch.randn(audio.num_mel_bins, min(frames + CONV_REACH, most), generator=generator)
        clip = Audio(mel, frames, tokens, digest=str(n))
        prompts.append(Prompt(torch.cat([text[:10], placeholders, text[10:]]), (clip,)))
    return tuple(prompts)


def padded(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """The inputs that Hugging Face's processor would make of these prompts, all of one length: mel padded to 30 s."""
    ids = torch.stack([prompt.ids for prompt in prompts])
    most = 2 * policy.model.config.audio_config.max_source_positions
    clips = [clip for prompt in prompts for clip in prompt.clips]
    mel = torch.stack([torch.nn.functional.pad(c.features, (0, most - c.features.shape[1])) for c in clips])
    real = torch.arange(most) < torch.tensor([clip.frames for clip in clips])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": mel,
        "feature_attention_mask": real.long(),
    }


def device_of(setting: Setting) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "gpu": properties.name,
        "gpu_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "dtype": str(setting.dtype),
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The printed report on one work."""
    phases = [*result["seconds"]["hark"]]
    columns = "".join(f"{phase:>12}" for phase in phases)
    yield f"shape {result['shape']}, {result['prompts']} prompts of {result['prompt_tokens']} tokens"
    yield f"  {'':10}{columns}{'completions/s':>15}{'peak':>12}"
    for name, seconds in result["seconds"].items():
        cells = "".join(f"{seconds[phase]:10.3f} s" for phase in phases)
        rate, peak = result["completions_per_second"][name], result["memory_gib"][name]
        yield f"  {name:10}{cells}{rate:15.2f}{peak:8.1f} GiB"
    if result["speedups"]:
        yield f"  {'faster':10}" + "".join(f"{result['speedups'][phase]:10.2f} x" for phase in phases)
        logprob, gradient = result["differences"]
        verdict = "within the rounding of the dtype" if result["equal"] else "MORE THAN ROUNDING"
        yield f"  logprobs differ by {logprob:.1e}, gradients by {gradient:.1e}: {verdict}"
    over_weights, over_all = result["decode_over_weights"], result["decode_over_weights_and_cache"]
    yield (
        f"  decode     {1e3 * result['decode_step_seconds']:.2f} ms a step, {over_weights:.2f} x reading the weights "
        f"(target {TARGETS['decode_over_weights']}), {over_all:.2f} x reading keys and values too, at "
        f"{result['copied_gb_per_second']:.0f} GB/s"
    )
    yield (
        f"  matmul     forward and backward at {100 * result['matmul_share']:.0f} % (target "
        f"{100 * TARGETS['matmul_share']:.0f}) of {result['matmul_gmacs_per_second'] / 1e3:.2f} T multiply-adds/s; "
        f"the step at {100 * result['limit_share']:.0f} %"
    )
    yield f"  AdamW's moments take {result['moments_gib']:.1f} GiB more"


if __name__ == "__main__":
    run(main)
