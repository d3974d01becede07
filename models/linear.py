"""Linear layers in float32 on the CPU by oneDNN, on some processors twice as fast as torch's own BLAS, and for the few
rows of a rollout from packed weights; and on a GPU those of half precision whose sums are not rounded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# The operator that torch.compile uses for linear layers. Builds of torch without oneDNN do not have it.
AVAILABLE = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# MKL, torch's own BLAS, takes slower code on processors of other makers. It reads a transposed matrix in place, where
# oneDNN's operator copies it first: on an Intel with AVX-512 the forward and backward of an update take 6 % less time.
CPUINFO = Path("/proc/cpuinfo")
MKL_IS_FAST = torch.backends.mkl.is_available() and CPUINFO.is_file() and "GenuineIntel" in CPUINFO.read_text()
# The rows for which MKL packs a weight. The result is right for any number; of 1 to 64, this was the fastest for all.
PACKED_ROWS = 64
WIDE = ("cuda",)  # devices that have a product of half precision with float32 sums


class Linear(nn.Linear):
    """An nn.Linear whose forward is `linear`. packed: a copy of the weight, inside `packed_weights`."""

    packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.packed)


def use_onednn(module: nn.Module) -> None:
    """Turn every plain nn.Linear of a module into a `Linear`, in place: its class changes, its tensors do not."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


@contextmanager
def packed_weights(*modules: nn.Module) -> Iterator[None]:
    """Inside, without autograd, `Linear` layers of modules multiply by copies of their weights in MKL's own order.

    A product by a few rows takes as long as reading its weight, and MKL otherwise copies the weight into this order in
    each product. On an Intel processor, for float32. The weights must not change inside. A copy takes the memory of its
    weight, and of addresses up to 8 MB more.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear)]
    layers = [layer for layer in layers if _packs(layer.weight)]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), PACKED_ROWS)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _packs(weight: torch.Tensor) -> bool:
    """Whether a weight is packed. A parameter of another type is sharded, or a fake one without values."""
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return MKL_IS_FAST and plain


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out).

    By oneDNN for float32 on the CPU where it is available, otherwise by torch, and by torch in compiled layers.
    packed: a copy of the weight in MKL's order, which is used where there is no autograd.
    """
    fast = AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not fast or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        if packed is not None:
            return torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.numel() // x.shape[-1])
        return _product(x, weight, bias)
    # Rows are folded here and not in the operator: autograd refuses to modify a view that a Function returns in place.
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])


def linear_to_float32(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The output of a linear layer in float32.

    On a GPU a product of half precision is summed in float32 and usually rounded; here a plain layer keeps the sums.
    """
    wide = x.device.type in WIDE and x.dtype in (torch.bfloat16, torch.float16) and type(layer) in (nn.Linear, Linear)
    if not wide:
        return layer(x).float()
    output = _WideLinear.apply(x.reshape(-1, x.shape[-1]), layer.weight).unflatten(0, x.shape[:-1])
    return output if layer.bias is None else output + layer.bias


def _wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.T, out_dtype=torch.float32)


class _WideLinear(torch.autograd.Function):
    """Adds a backward, which the operator lacks: that of the rounded product, whose gradient is of half precision."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _wide_product(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows (n, k) times (k, m), one of which may be a transposed view, by the library that is faster then."""
    return a @ b if MKL_IS_FAST else _product(a, b.T)


class _Linear(torch.autograd.Function):
    """Adds a backward, which the operator lacks."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_x = _matmul(gradient, weight)
        if ctx.needs_input_grad[1]:
            of_weight = _matmul(gradient.T, x)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_x, of_weight, of_bias
