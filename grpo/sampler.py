"""Prompts -> Rollout: each prompt is prefilled once, then its G completions are decoded, one token each per step.

A completion that has ended leaves the batch at once. A prompt whose completions have all ended makes room for the next
prompt, so that a long completion does not hold up the others.
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

    keys: for each prompt the integers that its draws are a function of, (seed, step, example) in training; not needed
    at temperature 0. The same prompt with the same key gives the same completions, whatever other prompts there are.
    batch: how many prompts are decoded at a time, for which memory is needed; None is all.
    graphs: record the decode step as CUDA graphs, on a GPU.
    stop: False lets every completion run to the limit, to find out whether that fits in memory.
    A sharded policy must be `gathered`, since ranks may stop at different lengths. Raises PolicyError where `graphs`
    cannot be had.
    """
    if graphs and policy.dynamic_rope_type:
        raise PolicyError(
            f"rollout.cuda_graphs: {type(policy.model).__name__} has rotary frequencies of the kind "
            f"{policy.dynamic_rope_type!r}, which are recomputed for a new longest position; set it to false"
        )
    uniforms = None
    if temperature > 0:
        if keys is None:
            raise ValueError("sampling at a temperature above 0 needs one key per prompt")
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
    # The longest first, so that prompts that are decoded together have similar lengths, and memory is highest early.
    waiting = deque(sorted(range(len(prompts)), key=lambda n: -len(prompts[n].ids)))
    while waiting or branches.alive:
        if waiting and branches.free:
            branches.prefill([waiting.popleft() for _ in range(min(len(waiting), branches.free))])
        else:
            branches.decode_step()
        branches.remove_finished(keep_rows=bool(waiting))
    return branches.rollout()


def _uniforms(key: Sequence[int], group_size: int, steps: int) -> torch.Tensor:
    """Numbers in [0, 1), (G, T) float64: a function of the key, the same on every platform.

    One stream, completion by completion. A larger G therefore keeps the first completions. Another T gives other
    numbers to all completions but the first.
    """
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return torch.from_numpy(np.random.Generator(bits).random((group_size, steps)))
