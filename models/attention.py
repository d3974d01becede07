"""Attention functions of a decoder: over rows for scoring, over a KV cache for prefill and decoding.

A row is a prompt and the G completions of its group, called branches. A branch attends to the prompt and to itself, not
to other branches. This is the tree mask, which grpo/tree.py builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hark import UserError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.cache import GroupCache

TREE = "tree"  # the name under which `tree_attention` is registered with transformers

# Short rows take the same kernel, and not the one for decoding, which is another compilation.
KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
BLOCK = 128  # tokens along each side of a block of FlexAttention's masks
MASK_STRIDE = 8  # elements; strides of a mask that torch's memory-efficient kernel can read are multiples of it
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments by which some families change the attention scores

# (module, query, key, value, mask, **kwargs) -> (N, L, heads, head size)
AttentionFunction = Callable[..., Tensor]


class AttentionError(UserError, ValueError):
    """A layer computes its attention in a way that rows of branches do not have."""


@dataclass
class DecoderPass:
    """One forward pass of a decoder: the attention function of its layers, its masks, and the layers that called it."""

    attention: AttentionFunction
    masks: tuple[Tensor | None, ...] = ()
    called: list[int | None] = field(default_factory=list)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the current pass inside the block.

        A context variable and not a keyword argument, because some families do not pass unknown arguments to layers.
        """
        token = _current_pass.set(self)
        try:
            yield
        finally:
            _current_pass.reset(token)


_current_pass: ContextVar[DecoderPass | None] = ContextVar("current_pass", default=None)


def bind_current_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it always runs in the pass that is current now.

    Gradient checkpointing calls a layer again in the backward, after the pass has ended.
    """
    current = _current_pass.get()
    if current is None:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with current.active():
            return function(*args, **kwargs)

    return run


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer. It calls the attention that was passed to `Policy.decode`.

    Raises AttentionError for a layer that changes its scores by an argument in UNSUPPORTED, or by a mask of its own.
    """
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported:
        raise AttentionError(
            f"{type(module).__name__} passes {', '.join(unsupported)} to its attention, which is not supported; "
            "choose another model"
        )
    current = _current_pass.get()
    assert current is not None  # only `Policy.decode` calls a decoder
    if not any(_is_view_of(attention_mask, mask) for mask in current.masks):
        raise AttentionError(f"{type(module).__name__} makes a mask of its own; choose another model")
    current.called.append(getattr(module, "layer_idx", None))
    return current.attention(module, query, key, value, attention_mask, **kwargs), None


