"""How near a GPU's limits a step is, and how far from the R1-AQA procedure: launch/studies/benchmark.py --device cuda.

Random weights of Qwen2-Audio-7B's shape, 8.4 billion, are made on the device and written nowhere. The policy and the
reference have each their own; the baseline computes with the same tensors. For each shape and number of prompts:

    completions/s  of a whole step: rollout, reference, forward and backward, and AdamW's update where it fits
    peak           most memory of a step up to its gradients, both models' weights included; AdamW's moments come to it
    decode         one decode step, against reading once, at the speed of a large copy, the weights that it needs
    matmul         necessary multiply-adds of forward and backward, against the best rate of a matrix product measured

The update is the same work on both sides, and is timed once. The baseline generates for a few prompts at a time and
scores one prompt's group at a time, as its G copies of everything need the memory. A difference between the sides'
numbers above what the dtype explains fails the run. It has been run on no GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from hark.grpo.config import ConfigError
from hark.grpo.instruments.flops import Cost, best_matmul_rate, cost_of, macs
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.optimizer import allocate_moments, build_optimizer, clip_gradients
from hark.grpo.types import Rollout
from hark.launch.studies.baseline import Baseline
from hark.launch.studies.benchmark import SECONDS, BaselineSide, HarkSide, Size, Work, machine, model_config
from hark.models.families.qwen2_audio import CONV_REACH, QWEN2_AUDIO_7B, audio_tokens
from hark.models.loading import build_from_config, meta_parameters
from hark.models.policy import Policy, Prompt

TARGETS = dict(decode_over_weights=1.5, matmul_share=0.45)
TEXT = 60  # tokens around the audio
GENERATED = 4  # prompts for which the baseline generates at a time
COPIED = {"cuda": 4 * 2**30, "cpu": 2**24}  # bytes
# The largest mean difference of a logprob, and difference of a gradient relative to it, both by norm. In bfloat16 the
# baseline's logprobs, of about -12, are rounded to a 16th, and each layer's output to a 256th: 0.02 and 0.04 with 16
# layers on the CPU, where completions that see one another make 0.4 and more than 1.
BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.2)}
# Of the layers at which a gradient arrives last; not of queries and keys, whose gradients are small beside rounding.
COMPARED = ("layers.0.mlp.down_proj.weight", "layers.0.self_attn.o_proj.weight", "audio_tower.conv1.weight")


@dataclass(frozen=True)
class Setting:
    """What is measured on which device."""

    config: Callable[[], Any]  # makes the model's transformers config, anew for each model, as each changes its own
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"
    repeat: int = 3


class Models:
    """The policy, the reference and the baseline's, and what the device reaches."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.policy, self.frozen = random_policy(setting, seed=0), random_policy(setting, seed=0)
        self.frozen.requires_grad_(False)
        self.theirs, self.their_frozen = plain_model(setting, self.policy), plain_model(setting, self.frozen)
        self.their_frozen.requires_grad_(False)
        self.matmul_rate = best_matmul_rate(setting.device, setting.dtype)
        self.copy_rate = copy_rate(setting.device)


class DeviceHarkSide(HarkSide):
    """A step of this engine with models that are there."""

    def __init__(self, models: Models, work: Work):
        self.work, self.policy, self.frozen = work, models.policy, models.frozen
        self.graphs = models.setting.device.type == "cuda"
        self.prompts = random_prompts(self.policy, work)
        self.model = self.policy.model


class DeviceBaselineSide(BaselineSide):
    """A step of the R1-AQA procedure with models that are there."""

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


def main(arguments: argparse.Namespace) -> None:
    """The study that the command line of launch/studies/benchmark.py asks for."""
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here")
    configs = {"qwen2-audio-7b": large_config, "small": small_config}
    dtype = getattr(torch, arguments.dtype)
    setting = Setting(configs[arguments.model], torch.device("cuda"), dtype, arguments.attention, arguments.repeat)
    sizes = arguments.group, arguments.new_tokens, arguments.micro_batch
    works = [(shape, Work(SECONDS[shape], n, *sizes)) for shape in arguments.shape for n in arguments.prompts]
    results = []
    for result in study(setting, works):
        results.append(result)
        print("\n".join(lines(result)), flush=True)
        if arguments.json:
            figures = {"machine": machine() | device_of(setting), "results": results}
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if unequal := [result for result in results if not result["equal"]]:
        print(f"the numbers differ in {len(unequal)} of {len(results)} cases: no speed-up counts", file=sys.stderr)
        raise SystemExit(1)


