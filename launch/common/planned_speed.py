"""How long a step of a planned run takes, and with which settings that fit it takes less."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hark.grpo.instruments.communication import sharded_elements, step_bytes
from hark.grpo.instruments.flops import Cost, Macs, cost_of, macs
from hark.grpo.instruments.memory import Work
from hark.grpo.instruments.shape import Shape
from hark.grpo.instruments.speed import DEVICES, Rates, measured, step_seconds
from hark.launch.common.planned import Change, Run, changed, in_words, predict, setting_of, work_of
from hark.launch.common.policies import lora_of
from hark.models.cache import TowerCache
from hark.models.lora import WithoutAdapters, add_adapters
from hark.models.policy import Audio, Policy, Prompt

HERE = "here"
NAMES = (HERE, *DEVICES)
SHOWN = 3  # sets of changes
AUDIO, TEXT = 0, 1  # ids of the prompt that is planned with


def prepare(policy: Policy, run: Run) -> None:
    """Give a policy of its config alone the adapters and the frozen weights of a run."""
    lora, train = lora_of(run.config), run.config.model.train
    if lora is None:
        policy.select_trained(train)
    else:
        add_adapters(policy, dataclasses.replace(lora, path=None))
    if policy.tower_is_frozen:
        policy.tower_cache = TowerCache(0)


def rates_of(name: str, shape: Shape, run: Run) -> Rates:
    """The rates of a named device, or of this machine's."""
    if name != HERE:
        return DEVICES[name]
    work, device = work_of(shape, run), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = work.micro_batch * (work.prompt + work.fed)
    rows = work.prompts * work.group_size
    return measured(device, getattr(torch, run.config.model.dtype), shape, tokens, rows)


def seconds_of(policy: Policy, shape: Shape, run: Run, rates: Rates, tokens: int) -> dict[str, float]:
    """Seconds of each phase of a step, with completions of so many tokens."""
    work = dataclasses.replace(work_of(shape, run), max_new_tokens=tokens)
    setting, config = setting_of(run), run.config
    ids = torch.tensor([AUDIO] * run.audio + [TEXT] * run.text)
    clip = (Audio(torch.empty(0), work.frames, run.audio),) if work.frames else ()
    prompts, lengths = [Prompt(ids, clip)] * work.prompts, torch.full((work.prompts * work.group_size,), tokens)
    cost = cost_of(policy)
    of_pairs = Cost(
        token=0, pair=cost.pair, windows=cost.windows, head=0, tower_pair=cost.tower_pair,
        convolutions=tuple((stride, 0) for stride, _ in cost.convolutions), tower_window=cost.tower_window,
        frozen_tower=cost.frozen_tower,
    )  # fmt: skip
    passes, pairs = (macs(one, prompts, lengths, audio_id=AUDIO) for one in (cost, of_pairs))
    if setting.attention == "sdpa" and rates.overlaps:  # a GPU; a CPU does not compute them
        masked = cost.pair * len(cost.windows) * pairs_of_siblings(work)
        passes, pairs = (_and_masked(one, masked) for one in (passes, pairs))
    reference = {"none": None, "adapters": WithoutAdapters(policy)}.get(setting.reference, policy)
    micro_batches = -(-work.prompts // work.micro_batch)
    own, dtype = sharded_elements(policy, setting.shards), getattr(torch, config.model.dtype)
    received = step_bytes(
        policy, reference, shards=setting.shards, replicas=run.gpus // setting.shards, dtype=dtype,
        reshard=setting.reshard, micro_batches=micro_batches, inner_epochs=config.loss.inner_epochs,
        keep_prefill=setting.keep_prefill, parts=-(-work.group_size // work.branches),
    )  # fmt: skip
    return step_seconds(
        shape, work, setting, passes, pairs, rates, trained=own.trained // setting.shards,
        updates=config.loss.inner_epochs, received=received,
        gathered=dtype.itemsize * (own.root + own.layers) * (setting.shards - 1) / setting.shards,
    )  # fmt: skip


def pairs_of_siblings(work: Work) -> int:
    """Pairs of tokens of branches that sdpa computes and masks in a step's scoring, in one layer and one pass."""
    steps, count = work.max_new_tokens - 1, 0
    for first in range(0, work.group_size, work.branches):
        branches = min(work.branches, work.group_size - first)
        count += (branches * steps) ** 2 - branches * steps * (steps + 1) // 2
    return work.prompts * count


def _and_masked(passes: Macs, masked: int) -> Macs:
    """With so many more multiply-adds in a forward of scoring, and twice as many in its backward."""
    reference, forward = passes.reference + masked, passes.forward + masked
    return dataclasses.replace(passes, reference=reference, forward=forward, backward=passes.backward + 2 * masked)


def told(seconds: dict[str, float], better: list[dict], completions: int, name: str, tokens: int) -> str:
    """The seconds of a step, and what makes it faster, in words."""
    total = sum(seconds.values())
    lines = [
        "",
        f"seconds of a step on {name}, with completions of {tokens} tokens:",
        f"{'  '.join(f'{phase} {value:.3g}' for phase, value in seconds.items())}  total {total:.3g}, "
        f"{completions / total:.3g} completions per second",
    ]
    if better:
        lines.append("faster, and fits:")
    return "\n".join(lines + [f"  {' '.join(one['change']):72} -> {one['seconds']:8.3g} s" for one in better])


def completions_of(run: Run) -> int:
    """Completions of a step over all ranks."""
    return run.config.optim.prompts_per_step * (1 if run.sft else run.config.rollout.group_size)


def faster(policy: Policy, shape: Shape, run: Run, rates: Rates, tokens: int, limit: float) -> list[dict]:
    """Sets of changes with which a step takes less time and fits in `limit` bytes, the fastest first."""
    fits = predict(shape, run).peak <= limit
    least = sum(seconds_of(policy, shape, run, rates, tokens).values()) if fits else float("inf")
    found: list[dict[str, Any]] = []
    for changes in _sets(run, work_of(shape, run).prompts):
        other = changed(run, changes)
        if other is None or (peak := predict(shape, other).peak) > limit:
            continue
        total = sum(seconds_of(policy, shape, other, rates, tokens).values())
        if total < least:
            found.append({"change": list(map(in_words, changes)), "seconds": total, "peak": peak})
    return sorted(found, key=lambda one: (one["seconds"], len(one["change"])))[:SHOWN]


def _sets(run: Run, prompts: int) -> Iterator[list[Change]]:
    """All combinations of the settings that trade memory for time; each names only what it changes."""
    sizes = [size for size in range(1, prompts + 1) if prompts % size == 0]
    options: dict[tuple[str, str], list[Any]] = {
        ("optim", "micro_batch"): sizes,
        ("model", "recompute"): [False, True],
        ("sharding", "reshard"): [False, True] if run.gpus > run.config.sharding.replicas else [],
        ("rollout", "keep_prefill"): [] if run.sft else [False, True],
        ("rollout", "cuda_graphs"): [] if run.sft else [False, True],
    }
    now = {key: getattr(getattr(run.config, key[0]), key[1]) for key in options}
    choices = [[(*key, value) for value in values or [now[key]]] for key, values in options.items()]
    for chosen in itertools.product(*choices):
        yield [change for change in chosen if now[change[:2]] != change[2]]
