"""Which attention the scorer takes with model.attention=auto: FlexAttention, where it was checked on the device.

The check compares it with sdpa in a small row of each kind of layer that the policy has, in values and gradients, by
the compiled kernel that training calls. No GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from hark.grpo.blocks import tree_block_mask
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.grpo.runtime.sharding import release
from hark.grpo.tree import branches_layout, prompt_layout, tree_mask, tree_masks
from hark.models.attention import AttentionFunction, BlockAttention, BlockMask, sdpa_attention
from hark.models.directory import in_short
from hark.models.policy import Policy, on_policy

# Tokens of siblings in a row from which it may pay to leave them out. Their pairs are then 4 % of the multiply-adds of
# a layer of a 7B, and about three times as much of its time, as masked attention is slower than products. With fewer,
# the minutes of compilation may cost more than they save. This is computed, and was not measured on a GPU.
LEAST = 1024
# The largest difference of a token's output or gradient from that in float32, relative to its norm. Both kernels add
# some hundred products in another order. bfloat16 has 8 bits: inputs, weights of the softmax and results are rounded by
# up to 1/512 each, with which sdpa differs by up to 0.01 on the CPU. One key too many of 300 makes some 0.05.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# The row that is computed: five blocks of 128 tokens, the last not complete, among them some of siblings alone, some
# within a prompt, and some with its padding.
PROMPTS, GROUP, STEPS, WINDOW = (150, 40), 3, 150, 100

Flex = Callable[[tuple[BlockMask, ...]], AttentionFunction]  # makes FlexAttention of the masks of layers


@dataclass(frozen=True)
class LayerKind:
    """What a layer passes to its attention: its heads, those of keys, their sizes, its scaling, whether in a window."""

    heads: int
    key_heads: int
    size: int
    value_size: int
    scaling: float
    dtype: torch.dtype
    has_window: bool = False

    def __str__(self) -> str:
        of_values = f", values of {self.value_size}" if self.value_size != self.size else ""
        window = ", in a window" if self.has_window else ""
        return f"{self.heads} and {self.key_heads} heads of {self.size}{of_values}, {self.dtype}{window}"


def chosen_attention(
    policy: Policy, world: World, *, branches: int, max_new_tokens: int, apart: Iterable[bool]
) -> tuple[str, str]:
    """What `Policy.attention` becomes with model.attention=auto, and why; all ranks choose alike.

    branches: completions of a group that are scored at a time, of at most `max_new_tokens`. apart: whether they are
    scored in whole rows (False), after known prompts (True), or as both.
    """
    if policy.device.type != "cuda":
        return "sdpa", "FlexAttention needs a GPU"
    if not has_many_siblings(branches, max_new_tokens):
        return "sdpa", f"a token has less than {LEAST} tokens of other completions in its row"
    with world.progress.during("check of FlexAttention", long=True):
        fault = agreed_fault(policy, world, apart)
    return ("sdpa", fault) if fault else ("flex", "it computes on this device what sdpa does")


def has_many_siblings(branches: int, max_new_tokens: int) -> bool:
    """Whether the other branches of a row may have so many tokens that it pays not to compute them."""
    return (branches - 1) * (max_new_tokens - 1) >= LEAST


def agreed_fault(policy: Policy, world: World, apart: Iterable[bool], flex: Flex = BlockAttention) -> str | None:
    """What `fault_of` says of a policy's layers on the first rank where it finds a fault; None if on none."""
    kinds = layer_kinds(policy)
    release(policy)
    found = exchange_rows([fault_of(kinds, policy.device, apart, flex)], world)
    return next((fault for fault in found if fault), None)


