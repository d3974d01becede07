"""Prompts -> Rollout: each prompt is prefilled once, then its G completions are decoded, one token each per step.

Finished completions are removed from the batch. When all completions of a prompt are finished, the next prompt starts,
so that a long completion does not delay other prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hark.grpo.branches import Branches
from hark.grpo.recorded import RecordedSteps
from hark.grpo.types import Rollout
from hark.models.linear import packed_weights
from hark.models.policy import Policy, Prompt, on_policy


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
    recorded: RecordedSteps | None = None,
    stop: bool = True,
    keep_prefill: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Draw `group_size` completions of each prompt from the policy at `temperature`; 0 takes the most likely token.

    keys: for each prompt the integers that seed its random numbers, (seed, step, example) in training; not needed at
    temperature 0. The completions of a prompt depend on the prompt and its key, not on the other prompts.
    batch: how many prompts are decoded at a time, which bounds the memory; None is all.
    recorded: the recorded decode steps of the policy; they may be used by several calls with the same settings.
    stop: False decodes every completion to the limit, to test whether that fits in memory.
    keep_prefill: keep the prompts' forward with its graph, from which the scorer goes on; they are decoded together.
    interrupted: where it becomes true, completions end as they are, those of prompts that wait without a token.
    A sharded policy must be `gathered`, because ranks may do different numbers of steps.
    """
    if keep_prefill and batch is not None and batch < len(prompts):
        raise ValueError(f"keep_prefill needs all {len(prompts)} prompts at once; batch is {batch}")
    uniforms = None
    if temperature > 0:
        if keys is None:
            raise ValueError("sampling at a temperature above 0 needs one key per prompt")
        uniforms = torch.cat([uniform_numbers(key, group_size, max_new_tokens) for key in keys]).to(policy.device)
    branches = Branches(
        policy, prompts, group_size=group_size, limit=max_new_tokens, temperature=temperature, uniforms=uniforms,
        rows=min(batch or len(prompts), len(prompts)), stop=stop, recorded=recorded,
        keep_prefill=keep_prefill,
    )  # fmt: skip
    # The longest first, so that prompts decoded together have similar lengths and the memory peak comes early.
    waiting = deque(sorted(range(len(prompts)), key=lambda n: -len(prompts[n].ids)))
    with packed_weights(policy.decoder, policy.model.get_output_embeddings()):
        while (waiting or branches.alive) and not interrupted():
            if waiting and branches.free:
                branches.prefill([waiting.popleft() for _ in range(min(len(waiting), branches.free))])
            else:
                branches.decode_step()
            branches.remove_finished(keep_rows=bool(waiting))
    return branches.rollout()


def uniform_numbers(key: Sequence[int], group_size: int, steps: int) -> torch.Tensor:
    """Uniform numbers (G, T) float64 in [0, 1): a function of the key, the same on every platform.

    One random stream fills the rows in order. A larger G therefore keeps the numbers of the first completions; another
    T changes those of all completions but the first.
    """
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return torch.from_numpy(np.random.Generator(bits).random((group_size, steps)))
