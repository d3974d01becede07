"""Prompts -> Rollout: a prompt is prefilled once, then G branches grow behind it, one token each per step.

A branch that has ended leaves at once, and a prompt whose branches have all ended makes room for the next one, so no
long completion holds up the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from hark.grpo.branches import Branches
from hark.grpo.types import Rollout
from hark.models.policy import Policy, PolicyError, Prompt, on_policy


@torch.no_grad()
@on_policy
def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    keys: Sequence[Sequence[int]] | None = None,
    batch: int | None = None,
    graphs: bool = False,
    stop: bool = True,
) -> Rollout:
    """Draw `group_size` completions of each prompt from the policy at `temperature`; 0 takes the likeliest token.

    keys: what each prompt's draws are a function of, as integers, (seed, step, example) in training; not needed at
    temperature 0. The same prompt with the same key gives the same completions, whatever stands beside it.
    batch: how many prompts are decoded at a time, which is what memory is needed for; None is all.
    graphs: record the decode step as CUDA graphs, on a GPU.
    stop: False lets every completion run into the limit, to see whether that fits in memory.
    Call it under `gathered(policy)` when the policy is sharded: ranks may stop at different lengths.
    """
    if keys is None and temperature > 0:
        raise ValueError("sampling at a temperature above 0 needs one key per prompt")
    if graphs and policy.dynamic_rope_type:
        raise PolicyError(
            f"rollout.cuda_graphs: {type(policy.model).__name__} has rotary frequencies of the kind "
            f"{policy.dynamic_rope_type!r}, which are made anew for the longest position; set it to false"
        )
    uniforms = None
    if temperature > 0:
        uniforms = torch.cat([_uniforms(key, group_size, max_new_tokens) for key in keys]).to(policy.device)
    branches = Branches(
        policy,
        prompts,
        group_size=group_size,
        limit=max_new_tokens,
        temperature=temperature,
        uniforms=uniforms,
        rows=min(batch or len(prompts), len(prompts)),
        stop=stop,
        graphs=graphs,
    )
    # The longest first: prompts that are decoded together are then of similar length, and memory is highest at once.
    waiting = deque(sorted(range(len(prompts)), key=lambda n: -len(prompts[n].ids)))
    while waiting or branches.alive:
        if waiting and branches.free:
            branches.prefill([waiting.popleft() for _ in range(min(len(waiting), branches.free))])
        else:
            branches.decode_step()
        branches.remove_finished(keep_rows=bool(waiting))
    return branches.rollout()


def _uniforms(key: Sequence[int], group_size: int, steps: int) -> torch.Tensor:
    """Numbers in [0, 1), (G, steps) float64, a pure function of the key on every platform."""
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return torch.from_numpy(np.random.Generator(bits).random((group_size, steps)))
