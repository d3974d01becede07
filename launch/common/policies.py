"""The policy and the reference that a configuration describes, loaded and sharded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from hark.grpo.attention_check import chosen_attention
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.metrics import peak_gib
from hark.grpo.runtime.collectives import World, gather_rows
from hark.grpo.runtime.device import emulates
from hark.grpo.runtime.export import damage_of
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.launch.common.contract import verify
from hark.models.audio_policy import AudioPolicy
from hark.models.directory import DIGESTS
from hark.models.families.automatic import AutomaticPolicy
from hark.models.loading import load_policy
from hark.models.lora import WithoutAdapters, read_lora
from hark.models.policy import Lora, Policy
from hark.shown import say


def make_policy(config: Config, world: World, *, train: bool = True) -> Policy:
    """The policy of model.path with its adapters, sharded over the world."""
    lora = lora_of(config) if train or config.lora.path else None  # new adapters change nothing before training
    mesh = device_mesh(world, config.sharding.replicas)
    if world.is_main and emulates(world.device, getattr(torch, config.model.dtype)):
        say(
            f"warning: this processor has no instructions for {config.model.dtype}, in which products take many times "
            "as long; model.dtype=float32 is faster here"
        )
    policy = _load(config, world, config.model.path, mesh, lora=lora, offload=config.sharding.offload, train=train)
    if isinstance(policy, AutomaticPolicy):
        verify(policy)
    return policy


def make_reference(config: Config, world: World, policy: Policy) -> Policy | WithoutAdapters | None:
    """The policy of the KL term, or None if loss.beta is 0.

    For adapters on model.path it is the policy without its adapters. Otherwise it is a model of its own, with
    sharding.offload_reference in host memory.
    """
    path = config.model.reference or config.model.path
    if config.loss.beta == 0:
        return None
    if policy.lora is not None and path == config.model.path:
        return WithoutAdapters(policy)
    # It uses the policy's mesh, because a second mesh would create further communicators.
    assert policy.mesh is not None
    offload = config.sharding.offload_reference
    # A reference that moves has weights like those of the policy: in bfloat16 small moves would be lost.
    moves = config.loss.reference_every > 0
    reference = _load(config, world, path, policy.mesh, lora=None, offload=offload, train=moves)
    if policy.tower_cache is not None and path == config.model.path:
        reference.share_tower(policy)
    reference.attention = policy.attention
    if path != config.model.path:
        choose_attention(config, world, reference)
    return reference


def choose_attention(config: Config, world: World, policy: Policy) -> None:
    """Give a policy that scores groups its attention where model.attention=auto leaves it open, and say which."""
    if config.model.attention != "auto":
        return
    group, branches = config.rollout.group_size, scored_at_a_time(config)
    apart = [True] if branches < group else [False, True] if config.rollout.keep_prefill else [False]
    limits = dict(branches=branches, max_new_tokens=config.rollout.max_new_tokens)
    policy.attention, reason = chosen_attention(policy, world, **limits, apart=apart)
    if world.is_main and world.device.type != "cpu":
        say(f"model.attention=auto is {policy.attention} for {policy.name}: {reason}")


def scored_at_a_time(config: Config) -> int:
    """Completions of a group that are scored together."""
    return min(config.optim.micro_branches or config.rollout.group_size, config.rollout.group_size)


def lora_of(config: Config) -> Lora | None:
    """The adapters of the policy: those saved in lora.path, or new ones, or none. ConfigError for a damaged export."""
    lora = config.lora
    if lora.path is not None:
        if damage := damage_of(Path(lora.path)):
            raise ConfigError(
                f"lora.path: {lora.path} is damaged: {damage}; copy or export it again, or delete {DIGESTS} there if "
                "its files were changed on purpose"
            )
        return read_lora(lora.path)
    return Lora(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def _load(
    config: Config, world: World, path: str, mesh: DeviceMesh, *, lora: Lora | None, offload: bool, train: bool
) -> Policy:
    model, dtype = config.model, getattr(torch, config.model.dtype)
    before = peak_gib(torch.device("cpu"))
    policy = load_policy(
        path,
        device=world.device,
        dtype=dtype,
        master_dtype=getattr(torch, model.master_dtype),
        train=model.train if train else "nothing",
        tower_cache=model.tower_cache * 2**20,
        lora=lora,
        recompute=model.recompute,
        compile_layers=model.compile,
        attention="sdpa" if model.attention == "auto" else model.attention,  # see `choose_attention`
        own=model.policy,
        shard=partial(
            shard, mesh=mesh, dtype=dtype, reshard=config.sharding.reshard, offload=offload, meter=world.meter
        ),
    )
    if isinstance(policy, AudioPolicy):
        policy.requires_audio = config.data.require_audio
    _report_loading(policy, path, "policy" if train else "frozen policy", peak_gib(torch.device("cpu")) - before, world)
    return policy


def _report_loading(policy: Policy, path: str, kind: str, increase: float, world: World) -> None:
    peaks = gather_rows([increase], world)
    if peaks is not None:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
        count, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        say(
            f"{kind} {path}: {count / 1e6:.4g} M parameters, {trained / 1e6:.3g} M to train; the peak of host memory "
            f"rose by {', '.join(f'{peak:.2f}' for peak in peaks)} GiB while loading on {world.size} ranks",
        )