def large_config():
    from transformers import AutoConfig

    return AutoConfig.for_model(**QWEN2_AUDIO_7B)


def small_config(size: Size | None = None):
    size = size or Size()
    return model_config(size, audio_id=size.vocabulary - 1)


def study(setting: Setting, works: Sequence[tuple[str, Work]]) -> Iterator[dict[str, Any]]:
    """The figures of each kind of step."""
    models = Models(setting)
    update = update_seconds(models.policy)
    for shape, work in works:
        yield {"shape": shape, "prompts": work.prompts} | measure(models, work, update)


def measure(models: Models, work: Work, update: float | None) -> dict[str, Any]:
    """Let the sides take turns on one kind of step, after one turn to make them ready, which tells their memory."""
    setting, hark = models.setting, DeviceHarkSide(models, work)
    sides: dict[str, Any] = {"baseline": DeviceBaselineSide(models, work, hark.prompts), "hark": hark}
    drawn, memory = hark.rollout(), {}
    for name, side in list(sides.items()):
        try:
            memory[name] = peak_bytes(setting.device, models, lambda side=side: one_turn(side, drawn))
        except torch.OutOfMemoryError:
            if name == "hark":
                raise
            print(f"the baseline runs out of memory with {work.prompts} prompts: Hark alone", flush=True)
            del sides[name]
        drop_gradients(side)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(setting.repeat):
        outputs = {}
        for name, side in sides.items():
            seconds, logprobs = one_turn(side, drawn)
            turns[name].append(seconds)
            outputs[name] = logprobs.float(), compared_gradients(side)
            drop_gradients(side)
    seconds = {name: {phase: median(t[phase] for t in taken) for phase in taken[0]} for name, taken in turns.items()}
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
    } | limits(models, hark, drawn, seconds["hark"])


def limits(models: Models, hark: DeviceHarkSide, drawn: Rollout, seconds: dict[str, float]) -> dict[str, Any]:
    """How near the device's limits decoding and scoring are."""
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
    """Seconds of one decode step: what a rollout takes longer than one of half as many tokens.

    Both prefill, and both make a step ready and record it, once; what differs is repeated.
    """
    tokens = max(work.new_tokens // 2, 1)
    half = DeviceHarkSide(models, replace(work, new_tokens=tokens))
    half.rollout()
    seconds = median(timed(models.setting.device, half.rollout)[0] for _ in range(models.setting.repeat))
    return (rollout - seconds) / max(work.new_tokens - tokens, 1)


def cache_bytes(cost: Cost, prompts: Sequence[Prompt], work: Work, itemsize: int) -> float:
    """Bytes of keys and values that a decode step reads on average: each prompt's once, each branch's own."""
    tokens = sum(len(prompt.ids) for prompt in prompts) + len(prompts) * work.group_size * work.new_tokens / 2
    return tokens * cost.pair * len(cost.windows) * itemsize  # as many key and value numbers as multiply-adds per pair


def one_turn(side: Any, drawn: Rollout) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of each phase up to the gradients, and the policy's logprobs."""
    device = drawn.tokens.device
    rollout, _ = timed(device, side.rollout)
    reference, ref_logprobs = timed(device, side.reference, drawn)
    score, logprobs = timed(device, side.score, drawn, ref_logprobs)
    return {"rollout": rollout, "reference": reference, "score": score}, logprobs


def timed(device: torch.device, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until the device has done all of a call, and its result."""
    wait(device)
    start = time.perf_counter()
    result = function(*args)
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, models: Models, function: Callable[[], Any]) -> int:
    """Bytes of tensors at the height of a call, weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    with MemoryTracker() as tracker:
        tracker.add([*models.policy.parameters(), *models.frozen.parameters()])
        function()
    return tracker.peak


def update_seconds(policy: Policy) -> float | None:
    """Seconds of clipping and AdamW's step, or None where its moments do not fit."""
    try:
        optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999))
        allocate_moments(optimizer)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return timed(policy.device, lambda: (clip_gradients(policy, 1.0), optimizer.step()))[0]
    except torch.OutOfMemoryError:
        print("AdamW's moments do not fit beside two models: a step is measured without its update", flush=True)
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
    """The mean difference of a logprob, and the largest relative difference of a tensor's gradient."""
    gradients = [((a - b).norm() / b.norm()).item() for a, b in zip(hark[1], baseline[1], strict=True)]
    return (hark[0] - baseline[0]).abs().mean().item(), max(gradients)


