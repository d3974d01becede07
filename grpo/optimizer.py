"""AdamW, its learning rate as a function of the step, and gradient clipping over all ranks."""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from hark.models.policy import Policy


def build_optimizer(policy: Policy, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trained parameters; weight decay applies to matrices, not to biases and norms."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, total: int, floor: float = 0.0) -> float:
    """Learning rate of step 0 .. total - 1: a linear rise over `warmup` steps, then the schedule.

    "linear" falls from `peak` in a straight line to `floor * peak` at step `total`, "cosine" along half a cosine wave;
    "constant" stays at `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return peak * (floor + (1 - floor) * (1 - progress))
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule is {schedule!r}; expected linear, cosine or constant")


def clip_gradients(policy: Policy, max_norm: float) -> float:
    """Scale the gradient to an L2 norm of at most `max_norm`, over all ranks; returns the norm before."""
    norm = clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