def _is_view_of(tensor: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a tensor is a mask, or a view of its memory as Gemma 4 passes it on."""
    if tensor is None or mask is None:
        return tensor is mask
    return tensor is mask or tensor._base is not None and tensor._base is (mask if mask._base is None else mask._base)


def mask_row(keys: int) -> int:
    """The elements from one row of a mask to the next: `keys`, rounded up to a multiple of MASK_STRIDE."""
    return -(-keys // MASK_STRIDE) * MASK_STRIDE


def sdpa_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    """Attention by torch's scaled_dot_product_attention, with a mask for the last queries of a row only.

    mask: additive, (N, 1, Lm, S), for the last Lm of L queries. The first L - Lm queries attend causally to one
    another. They are the prompt, which comes first in a row and never attends to the branches after it. The causal
    kernel skips half of the pairs within the prompt. Pairs of prompt queries and branch keys are not computed.
    query: (N, heads, L, head size); returns (N, L, heads, head size).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = query.shape[2] - mask.shape[2]
    kwargs.pop("is_causal", None)
    outputs = []
    if causal:
        q, k, v = (tensor[:, :, :causal] for tensor in (query, key, value))
        outputs.append(sdpa_attention_forward(module, q, k, v, None, is_causal=True, **kwargs)[0])
    if causal < query.shape[2]:
        outputs.append(sdpa_attention_forward(module, query[:, :, causal:], key, value, mask, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class BlockAttention:
    """Self-attention of rows by FlexAttention, which skips blocks of pairs that are entirely masked.

    On a GPU it is one compiled kernel and needs no mask of all pairs in memory. On the CPU it is torch's uncompiled
    reference, which has no backward and is for tests. It has not been run on a GPU yet.
    masks: one for each layer, of the rows' queries and keys.
    """

    masks: tuple[BlockMask, ...]

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **kwargs: Any
    ) -> Tensor:
        """query: (N, heads, L, head size); returns (N, L, heads, head size)."""
        default = query.shape[-1] ** -0.5
        if scaling != default:  # the kernel's `scale` would become a dynamic input when compiled for dynamic shapes
            query = query * (scaling / default)
        attention: Any = _compiled_flex_attention() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        blocks = self.masks[module.layer_idx]
        output = attention(query, key, value, block_mask=blocks, enable_gqa=grouped, kernel_options=KERNEL)
        return output.transpose(1, 2).contiguous()


def block_mask(some: Tensor, every: Tensor, rule: Callable[..., Tensor], lengths: tuple[int, int]) -> BlockMask:
    """FlexAttention's mask of N rows, from what is known of its blocks.

    some, every: whether some pair and whether every pair of a block attends, (N, query blocks, key blocks) bool.
    rule: FlexAttention's `mask_mod`. It is applied in blocks of which not every pair is known to attend.
    lengths: queries and keys in a row.
    """
    parts, wholes = _listed(some & ~every), _listed(every)
    return BlockMask.from_kv_blocks(*parts, *wholes, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=lengths)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries how many key blocks are True, (N, 1, Q), and the indices, those first, (N, 1, Q, K)."""
    chosen = blocks[:, None].int()
    indices = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), indices.int()


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention compiled once for rows of any length and number.

    When torch exceeds its recompilation limit it falls back to uncompiled code, which holds the scores of all pairs;
    `fullgraph` makes that an error.
    """
    return compiled(flex_attention, fullgraph=True)


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """A function compiled by torch for tensors of any length and number of rows, when it is first called.

    Lengths change at almost every micro-batch, so with static shapes each would need a compilation. A few compilations
    remain: for one row and for several, shorter than a block or not, with and without gradients, with and without a
    window, and for branches after known prompts.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True, **settings)


@dataclass(frozen=True)
class PromptAttention:
    """Causal self-attention of N prompts that also puts their keys and values, with their graph, into a list.

    layers: takes the keys and values (N, heads, P, head size) of each layer.
    """

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        if module.layer_idx == len(self.layers):  # else a layer is computed again, in the backward
            self.layers.append((key, value))
        return sdpa_attention(module, query, key, value, mask, **kwargs)


@dataclass(frozen=True)
class PrefillAttention:
    """Causal self-attention of N prompts that also stores their keys and values in rows of a cache.

    kept: takes them with their graph too; None without one.
    """

    cache: GroupCache
    rows: Sequence[int]
    kept: PromptAttention | None = None

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        self.cache.fill(module.layer_idx, self.rows, key.detach(), value.detach())
        return (self.kept or sdpa_attention)(module, query, key, value, mask, **kwargs)


@dataclass(frozen=True)
class AfterPrompt:
    """Attention of branches to prompts whose keys and values are known, and to one another.

    layers: the prompts' keys and values, (N, heads, P, head size), of each layer. attention: computes it, from the keys
    and values of prompts and branches.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    attention: AttentionFunction = field(default=sdpa_attention, kw_only=True)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """mask: additive, (N, 1, L, P + L), of L tokens of branches; returns (N, L, heads, head size)."""
        both = zip(self.layers[module.layer_idx], (key, value), strict=True)
        key, value = (torch.cat(pair, dim=2) for pair in both)
        return self.attention(module, query, key, value, mask, **kwargs)


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one new token per branch, for B branches, to its prompt and to its own branch, both in a cache.

    The branches of one prompt share a batched product, so the prompt's keys are read once for all of them. The cost of
    a step depends only on the branches in it.

    step: (B,) index of each new token in its branch.
    cell: (B,) index of each branch in a grid of R rows (prompts) by G branches, row * G + branch of the group; None if
    the branches fill the grid, in order.
    branch_of_cell: (R * G,) the inverse: which of the B branches is in each cell; any valid index in an empty cell.
    rows, prompt, steps: how many rows, prompt tokens and branch tokens of the cache are read.
    """

    cache: GroupCache
    step: Tensor
    cell: Tensor | None
    branch_of_cell: Tensor
    rows: int
    prompt: int
    steps: int

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **kwargs: Any
    ) -> Tensor:
        """query: (B, heads, 1, head size); mask: additive, (B, 1, 1, P + T); returns (B, 1, heads, head size)."""
        count, heads = query.shape[0], key.shape[1]
        own = []
        for cached, new in zip(self.cache.branches(module.layer_idx), (key, value), strict=True):
            cached[self._branches, :, self.step] = new[:, :, 0]
            own.append(cached[:count, :, : self.steps])
        prompt_keys, prompt_values = (t[: self.rows, :, : self.prompt] for t in self.cache.prompts(module.layer_idx))
        query = query.reshape(count, heads, -1, query.shape[-1])  # `shared` adjacent query heads per key head
        prompt_scores = self._from_rows(_scores(self._to_rows(query), prompt_keys))
        scores = torch.cat([prompt_scores, _scores(query, own[0])], dim=-1)  # (B, key heads, shared, P + T)
        weights = torch.add(mask, scores, alpha=scaling).softmax(dim=-1).to(query.dtype)
        from_prompt = self._from_rows(self._to_rows(weights[..., : self.prompt]) @ prompt_values)
        parts = from_prompt, weights[..., self.prompt :], own[1]
        return torch.baddbmm(*(part.flatten(0, 1) for part in parts)).view(count, 1, -1, value.shape[-1])

    @cached_property
    def _branches(self) -> Tensor:
        """(B,) the indices of all branches, for all layers."""
        return torch.arange(len(self.step), device=self.step.device)

    def _to_rows(self, tensor: Tensor) -> Tensor:
        """Regroup (B, key heads, shared, X), one per branch, as (R, key heads, G * shared, X), one per prompt."""
        cells = tensor if self.cell is None else tensor[self.branch_of_cell]
        return cells.unflatten(0, (self.rows, -1)).transpose(1, 2).flatten(2, 3)

    def _from_rows(self, tensor: Tensor) -> Tensor:
        """The inverse of `_to_rows`: (R, key heads, G * shared, X) to (B, key heads, shared, X)."""
        cells = tensor.unflatten(2, (len(self.branch_of_cell) // self.rows, -1))
        branches = cells.transpose(1, 2).flatten(0, 1)
        return branches if self.cell is None else branches[self.cell]


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products (..., Lq, Lk) of queries (..., Lq, size) and keys (..., Lk, size), always in float32.

    Rounded to half precision, scores would lose digits that the softmax needs.
    """
    if queries.dtype == torch.float32:
        return queries @ keys.mT
    if queries.is_cuda:
        scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.unflatten(0, queries.shape[:2])
    return queries.float() @ keys.float().mT


def use_tree_attention(config: Any, function: Callable[..., Any] = tree_attention) -> None:
    """Make `tree_attention` the attention implementation of a decoder, given its transformers config.

    function: what is called for it in the decoders of this process.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, function)
    config._attn_implementation = TREE