def copy_rate(device: torch.device, repeat: int = 5) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(device, target.copy_, source)[0] for _ in range(repeat))


def random_policy(setting: Setting, seed: int) -> Policy:
    """A policy with random weights, whose completions never stop, without tokenizer and processor."""
    policy = build_from_config(setting.config())
    policy.audio_id = policy.model.config.audio_token_id
    policy.suppressed_ids = (policy.audio_id,)
    policy.model.generation_config.eos_token_id = policy.audio_id  # which is never drawn
    policy.tokenizer = SimpleNamespace(pad_token_id=0)
    policy.device, policy.attention = setting.device, setting.attention
    generator = torch.Generator(setting.device).manual_seed(seed)
    weights = {name: random_weight(name, p.shape, setting, generator) for name, p in policy.model.named_parameters()}
    take(policy.model, weights, setting.device)
    return policy


def random_weight(name: str, shape: torch.Size, setting: Setting, generator: torch.Generator) -> torch.Tensor:
    """Normal with the deviation that keeps the size of what passes, so that attention is uneven; norms 1, biases 0."""
    weight = torch.empty(shape, dtype=setting.dtype, device=setting.device)
    if len(shape) > 1:
        return weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    return weight.fill_(float(name.endswith("weight")))


def plain_model(setting: Setting, policy: Policy):
    """Hugging Face's own model with a policy's weights: the same storages."""
    with meta_parameters():
        model = type(policy).build(setting.config())
    take(model, policy.model.state_dict(), setting.device)
    model.model.audio_tower.embed_positions.requires_grad_(False)  # as launch/studies/baseline.py loads it
    return model.eval()


def take(model: torch.nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Give a model tensors for its parameters, and its buffers their place."""
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        module._buffers |= {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}


def random_prompts(policy: Policy, work: Work) -> tuple[Prompt, ...]:
    """Prompts of TEXT random tokens around the placeholders of random clips."""
    generator = torch.Generator().manual_seed(0)
    audio = policy.model.config.audio_config
    frames, most = round(100 * work.seconds), 2 * audio.max_source_positions
    prompts = []
    for n in range(work.prompts):
        text = torch.randint(1, policy.audio_id, (TEXT,), generator=generator)
        heard = torch.full((audio_tokens(frames),), policy.audio_id)
        mel = torch.randn(audio.num_mel_bins, min(frames + CONV_REACH, most), generator=generator)
        prompts.append(Prompt(torch.cat([text[:10], heard, text[10:]]), mel, frames, audio_digest=str(n)))
    return tuple(prompts)


def padded(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """What Hugging Face's processor would make of prompts of one length: mel frames of 30 s."""
    ids = torch.stack([prompt.ids for prompt in prompts])
    most = 2 * policy.model.config.audio_config.max_source_positions
    mel = torch.stack(
        [torch.nn.functional.pad(prompt.log_mel, (0, most - prompt.log_mel.shape[1])) for prompt in prompts]
    )
    heard = torch.arange(most) < torch.tensor([prompt.frames for prompt in prompts])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": mel,
        "feature_attention_mask": heard.long(),
    }


def device_of(setting: Setting) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "gpu": properties.name,
        "gpu_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "dtype": str(setting.dtype),
        "attention": setting.attention,
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What the console shows of one kind of step."""
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
        verdict = "as the dtype rounds" if result["equal"] else "TOO MUCH"
        yield f"  numbers differ by {logprob:.1e} in a logprob, {gradient:.1e} of a gradient: {verdict}"
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