@on_policy
@torch.no_grad()
def layer_kinds(policy: Policy) -> list[LayerKind]:
    """The kinds of layers of a decoder, from what they pass to attention in a forward over two tokens."""
    kinds: list[LayerKind] = []

    def noted(module, query, key, value, mask, *, scaling, **kwargs):
        has_window = policy.windows[policy.layer_types[module.layer_idx]] is not None
        sizes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        kinds.append(LayerKind(*sizes, scaling, query.dtype, has_window))
        return sdpa_attention(module, query, key, value, mask, scaling=scaling, **kwargs)

    tokens = torch.tensor([[policy.stop_ids[0]] * 2], device=policy.device)
    row = prompt_layout(torch.tensor([2], device=policy.device), 2)
    policy.decode(policy.embed_tokens(tokens), tree_masks(policy.windows, row, row), row.position, noted)
    return list(dict.fromkeys(kinds))


def fault_of(
    kinds: Iterable[LayerKind], device: torch.device, apart: Iterable[bool], flex: Flex = BlockAttention
) -> str | None:
    """Why FlexAttention is of no use for layers of these kinds, in words; None if it computes what sdpa does."""
    for kind in kinds:
        for alone in apart:
            try:
                gap = largest_gap(kind, device, alone, flex)
            except Exception as error:  # compilers raise any kind
                return f"FlexAttention fails for {kind}: {in_short(error)}"
            if not gap <= BOUNDS[kind.dtype]:  # nor if it is NaN
                return f"FlexAttention differs from sdpa by {gap:.1e}, more than {BOUNDS[kind.dtype]}, for {kind}"
    return None


def largest_gap(kind: LayerKind, device: torch.device, alone: bool, flex: Flex = BlockAttention) -> float:
    """The largest difference of a token's output or gradient from that of sdpa in float32, relative to its norm.

    The median norm where its own is less. alone: branches after known prompts instead of whole rows.
    """
    lengths = torch.tensor(PROMPTS, device=device)
    branches = branches_layout(lengths, GROUP, STEPS)
    row = prompt_layout(lengths, max(PROMPTS)) + branches
    queries, window = branches if alone else row, WINDOW if kind.has_window else None
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int, size: int, factor: float = 1.0) -> torch.Tensor:
        numbers = factor * torch.randn(len(PROMPTS), tokens, heads, size, generator=generator)
        return numbers.to(device, kind.dtype)

    count, keys = queries.branch.shape[1], row.branch.shape[1]
    spread = kind.size**-0.5 / kind.scaling  # with which scores have a deviation of 1
    query, wanted = draw(count, kind.heads, kind.size, spread), draw(count, kind.heads, kind.value_size)
    key, value = draw(keys, kind.key_heads, kind.size), draw(keys, kind.key_heads, kind.value_size)
    real = queries.real[:, :, None, None]  # outputs at padding are never used
    # So sdpa may see all of a row there: with nothing to see its gradients would be NaN.
    hidden = ~(tree_mask(queries, row, window) | ~queries.real[:, None, :, None])
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    exact = [tensor.float() for tensor in (query, key, value, wanted * real)]
    expected = _computed(sdpa_attention, kind, mask, *exact)
    attention = flex((tree_block_mask(queries, row, window),))
    found = _computed(attention, kind, None, query, key, value, wanted * real)
    found[0], expected[0] = found[0] * real, expected[0] * real
    return torch.stack(list(map(_gap, found, expected))).max().item()  # NaN if one of them is


def _computed(
    attention: AttentionFunction,
    kind: LayerKind,
    mask: torch.Tensor | None,
    *tensors: torch.Tensor,
) -> list[torch.Tensor]:
    """The output of an attention and the gradients of query, key and value, each (N, tokens, heads, size).

    tensors: these three and the gradient of the output, of the same form.
    """
    *inputs, wanted = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    groups = kind.heads // kind.key_heads
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=groups, training=False, is_causal=True)
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    output = attention(module, query, key, value, mask, scaling=kind.scaling)
    return [output.detach(), *torch.autograd.grad(output, inputs, wanted)]


def _gap(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    difference = (found.float() - expected).flatten(2).norm(dim=-1)  # (N, tokens)
    size = expected.flatten(2).norm(dim=-1)
    return (difference / size.clamp(min=size.median())).max()
