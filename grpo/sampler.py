"""Prompts -> Rollout: the prompt is prefilled once, then G branches grow behind it, one token each per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grpo.scorer import log_distribution, tree_masks
from grpo.tree import branches_layout, prompt_layout
from grpo.types import Rollout
from models.cache import KVCache
from models.policy import Policy, Prompt


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    keys: Sequence[Sequence[int]] | None = None,
    stop: bool = True,
) -> Rollout:
    """Draw `group_size` completions of each prompt from the policy at `temperature`; 0 takes the likeliest token.

    keys: what each prompt's draws are a function of, as integers, (seed, step, example) in training; not needed at
    temperature 0. The same prompt with the same key gives the same completions, whatever stands beside it.
    stop: False lets every completion run into the limit, to see whether that fits in memory.
    Call it under `gathered(policy)` when the policy is sharded: ranks may stop at different lengths.
    """
    if keys is None and temperature > 0:
        raise ValueError("sampling at a temperature above 0 needs one key per prompt")
    uniforms = None
    if temperature > 0:
        uniforms = torch.cat([_uniforms(key, group_size, max_new_tokens) for key in keys]).to(policy.device)
    return policy(_sample, tuple(prompts), group_size, max_new_tokens, temperature, uniforms, stop)


def _uniforms(key: Sequence[int], group_size: int, steps: int) -> torch.Tensor:
    """Numbers in [0, 1), (G, steps) float64, a pure function of the key on every platform."""
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return torch.from_numpy(np.random.Generator(bits).random((group_size, steps)))


def _sample(
    policy: Policy,
    prompts: tuple[Prompt, ...],
    group_size: int,
    limit: int,
    temperature: float,
    uniforms: torch.Tensor | None,
    stop: bool = True,
) -> Rollout:
    device = policy.device
    count, rows = len(prompts), len(prompts) * group_size
    stop_ids = torch.tensor(policy.stop_ids if stop else [], device=device)
    embeddings, lengths = policy.embed(prompts)  # (N, P, D), (N,)
    longest = embeddings.shape[1]
    prompt = prompt_layout(lengths, longest)
    layout = prompt + branches_layout(lengths, group_size, limit, by_step=True)
    cache = KVCache(longest + group_size * (limit - 1))  # the last token of a branch is drawn, never fed

    hidden = policy.decode(embeddings, tree_masks(policy, prompt, prompt, prompt=longest), prompt.position, cache)
    last = hidden[torch.arange(count, device=device), lengths - 1]
    hidden = last.repeat_interleave(group_size, dim=0)  # (B, D)

    tokens = torch.full((rows, limit), policy.pad_id, device=device)
    mask = torch.zeros((rows, limit), dtype=torch.bool, device=device)
    logprobs = torch.zeros((rows, limit), device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(limit):
        distribution = log_distribution(policy, hidden, temperature or 1.0)  # (B, V)
        drawn = distribution.argmax(dim=-1) if uniforms is None else _draw(distribution, uniforms[:, t])
        tokens[:, t] = torch.where(running, drawn, tokens[:, t])
        mask[:, t] = running
        logprobs[:, t] = distribution.gather(-1, drawn[:, None]).squeeze(-1) * running
        running = running & ~torch.isin(drawn, stop_ids)
        if t + 1 == limit or not running.any():
            break
        start = longest + t * group_size
        fed = layout[start : start + group_size]
        masks = tree_masks(policy, fed, layout[: start + group_size])
        embedded = policy.embed_tokens(tokens[:, t]).unflatten(0, (count, group_size))
        hidden = policy.decode(embedded, masks, fed.position, cache).flatten(0, 1)

    used = slice(t + 1)
    return Rollout(prompts, group_size, tokens[:, used], mask[:, used], logprobs[:, used], ~running)


def _draw(distribution: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) by inverting the cumulative distribution of logprobs (B, V) at uniform (B,).

    In float64: a float32 sum over a vocabulary of 150,000 would round the probability of rare tokens away.
    """
    cumulative = distribution.double().exp().cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=distribution.shape[-1] - 1)
