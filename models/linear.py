"""Linear layers in float32 on the CPU, by oneDNN: on some processors twice as fast as the library that torch takes."""

from __future__ import annotations

import platform

import torch
from torch import nn
from torch.nn import functional as F

# An operator that torch's own compiler uses for linear layers; builds without oneDNN do not have it.
AVAILABLE = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """A linear layer whose product is `linear`; made from an nn.Linear in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def use_fast_products(module: nn.Module) -> None:
    """Let all linear layers of a module compute by `linear`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out)."""
    fast = AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not fast:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The operator has no backward of its own; its products are two more of the same kind."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows, of_x, of_weight, of_bias = gradient.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            of_x = _product(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            of_weight = _product(rows.T, x.flatten(0, -2).T)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_x, of_weight, of_bias
