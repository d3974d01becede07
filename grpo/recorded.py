"""Decode steps that are recorded as CUDA graphs once and replayed in all rollouts.

A graph reads the same memory at each replay. So the weights, the cache and the tensors that a step reads keep their
addresses from rollout to rollout. FSDP gathers weights to new addresses each time, and they are copied from there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hark.grpo.runtime.cuda import CudaGraphs, recorder
from hark.models.cache import GroupCache
from hark.models.policy import Policy

Inputs = TypeVar("Inputs", bound="tuple[torch.Tensor, ...]")


class RecordedSteps:
    """The recorded decode steps of a policy, and the memory that they read.

    weights: None if the policy stays gathered for as long as this exists.
    """

    def __init__(self, graphs: CudaGraphs, weights: FixedWeights | None):
        self._graphs, self._weights = graphs, weights
        self._cache: GroupCache | None = None
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._kind: tuple[Hashable, ...] = ()

    def begin(self, kind: tuple[Hashable, ...], rows: int, prompt: int, branches: int, steps: int) -> GroupCache:
        """Begin a rollout; returns its cache, of at least these sizes.

        kind: the other numbers on which a step depends. The policy must be gathered.
        """
        self._kind = kind
        if self._weights is not None:
            self._weights.copy()
        if self._cache is None:
            self._cache = GroupCache(rows, prompt, branches, steps)
        elif self._cache.renew(rows, prompt, branches, steps):
            self._graphs.forget()
        return self._cache

    def keep(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A tensor with these values, at the address of earlier ones of this name, shape and type."""
        kept = self._tensors.setdefault((name, values.shape, values.dtype), values)
        self._kind += (values.shape,)
        return kept if kept is values else kept.copy_(values)

    def forget(self) -> None:
        """Record anew what is called next, because the cache has moved."""
        self._graphs.forget()

    def end(self) -> None:
        """End a rollout. A cache that has grown is freed, and the next rollout records its steps anew."""
        if self._cache is not None and self._cache.has_grown:
            self._cache = None
            self._graphs.forget()

    def __call__(self, step: Callable[[Inputs], None], inputs: Inputs, sizes: Hashable) -> None:
        """Do a decode step, recorded or for the first times. sizes: those of its tensors."""

        def with_copies(inputs: Inputs) -> None:  # a replay does not call it
            with nullcontext() if self._weights is None else self._weights.used():
                step(inputs)

        self._graphs(with_copies, inputs, (*self._kind, sizes))


def recorded_steps(policy: Policy, *, wanted: bool, gathered: bool = False) -> RecordedSteps | None:
    """What records the decode steps of a policy; None if that is not wanted, or not possible.

    It is possible on a GPU, for rotary frequencies that do not change with the longest position.
    gathered: whether the policy is gathered once for all rollouts.
    """
    graphs = recorder(policy.device) if wanted and policy.dynamic_rope_type is None else None
    return None if graphs is None else RecordedSteps(graphs, None if gathered else FixedWeights(policy))


class FixedWeights:
    """Copies of the weights that a decode step reads and that FSDP gathers, at addresses that stay the same."""

    def __init__(self, policy: Policy):
        encoding = [module for module in (policy.tower, *policy.projectors) if module is not None]
        others = {parameter for module in encoding for parameter in module.parameters()}
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # a tied weight has several
        for module in policy.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                gathers: bool = isinstance(parameter, DTensor) and parameter not in others
                if gathers:
                    places.setdefault(parameter, []).append((module, name))
        self._places = list(places.values())
        self._copies: list[nn.Parameter] = []

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the gathered weights."""
        gathered = [getattr(module, name) for (module, name), *_ in self._places]
        if not self._copies:
            self._copies = [nn.Parameter(torch.empty_like(weight), requires_grad=False) for weight in gathered]
        for copy, weight in zip(self._copies, gathered, strict=True):
            copy.copy_(weight)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the modules of the policy have the copies inside the block."""
        gathered = [getattr(module, name) for (module, name), *_ in self._places]
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(gathered)

    def _put(self, weights: list[nn.Parameter]) -> None:
        for places, weight in zip(self._places, weights, strict=True):
            for module, name in places:
                module._parameters[name] = weight
