"""Policy and completions -> logprobs: one tree-masked row per group, the LM head only where a completion is scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from hark.grpo.distribution import entropy, log_distribution
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_mask, tree_masks, tree_rule
from hark.models.attention import AttentionFunction, BlockAttention, block_mask
from hark.models.policy import Policy, Prompt, on_policy
from hark.models.split_attention import SplitAttention

CHUNK = 2048  # scored tokens whose vocabulary-wide logits exist at the same time


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
    """Logprobs (B, T) of completions (B, T) under the sampled distribution, and its entropy in nats (B, T).

    Gradients flow through the logprobs into every trained parameter, the audio tower included; not through the entropy.
    """
    hidden = _predicting_states(policy, prompts, tokens, group_size)[mask]  # (scored, D)
    chosen = tokens[mask]
    chunks = list(zip(hidden.split(CHUNK), chosen.split(CHUNK), strict=True))
    parts = [checkpoint(_chosen, policy, h, c, temperature, use_reentrant=False) for h, c in chunks[:-1]]
    # The backward begins with the last chunk: to compute it again there would free nothing in between.
    parts += [_chosen(policy, h, c, temperature) for h, c in chunks[-1:]]
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    empty = torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy)


def tree_blocks(policy: Policy, row: Layout) -> BlockAttention:
    """The tree mask of whole rows for FlexAttention, made once for each type of layer."""
    blocks = {
        kind: block_mask(tree_rule(row, window), *row.branch.shape, row.branch.device)
        for kind, window in policy.windows.items()
    }
    return BlockAttention(tuple(blocks[kind] for kind in policy.layer_types))


def _predicting_states(
    policy: Policy, prompts: Sequence[Prompt], tokens: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Hidden states (B, T, D) from which each completion token is predicted: those of the token before it.

    A branch's first token is predicted by the prompt's last, and its last token predicts nothing, so T - 1 are fed.
    """
    embeddings, lengths = policy.embed(prompts)  # (N, P, D), (N,)
    count, longest, width = embeddings.shape
    steps = tokens.shape[1] - 1
    fed = policy.embed_tokens(tokens[:, :-1]).reshape(count, group_size * steps, width)
    row = prompt_layout(lengths, longest) + branches_layout(lengths, group_size, steps)
    masks, attend = _row_attention(policy, row, longest, group_size)
    hidden = policy.decode(torch.cat([embeddings, fed], dim=1), masks, row.position, attend)
    first = hidden[torch.arange(count, device=lengths.device), lengths - 1]
    first = first[:, None, None].expand(-1, group_size, -1, -1)  # (N, G, 1, D)
    rest = hidden[:, longest:].unflatten(1, (group_size, steps)) if steps else first[:, :, :0]
    return torch.cat([first, rest], dim=2).flatten(0, 1)


def _row_attention(
    policy: Policy, row: Layout, prompt: int, group_size: int
) -> tuple[dict[str, torch.Tensor] | None, AttentionFunction | None]:
    """The masks under which a row attends to itself, and how: on the CPU layers without a window do it in parts."""
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
    """Logprobs (scored,) of tokens (scored,), and the entropy there; the logits are computed again in the backward."""
    logprobs = log_distribution(policy, hidden, temperature)  # (scored, V)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy(logprobs)
