"""Attention of a decoder over a group row, on top of transformers' sdpa."""

from __future__ import annotations

import torch

from data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)

TREE = "tree"  # as an attention implementation in a decoder's config


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend under a mask (N, 1, Lm, S) that stands for the last Lm of L queries; those before attend causally.

    A prompt at the head of a row sees itself and nothing of the branches, so it needs no mask, and causal kernels skip
    half of its pairs and all pairs with the branches. query: (N, heads, L, head size); gives (N, L, heads, head size).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = query.shape[2] - attention_mask.shape[2]
    kwargs.pop("is_causal", None)
    outputs = []
    if causal:
        own = (tensor[:, :, :causal] for tensor in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *own, None, is_causal=True, **kwargs)[0])
    if causal < query.shape[2]:
        outputs.append(sdpa_attention_forward(module, query[:, :, causal:], key, value, attention_mask, **kwargs)[0])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def use_tree_attention(config) -> None:
    """Let the decoder of a transformers config, and nothing else, attend by `tree_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, tree_attention)
    config._attn_implementation = TREE
