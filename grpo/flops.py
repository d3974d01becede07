"""The multiply-adds that a step cannot do without, and the best rate at which this machine does any.

    forward = sum over prompts of tower(f) + P * token + pairs(0, P)
              + sum over completions of (T - 1) * token + pairs(P, P + T - 1) + T * head
    tower(f) = sum over convolutions of places * weights + s * layers + s^2 * heard pair + A * projector
    pairs(first, last) = sum over layers of pair * sum over i in first .. last - 1 of min(i + 1, window)

f are the clip's real mel frames, s = places behind the convolutions (50 per second), A the audio embeddings. So each
prompt token, each real frame and each completion token counts once; a completion's last token is drawn, never fed; and
the LM head counts at completion positions alone. A token attends to the prompt and to its own branch. The prefill and
the decoding of a rollout together, the reference's forward and the policy's are one `forward` each; a backward is two,
except that no gradient reaches the mel frames. Norms, activations and softmax, which are no matrix products, count
nothing. One multiply-add is two floating-point operations.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from models.policy import Policy, Prompt

SIZES = (512, 1024, 2048)  # of the square matrices whose product is timed
CUDA = "cuda"


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a policy per unit of work; all 0 for the tower of a policy without one.

    token: the decoder's linear layers, per token. pair: one decoder layer's attention, per query and key it attends to.
    windows: how many positions back each decoder layer looks. head: the LM head, per position.
    convolutions: (stride so far, weights) of each, per place of its output. layers: the tower's linear layers, per
    place; heard_pair: its attention, per pair of places; projector: per audio embedding.
    """

    token: int
    pair: int
    windows: tuple[int | None, ...]
    head: int
    convolutions: tuple[tuple[int, int], ...] = ()
    layers: int = 0
    heard_pair: int = 0
    projector: int = 0

    def tower(self, frames: int, embeddings: int) -> int:
        """Multiply-adds of hearing a clip of `frames` real mel frames, which give so many embeddings."""
        if not self.convolutions:
            return 0
        convolved = sum(_places(frames, stride) * weights for stride, weights in self.convolutions)
        places = _places(frames, self.convolutions[-1][0])
        return convolved + places * self.layers + places**2 * self.heard_pair + embeddings * self.projector

    def unneeded_gradient(self, frames: int) -> int:
        """Multiply-adds of the gradient with respect to the mel frames, which a backward leaves out."""
        return sum(_places(frames, stride) * weights for stride, weights in self.convolutions[:1])

    def tokens(self, first: int, last: int) -> int:
        """Multiply-adds of feeding the decoder the tokens at positions first .. last - 1 of a prompt and a branch."""
        pairs = sum(_attended(first, last, window) for window in self.windows)
        return (last - first) * self.token + pairs * self.pair


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one pass over a step's prompts and completions."""

    forward: int
    backward: int

    def step(self, *, reference: bool = True, updates: int = 1) -> int:
        """Of a whole step: the rollout, the reference's forward, and each update's forward and backward."""
        return (1 + reference) * self.forward + updates * (self.forward + self.backward)


def cost_of(policy: Policy) -> Cost:
    """What a policy's layers cost, from the sizes of its weights."""
    config, head = policy.decoder.config, policy.model.get_output_embeddings()
    types = getattr(config, "layer_types", None) or len(policy.decoder.layers) * tuple(policy.windows)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    decoder = Cost(
        token=_linear(policy.decoder),
        pair=2 * config.num_attention_heads * size,
        windows=tuple(policy.windows[kind] for kind in types),
        head=head.weight.numel(),
    )
    return decoder if policy.tower is None else _with_tower(decoder, policy, head)


def macs(cost: Cost, prompts: Sequence[Prompt], lengths: torch.Tensor, *, audio_id: int | None = None) -> Macs:
    """Multiply-adds of passes over prompts with completions of the given lengths (B,), the stop token included.

    audio_id: the placeholder, by which a prompt's audio embeddings are counted.
    """
    forward = unneeded = 0
    for prompt, group in zip(prompts, lengths.unflatten(0, (len(prompts), -1)).tolist(), strict=True):
        start = len(prompt.ids)
        forward += cost.tower(prompt.frames, int((prompt.ids == audio_id).sum()) if audio_id is not None else 0)
        forward += cost.tokens(0, start) + sum(group) * cost.head
        forward += sum(cost.tokens(start, start + length - 1) for length in group)
        unneeded += cost.unneeded_gradient(prompt.frames)
    return Macs(forward, 2 * forward - unneeded)


def best_matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, repeat: int = 5) -> float:
    """Multiply-adds per second of the fastest product of square matrices found."""
    rates = []
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        seconds = min(_seconds(a, b) for _ in range(repeat))
        rates.append(size**3 / seconds)
    return max(rates)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type == CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    a @ b
    if a.device.type == CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _with_tower(decoder: Cost, policy: Policy, head: nn.Module) -> Cost:
    """The cost with what the tower and the layers between it and the decoder add."""
    tower, convolutions, stride = policy.tower, [], 1
    for module in tower.modules():
        if isinstance(module, nn.Conv1d):
            stride *= module.stride[0]
            convolutions.append((stride, module.weight.numel()))
    return Cost(
        token=decoder.token,
        pair=decoder.pair,
        windows=decoder.windows,
        head=decoder.head,
        convolutions=tuple(convolutions),
        layers=_linear(tower),
        heard_pair=2 * tower.config.d_model * len(tower.layers),
        projector=_linear(policy.model) - _linear(policy.decoder) - _linear(tower) - head.weight.numel(),
    )


def _linear(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _places(frames: int, stride: int) -> int:
    return (frames - 1) // stride + 1


def _attended(first: int, last: int, window: int | None) -> int:
    """Keys that the queries at positions first .. last - 1 attend to, themselves included."""
    if window is None or last <= window:
        return (first + 1 + last) * (last - first) // 2
    return sum(min(i + 1, window) for i in range(first, last))
