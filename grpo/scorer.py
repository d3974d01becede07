"""Policy and completions -> logprobs: one tree-masked row per group, the LM head at completion tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from hark.grpo.blocks import tree_block_mask
from hark.grpo.distribution import entropy, log_distribution
from hark.grpo.prefill import Prefix
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_mask, tree_masks
from hark.models.attention import AfterPrompt, AttentionFunction, BlockAttention
from hark.models.policy import Policy, Prompt, on_policy
from hark.models.split_attention import SplitAfterPrompt, SplitAttention

CHUNK = 2048  # scored tokens whose logits over the vocabulary exist at the same time


class Spread(NamedTuple):
    """Figures of the distributions from which the tokens were drawn; 0 at padding.

    entropy: (B, T) in nats, with a gradient if one was asked for. likeliest_ids, likeliest_logprobs: (B, T, k), the k
    likeliest tokens, the likeliest first.
    """

    entropy: torch.Tensor
    likeliest_ids: torch.Tensor
    likeliest_logprobs: torch.Tensor


@on_policy
def score(
    policy: Policy,
    prompts: Sequence[Prompt],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    group_size: int,
    temperature: float = 1.0,
    likeliest: int = 0,
    entropy_gradient: bool = False,
    prefix: Prefix | None = None,
) -> tuple[torch.Tensor, Spread]:
    """Logprobs (B, T) of completions (B, T) under `log_distribution`, and figures of these distributions.

    The logprobs have a gradient for every trained parameter, those of the audio tower included. likeliest: how many of
    the likeliest tokens the figures have. entropy_gradient: whether the entropy has a gradient too.
    prefix: what is known of the prompts; None computes it.
    """
    hidden = _predicting_states(policy, prompts, tokens, group_size, prefix)[mask]  # (scored, D)
    chosen = tokens[mask]
    chunks = list(zip(hidden.split(CHUNK), chosen.split(CHUNK), strict=True))
    settings = temperature, likeliest, entropy_gradient
    parts = [checkpoint(_chosen, policy, h, c, *settings, use_reentrant=False) for h, c in chunks[:-1]]
    # The backward starts with the last chunk, so recomputing that one would save no memory.
    parts += [_chosen(policy, h, c, *settings) for h, c in chunks[-1:]]
    logprobs, *figures = (_padded(torch.cat(column), mask) for column in zip(*parts, strict=True))
    return logprobs, Spread(*figures)


def block_attention(policy: Policy, queries: Layout, keys: Layout) -> BlockAttention:
    """FlexAttention under the tree mask; one block mask per type of layer."""
    masks = {kind: tree_block_mask(queries, keys, window) for kind, window in policy.windows.items()}
    return BlockAttention(tuple(masks[kind] for kind in policy.layer_types))


def _predicting_states(
    policy: Policy, prompts: Sequence[Prompt], tokens: torch.Tensor, group_size: int, prefix: Prefix | None
) -> torch.Tensor:
    """Hidden states (B, T, D) that predict the completion tokens; each is that of the token before.

    The prompt's last token predicts a branch's first. A branch's last token predicts nothing, so T - 1 tokens are fed.
    """
    policy.check_length(max(len(prompt.ids) for prompt in prompts) + tokens.shape[1] - 1)
    if prefix is not None:
        return _after_prompts(policy, prompts, tokens, group_size, prefix)
    embeddings, lengths = policy.embed(prompts)  # (N, P, D), (N,)
    count, longest, width = embeddings.shape
    steps = tokens.shape[1] - 1
    fed = policy.embed_tokens(tokens[:, :-1]).reshape(count, group_size * steps, width)
    row = prompt_layout(lengths, longest) + branches_layout(lengths, group_size, steps)
    masks, attention = row_attention(policy, row, longest, group_size)
    hidden = policy.decode(torch.cat([embeddings, fed], dim=1), masks, row.position, attention)
    first = hidden[torch.arange(count, device=lengths.device), lengths - 1]
    rest = hidden[:, longest:].unflatten(1, (group_size, steps)) if steps else first[:, None, None][:, :, :0]
    return _followed(first, rest, group_size)


def _after_prompts(
    policy: Policy, prompts: Sequence[Prompt], tokens: torch.Tensor, group_size: int, prefix: Prefix
) -> torch.Tensor:
    """The same, with the branches alone as input."""
    counts = [len(prompt.ids) for prompt in prompts]
    lengths = torch.tensor(counts, device=policy.device)
    steps = max(tokens.shape[1] - 1, 1)  # with none, the layers would have no gradient, for which other ranks wait
    fed = policy.embed_tokens(tokens[:, :steps]).reshape(len(prompts), group_size * steps, -1)
    branches = branches_layout(lengths, group_size, steps)
    row = prompt_layout(lengths, max(counts)) + branches
    masks, attention = attention_after_prompt(policy, row, branches, group_size, prefix)
    hidden = policy.decode(fed, masks, branches.position, attention).unflatten(1, (group_size, steps))
    return _followed(prefix.last, hidden[:, :, : tokens.shape[1] - 1], group_size)


def _followed(last: torch.Tensor, rest: torch.Tensor, group_size: int) -> torch.Tensor:
    """States (B, T, D): those (N, D) that predict the first tokens of all branches, and the rest, (N, G, T - 1, D)."""
    first = last[:, None, None].expand(-1, group_size, -1, -1)  # (N, G, 1, D)
    return torch.cat([first, rest.expand(-1, group_size, -1, -1)], dim=2).flatten(0, 1)


def row_attention(
    policy: Policy, row: Layout, prompt: int, group_size: int
) -> tuple[dict[str, torch.Tensor] | None, AttentionFunction | None]:
    """The masks of rows, None if none are needed, and the attention function, None for the default.

    On the CPU, layers without a window compute the attention of prompt and branches separately (`SplitAttention`).
    """
    if policy.attention == "flex":
        return None, block_attention(policy, row, row)
    if policy.device.type != "cpu" or row.real.shape[1] == prompt:
        return tree_masks(policy.windows, row, row, prompt=prompt), None
    return _padding_masks(policy, row, row, prompt), SplitAttention(prompt, group_size)


def attention_after_prompt(
    policy: Policy, row: Layout, branches: Layout, group_size: int, prefix: Prefix
) -> tuple[dict[str, torch.Tensor] | None, AttentionFunction]:
    """The same of branches after prompts whose keys and values are known."""
    if policy.attention == "flex":
        return None, AfterPrompt(prefix.layers, attention=block_attention(policy, branches, row))
    if policy.device.type != "cpu":
        return tree_masks(policy.windows, branches, row), AfterPrompt(prefix.layers)
    masks = _padding_masks(policy, branches, row, row.real.shape[1] - branches.real.shape[1])
    return masks, SplitAfterPrompt(prefix.layers, group_size)


def _padding_masks(policy: Policy, queries: Layout, row: Layout, prompt: int) -> dict[str, torch.Tensor]:
    """For each type of layer the prompts' padding, (N, 1, 1, P), or with a window the tree mask, (N, 1, L, S)."""
    real = row.real[:, None, None, :prompt]
    windows = policy.windows.items()
    return {kind: real if window is None else tree_mask(queries, row, window) for kind, window in windows}


def _chosen(
    policy: Policy,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    likeliest: int,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """Logprobs (scored,) of tokens (scored,); entropy and likeliest tokens of their distributions, as in `Spread`."""
    distribution = log_distribution(policy, hidden, temperature)  # (scored, V)
    logprobs = distribution.gather(-1, tokens[:, None]).squeeze(-1)
    best = distribution.detach().topk(likeliest)
    spread = entropy(distribution if entropy_gradient else distribution.detach())
    return logprobs, spread, best.indices, best.values


def _padded(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (scored, ...) at the places (B, T) where the mask is True, and 0 elsewhere."""
    empty = values.new_zeros((*mask.shape, *values.shape[1:]))
    return empty.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values)
