"""Attention of a decoder over groups: over whole rows when they are scored, over a cache when they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.cache import GroupCache

TREE = "tree"  # as an attention implementation in a decoder's config

ADDITIONS = ("softcap", "s_aux", "position_bias")  # to scores, by some families; none of what is here knows them

Attend = Callable[..., torch.Tensor]  # (module, query, key, value, mask, **kwargs) -> (N, L, heads, head size)


@dataclass
class Pass:
    """A pass through a decoder: how its layers attend, and which have done so."""

    attend: Attend
    attended: list[int | None] = field(default_factory=list)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Let the layers that run inside attend so. Not by an argument: some families do not hand all of them on."""
        before = _pass.set(self)
        try:
            yield
        finally:
            _pass.reset(before)


_pass: ContextVar[Pass | None] = ContextVar("pass", default=None)  # None outside of a decoder


def in_this_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, attending as now whenever it is called: also from a backward, which computes a layer again."""
    current = _pass.get()
    if current is None:
        return function

    def within(*args: Any, **kwargs: Any) -> Any:
        with current.run():
            return function(*args, **kwargs)

    return within


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: the attention that `Policy.decode` was given."""
    unknown = [name for name in ADDITIONS if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} adds {', '.join(unknown)} to its scores, which is not done here")
    current = _pass.get()
    current.attended.append(getattr(module, "layer_idx", None))
    return current.attend(module, query, key, value, attention_mask, **kwargs), None


def attend_to_row(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **kwargs
) -> torch.Tensor:
    """Attend under a mask (N, 1, Lm, S) that stands for the last Lm of L queries; those before attend causally.

    A prompt at the head of a row sees itself and nothing of the branches, so it needs no mask, and causal kernels skip
    half of its pairs and all pairs with the branches. query: (N, heads, L, head size); gives (N, L, heads, head size).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = query.shape[2] - mask.shape[2]
    kwargs.pop("is_causal", None)
    outputs = []
    if causal:
        own = (tensor[:, :, :causal] for tensor in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *own, None, is_causal=True, **kwargs)[0])
    if causal < query.shape[2]:
        outputs.append(sdpa_attention_forward(module, query[:, :, causal:], key, value, mask, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class BlockAttention:
    """Attention of whole rows to themselves by FlexAttention, which leaves out the blocks that a mask leaves empty.

    On a GPU one compiled kernel, without a mask of all pairs in memory; elsewhere the uncompiled reference, which has
    no backward and is for tests. It has been run on no GPU yet.
    masks: of each layer.
    """

    masks: tuple[BlockMask, ...]

    def __call__(self, module: torch.nn.Module, query, key, value, mask, *, scaling, **kwargs) -> torch.Tensor:
        """query: (N, heads, L, head size); gives (N, L, heads, head size)."""
        usual = query.shape[-1] ** -0.5
        if scaling != usual:  # not as an argument: with dynamic shapes a number would become a variable of the kernel
            query = query * (scaling / usual)
        attend = _compiled_flex_attention() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        blocks = self.masks[module.layer_idx]
        return attend(query, key, value, block_mask=blocks, enable_gqa=grouped).transpose(1, 2).contiguous()


def block_mask(rule: Callable[..., torch.Tensor], rows: int, length: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 x 128 pairs a rule leaves empty, in part or full, for N rows of L tokens.

    All pairs are held as booleans for a moment.
    """
    return create_block_mask(rule, rows, None, length, length, device=device)


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """FlexAttention compiled once for rows of any length and number.

    Compiled for each length, it would be compiled at almost every micro-batch, as prompts and completions have all
    lengths. A few compilations remain: for one row and for several, with and without gradients, with and without a
    window. Beyond the limit of their number torch would go on uncompiled, holding the scores of all pairs; `fullgraph`
    makes that an error.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@dataclass(frozen=True)
class PrefillAttention:
    """Attention of prompts to themselves, which leaves their keys and values in rows of a cache."""

    cache: GroupCache
    rows: Sequence[int]

    def __call__(self, module: torch.nn.Module, query, key, value, mask, **kwargs) -> torch.Tensor:
        self.cache.fill(module.layer_idx, self.rows, key, value)
        return attend_to_row(module, query, key, value, mask, **kwargs)


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one new token of each of B branches to its prompt and to the branch itself, by way of a cache.

    A prompt's keys are read once for all of its branches, and a branch reads no sibling's; so a step costs what its own
    branches cost, however many there have been.

    step: (B,) where in its branch each token stands. place: (B,) where a branch stands in a grid of R rows of G places,
    row * G + place. branch: (R * G,) which branch stands there; any, where none does.
    rows, prompt, steps: how many rows, tokens of a prompt and tokens of a branch are in use.
    """

    cache: GroupCache
    step: torch.Tensor
    place: torch.Tensor
    branch: torch.Tensor
    rows: int
    prompt: int
    steps: int

    def __call__(self, module: torch.nn.Module, query, key, value, mask, *, scaling, **kwargs) -> torch.Tensor:
        """query: (B, heads, 1, head size); mask: (B, 1, 1, P + T), of addends; gives (B, 1, heads, head size)."""
        count, heads = query.shape[0], key.shape[1]
        branches = torch.arange(count, device=query.device)
        own = []
        for kept, new in zip(self.cache.branches(module.layer_idx), (key, value), strict=True):
            kept[branches, :, self.step] = new[:, :, 0]
            own.append(kept[:count, :, : self.steps])
        prompt_keys, prompt_values = (t[: self.rows, :, : self.prompt] for t in self.cache.prompts(module.layer_idx))
        query = query.reshape(count, heads, -1, query.shape[-1])  # query heads that share a key's are neighbours
        to_prompt = self._from_rows(_products(self._to_rows(query), prompt_keys))
        products = torch.cat([to_prompt, _products(query, own[0])], dim=-1)  # (B, heads, shared, P + T)
        weights = torch.add(mask, products, alpha=scaling).softmax(dim=-1).to(query.dtype)
        heard = self._from_rows(self._to_rows(weights[..., : self.prompt]) @ prompt_values)
        return (heard + weights[..., self.prompt :] @ own[1]).reshape(count, 1, -1, value.shape[-1])

    def _to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, heads, shared, X) of branches to (R, heads, G * shared, X) of rows."""
        grid = tensor[self.branch].unflatten(0, (self.rows, -1))
        return grid.transpose(1, 2).flatten(2, 3)

    def _from_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(R, heads, G * shared, X) of rows to (B, heads, shared, X) of branches."""
        grid = tensor.unflatten(2, (len(self.branch) // self.rows, -1))
        return grid.transpose(1, 2).flatten(0, 1)[self.place]


def _products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Queries (..., Lq, size) times keys (..., Lk, size), in float32: in half, scores would lose their last digits."""
    if queries.dtype == torch.float32:
        return queries @ keys.mT
    if queries.is_cuda:
        products = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return products.unflatten(0, queries.shape[:2])
    return queries.float() @ keys.float().mT


def use_tree_attention(config) -> None:
    """Let the decoder of a transformers config, and nothing else, attend by `tree_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(TREE, tree_attention)
    config._attn_implementation = TREE
