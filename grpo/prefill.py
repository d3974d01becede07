"""The forward over prompts with its graph, on which the scorer computes their completions apart.

A prompt attends to none of its completions. So these can be computed alone, in as many parts as one likes, from the
prompts' keys, values and last hidden states. The parts add up the gradients of these, and one backward goes through the
prompts. With rollout.keep_prefill the forward is that of the rollout, whose weights the first update of a step has too.
With optim.micro_branches a group is scored in parts because its row does not fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hark.grpo.tree import prompt_layout, tree_masks
from hark.models.attention import AttentionFunction, PromptAttention
from hark.models.policy import Policy, Prompt, on_policy


@dataclass(frozen=True)
class Prefix:
    """What completions need of their N prompts.

    last: (N, D), the hidden state of each prompt's last token. layers: the keys and the values of each decoder layer,
    (N, heads, P, head size), padded on the right.
    """

    last: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]


def last_states(policy: Policy, prompts: Sequence[Prompt], attention: AttentionFunction) -> torch.Tensor:
    """Hidden states (N, D) of the prompts' last tokens."""
    embeddings, lengths = policy.embed(prompts)  # (N, P, D), (N,)
    layout = prompt_layout(lengths, embeddings.shape[1])
    masks = tree_masks(policy.windows, layout, layout, prompt=embeddings.shape[1])
    hidden = policy.decode(embeddings, masks, layout.position, attention)
    return hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]


class Prefill:
    """The prefix of prompts, with its graph.

    order: the index of each of the prompts. lengths: their tokens.
    """

    def __init__(self, prefix: Prefix, order: Sequence[int], lengths: Sequence[int]):
        self._rows, self._lengths = {n: row for row, n in enumerate(order)}, lengths
        self._outputs = [prefix.last, *(tensor for layer in prefix.layers for tensor in layer)]
        # A leaf for each prompt, not one for all: a micro-batch then computes gradients of its own prompts only.
        self._leaves = [[_leaf(output, row, length) for output in self._outputs] for row, length in enumerate(lengths)]

    def take(self) -> Prefill | None:
        """All of it, once; None from then on.

        The weights change with the first update of a step. An update for which memory ran out frees what it took.
        """
        taken = copy(self) if self._outputs else None
        self._outputs, self._leaves = [], []
        return taken

    def select(self, groups: Sequence[int]) -> Prefix:
        """The prefix of the prompts with the given indices, without the graph behind it."""
        rows = [self._rows[group] for group in groups]
        last, *others = zip(*(self._leaves[row] for row in rows), strict=True)
        longest = max(self._lengths[row] for row in rows)
        keys, values = ([_stacked(leaves, longest) for leaves in others[first::2]] for first in range(2))
        return Prefix(torch.cat(last), list(zip(keys, values, strict=True)))

    def backward(self) -> None:
        """Add the gradients of the prompts' part to those of the weights. Frees the graph."""
        trained = [index for index, output in enumerate(self._outputs) if output.requires_grad]
        gradients = [self._gradient(index) for index in trained]
        outputs, self._outputs, self._leaves = self._outputs, [], []
        torch.autograd.backward([outputs[index] for index in trained], gradients)

    def _gradient(self, index: int) -> torch.Tensor:
        """The gradient of an output; 0 for prompts that no micro-batch had."""
        gradient = torch.zeros_like(self._outputs[index])
        for row, leaves in enumerate(self._leaves):
            own = leaves[index].grad
            if own is not None:
                _of(gradient, row, self._lengths[row]).copy_(own)
                leaves[index].grad = None
        return gradient


@on_policy
def prefilled(policy: Policy, prompts: Sequence[Prompt]) -> Prefill:
    """The prefix of prompts, with its graph if gradients are on."""
    attention = PromptAttention()
    prefix = Prefix(last_states(policy, prompts, attention), attention.layers)
    return Prefill(prefix, range(len(prompts)), [len(prompt.ids) for prompt in prompts])


def _of(output: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """The part of one prompt, as a view: (1, D), or (1, heads, length, head size)."""
    return output[row : row + 1] if output.dim() == 2 else output[row : row + 1, :, :length]


def _leaf(output: torch.Tensor, row: int, length: int) -> torch.Tensor:
    return _of(output, row, length).detach().requires_grad_(output.requires_grad)


def _stacked(leaves: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """Keys or values of several prompts; of one alone they are not copied."""
    if len(leaves) == 1:
        return leaves[0]
    return torch.cat([pad(leaf, (0, 0, 0, longest - leaf.shape[2])) for leaf in leaves])
