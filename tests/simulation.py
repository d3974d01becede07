"""One step of the engine on fake tensors and a fake process group, to measure the memory that it needs.

The sampler, the scorer, FSDP2, autograd and AdamW are the real ones, but tensors have no values. So a model of any size
and one of any number of ranks are measured in seconds on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from hark.grpo.instruments.memory import Setting, Work, plan
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.instruments.shape import shape_of
from hark.grpo.optimizer import build_optimizer
from hark.grpo.prefill import Prefix, prefilled
from hark.grpo.recorded import FixedWeights, RecordedSteps
from hark.grpo.runtime.sharding import gather_root, gathered, release, shard
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.tree import Layout, tree_masks
from hark.grpo.types import Rollout
from hark.models.attention import AfterPrompt
from hark.models.cache import GroupCache, TowerCache
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B, Qwen2AudioPolicy
from hark.models.loading import build_from_config, meta_parameters
from hark.models.lora import add_adapters
from hark.models.policy import Audio, Lora, Policy, Prompt
from hark.models.whisper import CONV_REACH, audio_tokens

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class FixedValues(TorchFunctionMode):
    """Replaces the operations that need values: masks are True everywhere, and no completion has stopped."""

    placeholders = 0  # what `int(tensor)` returns: audio placeholders of the prompts that are embedded together

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1).clone()
        if function is torch.Tensor.__bool__:
            return True
        if function is torch.Tensor.__int__:
            return self.placeholders
        return function(*args, **(kwargs or {}))


class Unrecorded:
    """Does steps instead of recording them, in the place of `CudaGraphs`."""

    def __call__(self, step, inputs, key):
        step(inputs)

    def forget(self) -> None:
        pass


class ConfigOnlyPolicy(Qwen2AudioPolicy):
    """A Qwen2-Audio made of its config, without tokenizer and processor."""

    pad_id, stop_ids = 0, (1, 2)

    def __init__(self, config) -> None:
        with meta_parameters():
            Policy.__init__(self, self.build(config), None)
        self.audio_id = config.audio_token_id
        self.suppressed_ids = (self.audio_id,)


def simulate(
    config, work: Work, setting: Setting, *, targets: tuple[str, ...] = (), decoding_steps: int | None = None, fake=True
) -> dict[str, int]:
    """Peak bytes of each phase of a step. AdamW's moments exist already, as after an earlier step.

    targets: the decoder's linear layers that get an adapter. decoding_steps: tokens to decode, fewer than
    `max_new_tokens` to save time; the KV cache has its full size. fake: False uses real tensors, on one rank.
    """
    kind, store = ("fake", FakeStore()) if fake else ("gloo", dist.HashStore())
    dist.init_process_group(kind, rank=0, world_size=setting.shards, store=store)
    try:
        mesh = init_device_mesh("cpu", (setting.shards,))
        policy = _policy(config, setting, mesh, targets)
        reference = {
            "copy": lambda: _reference(config, setting, mesh, policy),
            "adapters": lambda: policy,
            "none": lambda: None,
        }
        reference = reference[setting.reference]()
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        fixed = FixedValues()
        with mode, fixed if fake else nullcontext(), MemoryTracker() as tracker:
            for module in {policy, reference} - {None}:
                fill(module, setting)
                tracker.add([*module.parameters(), *module.buffers()])
            audio = audio_tokens(work.frames)
            ids = torch.cat([torch.zeros(work.prompt - audio).long(), torch.full((audio,), config.audio_token_id)])
            mel = torch.zeros(
                config.audio_config.num_mel_bins,
                min(work.frames + CONV_REACH, 2 * config.audio_config.max_source_positions),
            )
            prompts = (Prompt(ids, (Audio(mel, work.frames, audio),)),) * work.prompts
            optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999))
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            _update(policy, optimizer)
            steps = decoding_steps or work.max_new_tokens
            recorded = RecordedSteps(Unrecorded(), FixedWeights(policy)) if setting.recorded else None
            rollout = partial(_rollout, policy, prompts, work, tracker, fixed, steps, setting.keep_prefill, recorded)
            _step(policy, reference, optimizer, prompts, work, tracker, fixed, rollout, setting)
            return tracker.peaks
    finally:
        dist.destroy_process_group()


def _step(
    policy,
    reference,
    optimizer,
    prompts,
    work: Work,
    tracker: MemoryTracker,
    fixed: FixedValues,
    rollout: Callable[[], Rollout],
    setting: Setting,
) -> None:
    """The hops of Trainer.step that hold memory. The rollout comes last, so that it finds what a step leaves behind;
    one whose prompts are kept for the others comes first, and so does one that keeps what recorded steps read.
    """
    rows = work.micro_batch * work.branches
    tokens = torch.zeros(rows, work.max_new_tokens, dtype=torch.long)
    mask = torch.ones(rows, work.max_new_tokens, dtype=torch.bool)
    parts = [prompts[first : first + work.micro_batch] for first in range(0, work.prompts, work.micro_batch)]
    as_on_a_gpu = mock.patch.multiple(
        "hark.grpo.scorer", row_attention=whole_rows, attention_after_prompt=whole_rows_after_prompt
    )
    prefill = None
    if setting.keep_prefill:
        prefill = rollout().prefill.take()
    elif setting.recorded:
        rollout()
    fixed.placeholders = work.micro_batch * audio_tokens(work.frames)
    if reference is not None:
        with tracker.phase("reference"), torch.no_grad(), as_on_a_gpu:
            for part in parts:
                prefix = prefilled(reference, part).select(range(len(part))) if work.splits else None
                for _ in range(work.group_size // work.branches):
                    score(reference, part, tokens, mask, group_size=work.branches, prefix=prefix)
            prefix = None
        if reference is not policy:
            release(reference)
    with tracker.phase("backward"), as_on_a_gpu:
        for first, part in zip(range(0, work.prompts, work.micro_batch), parts, strict=True):
            own = prefilled(policy, part) if work.splits and not prefill else None
            for _ in range(work.group_size // work.branches):
                prefix = own.select(range(len(part))) if own else None
                prefix = prefill.select(range(first, first + len(part))) if prefill else prefix
                score(policy, part, tokens, mask, group_size=work.branches, prefix=prefix)[0].sum().backward()
                prefix = None
            if own:
                gather_root(policy)
                own.backward()
        if prefill:
            gather_root(policy)
            prefill.backward()
    with tracker.phase("optimizer"):
        _update(policy, optimizer)
    if not setting.keep_prefill:
        rollout()


def _rollout(
    policy,
    prompts,
    work: Work,
    tracker: MemoryTracker,
    fixed: FixedValues,
    steps: int,
    keep_prefill: bool,
    recorded: RecordedSteps | None,
) -> Rollout:
    fixed.placeholders = (work.decoded or work.prompts) * audio_tokens(work.frames)
    full_cache = mock.patch(
        f"hark.grpo.{'recorded' if recorded else 'branches'}.GroupCache",
        lambda *sizes: GroupCache(*sizes[:3], work.max_new_tokens - 1),
    )
    at_once = mock.patch("hark.models.cache.STEPS", work.max_new_tokens)
    never_stopped = mock.patch("hark.grpo.branches.DelayedFlags", lambda flags: lambda: [True] * flags.numel())
    with tracker.phase("rollout"), gathered(policy), torch.no_grad(), full_cache, at_once, never_stopped:
        return sample(
            policy, prompts, group_size=work.group_size, max_new_tokens=steps, temperature=1.0,
            keys=[(n,) for n in range(work.prompts)], batch=work.decoded or None,
            keep_prefill=keep_prefill, recorded=recorded,
        )  # fmt: skip


def whole_rows(policy: Policy, row: Layout, prompt: int, group_size: int):
    return tree_masks(policy.windows, row, row, prompt=prompt), None


def whole_rows_after_prompt(policy: Policy, row: Layout, branches: Layout, group_size: int, prefix: Prefix):
    return tree_masks(policy.windows, branches, row), AfterPrompt(prefix.layers)


def _update(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _policy(config, setting: Setting, mesh, targets: tuple[str, ...]) -> Policy:
    policy = ConfigOnlyPolicy(config)
    if setting.lora_rank:
        add_adapters(policy, Lora(setting.lora_rank, 16.0, targets))
    else:
        policy.select_trained(setting.train)
    if policy.tower_is_frozen:
        policy.tower_cache = TowerCache(0)
    if setting.recompute:
        policy.recompute_activations()
    shard(policy, mesh, dtype=DTYPES[setting.dtype], reshard=setting.reshard)
    return policy


def _reference(config, setting: Setting, mesh, policy: Policy) -> Policy:
    reference = ConfigOnlyPolicy(config).requires_grad_(False)
    reference.tower_cache = policy.tower_cache
    shard(reference, mesh, dtype=DTYPES[setting.dtype], reshard=setting.reshard)
    if policy.tower_cache is not None:
        reference.share_tower(policy)
    return reference


def fill(policy: Policy, setting: Setting) -> None:
    """Allocate parameters: trained ones in the master dtype, others in the compute dtype."""

    def stored(p: nn.Parameter) -> nn.Parameter:
        dtype = DTYPES[setting.master if p.requires_grad else setting.dtype]
        local = torch.zeros(p.to_local().shape if isinstance(p, DTensor) else p.shape, dtype=dtype)
        if isinstance(p, DTensor):
            local = DTensor.from_local(
                local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        return nn.Parameter(local, requires_grad=p.requires_grad)

    policy.model.load_state_dict({n: stored(p) for n, p in policy.model.named_parameters()}, assign=True, strict=False)
    for module in policy.modules():
        module._buffers |= {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in module._buffers.items()}


def main() -> None:
    """Print planned and measured memory of Qwen2-Audio-7B; about five minutes.  python -m tests.simulation"""
    config = AutoConfig.for_model(**QWEN2_AUDIO_7B)
    shape = shape_of(build_from_config(config), targets=TARGETS)
    eight = Setting(shards=8, dtype=2, master=4, recompute=True)
    lora = Setting(shards=1, dtype=2, master=4, recompute=True, lora_rank=8, reference="adapters")
    for name, seconds, prompts, setting in (
        ("8 GPUs, 10 s", 10, 2, eight),
        ("8 GPUs, 30 s", 30, 2, eight),
        ("8 GPUs, 10 s, no recompute", 10, 2, replace(eight, recompute=False)),
        ("LoRA, 1 GPU, 10 s", 10, 4, lora),
        ("LoRA, 1 GPU, 30 s, no recompute", 30, 4, replace(lora, recompute=False)),
        ("bfloat16, 1 GPU, 10 s", 10, 4, Setting(shards=1, dtype=2, master=2, recompute=True)),
    ):
        frames = 100 * seconds
        work = Work(prompts, 1, 60 + audio_tokens(frames), frames, group_size=8, max_new_tokens=256)
        result = plan(shape, work, setting)
        for phase, peak in simulate(config, work, setting, targets=TARGETS, decoding_steps=1).items():
            print(f"{name:32} {phase:10} {result.total(phase) / 2**30:7.2f} {peak / 2**30:7.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
