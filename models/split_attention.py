"""Self-attention of rows on the CPU, without the pairs of tokens in different branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hark.models.attention import AfterPrompt, sdpa_attention

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class SplitAttention:
    """Causal attention within the prompt; attention of each of G branches to the prompt, and causally to itself.

    `sdpa_attention` computes all (G T)^2 pairs of the branches' tokens and masks most of them. If completions are as
    long as the prompt, these are most of its work.
    prompt: P, the tokens of the padded prompt.
    """

    prompt: int
    group_size: int

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **kwargs: Any
    ) -> Tensor:
        """query: (N, heads, L, head size); returns (N, L, heads, head size).

        mask: additive, (N, 1, 1, P), over the prompts' padding; or (N, 1, L, L), which is left to `sdpa_attention`.
        """
        if mask.shape[-1] == key.shape[2]:
            return sdpa_attention(module, query, key, value, mask, scaling=scaling, **kwargs)
        size = value.shape[-1]
        query, key, value = _alike(query, key, value)
        sections = [t.tensor_split((self.prompt,), dim=2) for t in (query, key, value)]
        (prompt_query, query), (keys, branch_keys), (values, branch_values) = sections
        in_prompt = F.scaled_dot_product_attention(prompt_query, keys, values, is_causal=True, scale=scaling)
        parts = query, keys, values, branch_keys, branch_values
        in_branches = _BranchAttention.apply(*parts, mask, self.group_size, scaling)
        return torch.cat([in_prompt, in_branches], dim=2)[..., :size].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class SplitAfterPrompt(AfterPrompt):
    """The same for branches alone, after prompts whose keys and values are known."""

    group_size: int

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """mask: additive, (N, 1, 1, P), over the prompts' padding; or (N, 1, L, P + L), left to `AfterPrompt`."""
        keys, values = self.layers[module.layer_idx]
        if mask.shape[-1] != keys.shape[2]:
            return super().__call__(module, query, key, value, mask, **kwargs)
        parts = _alike(query, keys, values, key, value)
        out = _BranchAttention.apply(*parts, mask, self.group_size, kwargs["scaling"])
        return out[..., : value.shape[-1]].transpose(1, 2).contiguous()


def _alike(query: Tensor, *others: Tensor) -> list[Tensor]:
    """Queries, keys and values with one head size and a key head for each query head, as the kernel requires.

    Appended zeros change no product; they are cut off from the output.
    """
    widest = max(t.shape[-1] for t in (query, *others))
    wide = [F.pad(t, (0, widest - t.shape[-1])) for t in (query, *others)]
    shared = query.shape[1] // others[0].shape[1]  # query heads per key head; these are adjacent
    return [wide[0], *(t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in wide[1:])]


class _BranchAttention(torch.autograd.Function):
    """Attention of branches to two sets of keys, the prompt's and their own, by one kernel call for each set.

    out = sum_i exp(s_i - s) out_i, with out_i the output over set i, s_i the logsumexp of its scores, and
    s = log sum_i exp(s_i). The backward kernel computes probabilities as exp(scores - s) from the s that it is given;
    with the combined out and s it returns the gradients of each set. No probabilities are saved. Ring attention
    combines blocks in the same way (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, query, keys, values, branch_keys, branch_values, mask, group_size, scaling):
        own = query, branch_keys, branch_values
        prompt_out, prompt_sum = flash(query, keys, values, attn_mask=mask, scale=scaling)
        own_out, own_sum = flash(*(_to_branches(t, group_size) for t in own), is_causal=True, scale=scaling)
        own_out, own_sum = _to_rows(own_out, group_size), _to_rows(own_sum, group_size)
        total = torch.logaddexp(prompt_sum, own_sum)  # (N, heads, G T)
        out = prompt_out * (prompt_sum - total).exp()[..., None] + own_out * (own_sum - total).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, keys, values, branch_keys, branch_values, mask, out, total)
        ctx.group_size, ctx.scaling = group_size, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, keys, values, branch_keys, branch_values, mask, out, total = ctx.saved_tensors
        of_query, of_keys, of_values = flash_backward(
            gradient, query, keys, values, out, total, 0.0, False, attn_mask=mask, scale=ctx.scaling
        )
        own = gradient, query, branch_keys, branch_values, out, total
        own = flash_backward(*(_to_branches(t, ctx.group_size) for t in own), 0.0, True, scale=ctx.scaling)
        of_own_query, of_branch_keys, of_branch_values = (_to_rows(t, ctx.group_size) for t in own)
        return of_query + of_own_query, of_keys, of_values, of_branch_keys, of_branch_values, None, None, None


def _to_branches(tensor: Tensor, group_size: int) -> Tensor:
    """Reshape (N, heads, G T, ...) to (N G, heads, T, ...)."""
    return tensor.unflatten(2, (group_size, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _to_rows(tensor: Tensor, group_size: int) -> Tensor:
    """Reshape (N G, heads, T, ...) to (N, heads, G T, ...)."""
    return tensor.unflatten(0, (-1, group_size)).transpose(1, 2).flatten(2, 3)
