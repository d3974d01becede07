"""Attention of a row to itself in parts, on the CPU: siblings, which see nothing of each other, cost nothing there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hark.models.attention import attend_to_row

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class SplitRow:
    """The prompt attends to itself causally, each of G branches to the P tokens of the prompt and causally to itself.

    Under one mask over the row, as `attend_to_row` has it, the (G T)^2 pairs between branches are computed and thrown
    away: with completions as long as the prompt, most of the work.
    """

    prompt: int
    group_size: int

    def __call__(self, module: torch.nn.Module, query, key, value, mask, *, scaling, **kwargs) -> torch.Tensor:
        """query: (N, heads, L, head size); mask: (N, 1, 1, P) of addends, or one of the whole row for it all."""
        if mask.shape[-1] == key.shape[2]:
            return attend_to_row(module, query, key, value, mask, scaling=scaling, **kwargs)
        size, widest = value.shape[-1], max(value.shape[-1], key.shape[-1])
        # The kernel wants one head size; zeros add nothing to a product.
        query, key, value = (F.pad(t, (0, widest - t.shape[-1])) for t in (query, key, value))
        shared = query.shape[1] // key.shape[1]  # query heads to a key head, which are neighbours
        if shared > 1:
            key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
        own = F.scaled_dot_product_attention(
            *(t[:, :, : self.prompt] for t in (query, key, value)), is_causal=True, scale=scaling
        )
        sections = [t.tensor_split((self.prompt,), dim=2) for t in (query, key, value)]
        (_, query), (keys, branch_keys), (values, branch_values) = sections
        heard = _BranchAttention.apply(query, keys, values, branch_keys, branch_values, mask, self.group_size, scaling)
        return torch.cat([own, heard], dim=2)[..., :size].transpose(1, 2).contiguous()


class _BranchAttention(torch.autograd.Function):
    """Attention to two sets of keys, each by itself, put together by the sums of their exponentials.

    out = sum_i exp(s_i - s) out_i, where s_i is the log of the sum over part i, and s = log sum_i exp(s_i). Given out
    and s of the whole, the backward of a part is that of any block of flash attention: its probabilities are
    exp(scores - s). So two calls of the kernel do, and no probabilities are kept (ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, query, keys, values, branch_keys, branch_values, mask, group_size, scaling):
        parts = query, branch_keys, branch_values
        far, far_sum = flash(query, keys, values, attn_mask=mask, scale=scaling)
        near, near_sum = flash(*(_apart(t, group_size) for t in parts), is_causal=True, scale=scaling)
        near, near_sum = _together(near, group_size), _together(near_sum, group_size)
        total = torch.logaddexp(far_sum, near_sum)  # (N, heads, G T)
        out = far * (far_sum - total).exp()[..., None] + near * (near_sum - total).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, keys, values, branch_keys, branch_values, mask, out, total)
        ctx.group_size, ctx.scaling = group_size, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, keys, values, branch_keys, branch_values, mask, out, total = ctx.saved_tensors
        far = flash_backward(gradient, query, keys, values, out, total, 0.0, False, attn_mask=mask, scale=ctx.scaling)
        parts = gradient, query, branch_keys, branch_values, out, total
        near = flash_backward(*(_apart(t, ctx.group_size) for t in parts), 0.0, True, scale=ctx.scaling)
        near = [_together(t, ctx.group_size) for t in near]
        return far[0] + near[0], far[1], far[2], near[1], near[2], None, None, None


def _apart(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N, heads, G T, ...) of rows to (N G, heads, T, ...) of branches."""
    return tensor.unflatten(2, (group_size, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _together(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N G, heads, T, ...) of branches to (N, heads, G T, ...) of rows."""
    return tensor.unflatten(0, (-1, group_size)).transpose(1, 2).flatten(2, 3)
