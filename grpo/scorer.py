"""Policy and completions -> logprobs: one tree-masked row per group, the LM head at completion tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from hark.grpo.distribution import entropy, log_distribution
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_mask, tree_masks, tree_rule
from hark.models.attention import AttentionFunction, BlockAttention, block_mask
from hark.models.policy import Policy, Prompt, on_policy
from hark.models.split_attention import SplitAttention

CHUNK = 2048  # scored tokens whose logits over the vocabulary exist at the same time


@on_policy
def score(
    policy: Policy,
    prompts: Sequence[Prompt],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    group_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs (B, T) of completions (B, T) under `log_distribution`, and its entropy (B, T) in nats.

    The logprobs have a gradient for every trained parameter, those of the audio tower included; the entropy has none.
    """
    hidden = _predicting_states(policy, prompts, tokens, group_size)[mask]  # (scored, D)
    chosen = tokens[mask]
    chunks = list(zip(hidden.split(CHUNK), chosen.split(CHUNK), strict=True))
    parts = [checkpoint(_chosen, policy, h, c, temperature, use_reentrant=False) for h, c in chunks[:-1]]
    # The backward starts with the last chunk, so recomputing that one would save no memory.
    parts += [_chosen(policy, h, c, temperature) for h, c in chunks[-1:]]
    logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    empty = torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies)


def tree_blocks(policy: Policy, row: Layout) -> BlockAttention:
    """FlexAttention of rows under the tree mask; one block mask per type of layer."""
    (count, length), device = row.branch.shape, row.branch.device
    blocks = {
        kind: block_mask(tree_rule(row, window), count, length, device) for kind, window in policy.windows.items()
    }
    return BlockAttention(tuple(blocks[kind] for kind in policy.layer_types))


def _predicting_states(
    policy: Policy, prompts: Sequence[Prompt], tokens: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Hidden states (B, T, D) that predict the completion tokens; each is that of the token before.

    The prompt's last token predicts a branch's first. A branch's last token predicts nothing, so T - 1 tokens are fed.
    """
    policy.check_length(max(len(prompt.ids) for prompt in prompts) + tokens.shape[1] - 1)
    embeddings, lengths = policy.embed(prompts)  # (N, P, D), (N,)
    count, longest, width = embeddings.shape
    steps = tokens.shape[1] - 1
    fed = policy.embed_tokens(tokens[:, :-1]).reshape(count, group_size * steps, width)
    row = prompt_layout(lengths, longest) + branches_layout(lengths, group_size, steps)
    masks, attention = row_attention(policy, row, longest, group_size)
    hidden = policy.decode(torch.cat([embeddings, fed], dim=1), masks, row.position, attention)
    first = hidden[torch.arange(count, device=lengths.device), lengths - 1]
    first = first[:, None, None].expand(-1, group_size, -1, -1)  # (N, G, 1, D)
    rest = hidden[:, longest:].unflatten(1, (group_size, steps)) if steps else first[:, :, :0]
    return torch.cat([first, rest], dim=2).flatten(0, 1)


def row_attention(
    policy: Policy, row: Layout, prompt: int, group_size: int
) -> tuple[dict[str, torch.Tensor] | None, AttentionFunction | None]:
    """The masks of rows, None if none are needed, and the attention function, None for the default.

    On the CPU, layers without a window compute the attention of prompt and branches separately (`SplitAttention`).
    """
    if policy.attention == "flex":
        return None, tree_blocks(policy, row)
    if policy.device.type != "cpu" or row.real.shape[1] == prompt:
        return tree_masks(policy.windows, row, row, prompt=prompt), None
    real = row.real[:, None, None, :prompt]
    masks = {kind: real if window is None else tree_mask(row, row, window) for kind, window in policy.windows.items()}
    return masks, SplitAttention(prompt, group_size)


def _chosen(
    policy: Policy, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs (scored,) of tokens (scored,), and the entropy of their distributions."""
    logprobs = log_distribution(policy, hidden, temperature)  # (scored, V)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy(logprobs)
