"""How evenly the routers of a mixture-of-experts decoder use its experts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ROUTED = "top_k_index"  # the argument with the chosen experts, in every expert module of transformers


def expert_modules(decoder: nn.Module) -> Iterator[Any]:
    """The modules that hold the experts of a layer."""
    yield from (module for module in decoder.modules() if ROUTED in inspect.signature(module.forward).parameters)


def experts_per_token(config: Any) -> int:
    """How many experts a decoder gives each token to."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
    return next((value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), 1)


class RouterLoad:
    """Counts the tokens that each layer of a decoder gives to each of its experts, in all passes since `take`."""

    def __init__(self, decoder: nn.Module):
        self._counts: list[torch.Tensor] = []  # one for each layer: (experts,)
        for module in expert_modules(decoder):
            self._watch(module)

    def take(self) -> dict[str, float]:
        """Means over the layers, and start anew; empty without experts.

        router_load: tokens of the busiest expert, relative to an even spread; 1 is even. idle_experts: the share of
        experts that got no token.
        """
        if not self._counts:
            return {}
        loads = [counts / counts.mean().clamp(min=1e-9) for counts in self._counts]
        busiest = torch.stack([load.max() for load in loads]).mean()
        idle = torch.stack([(load == 0).double().mean() for load in loads]).mean()
        for counts in self._counts:
            counts.zero_()
        return {"router_load": float(busiest), "idle_experts": float(idle)}

    def _watch(self, module: Any) -> None:
        counts: list[torch.Tensor] = []
        position = list(inspect.signature(module.forward).parameters).index(ROUTED)

        def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            chosen = kwargs[ROUTED] if ROUTED in kwargs else args[position]
            if not counts:
                counts.append(torch.zeros(module.num_experts, dtype=torch.float64, device=chosen.device))
                self._counts.append(counts[0])
            counts[0] += torch.bincount(chosen.flatten(), minlength=module.num_experts)[: module.num_experts]

        module.register_forward_pre_hook(count, with_kwargs=True)
