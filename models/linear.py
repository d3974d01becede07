"""Linear layers in float32 on the CPU by oneDNN, on some processors twice as fast as torch's own BLAS."""

from __future__ import annotations

import platform

import torch
from torch import nn
from torch.nn import functional as F

# The operator that torch.compile uses for linear layers. Builds of torch without oneDNN do not have it.
AVAILABLE = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """An nn.Linear whose forward is `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def use_onednn(module: nn.Module) -> None:
    """Turn every plain nn.Linear of a module into a `Linear`, in place: its class changes, its tensors do not."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out).

    By oneDNN for float32 on the CPU where it is available, otherwise by torch.
    """
    fast = AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not fast:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    # Rows are folded here and not in the operator: autograd refuses to modify a view that a Function returns in place.
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Adds a backward, which the operator lacks: the gradients of x and of weight are products by the same operator."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = _product(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            of_weight = _product(gradient.T, x.T)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_x, of_weight, of_bias
