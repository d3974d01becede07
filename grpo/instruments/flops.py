"""The least multiply-adds that a step needs, by a formula, and a measurement of a device's best rate of them.

    forward = sum over prompts of tower(F) + audio * projector + P * token + pairs(0, P)
              + sum over completions of (T - 1) * token + pairs(P, P + T - 1) + T * head
    tower(F) = sum over convolutions of outputs * weights + s * tower_position + pairs of s * tower_pair
    pairs(first, last) = sum over layers of pair * sum over i in first .. last - 1 of min(i + 1, window)

F: mel frames of the clip, without padding. s: positions after the convolutions, 50 per second in Whisper. audio: audio
embeddings of the prompt. P: prompt tokens. T: tokens of one completion. The other names are fields of `Cost`.

- Each mel frame, prompt token and completion token counts once. A token attends to the prompt and to its own branch.
- A completion's last token is sampled but not fed to the decoder, so T - 1 are fed.
- The LM head counts for completion tokens only.
- The rollout (prefill and decoding together), the reference pass and the policy's forward are one `forward` each. The
  rollout applies the head once, not G times, for the first tokens of a group's G completions.
- A backward counts as two forwards: each factor of a product has a gradient. Gradients that are not needed are
  left out: of frozen weights; of the mel frames; of the first layer's input if the embeddings are frozen; of the
  projector's input if the tower is frozen.
- A frozen tower runs once per step and has no backward. The reference has no adapters. A group without a gradient
  has neither forward nor backward of the policy.
- With rollout.keep_prefill the forward over the prompts of the first update is that of the rollout.
- Norms, activation functions and softmax count 0. One multiply-add is two floating-point operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import nn

from hark.grpo.instruments.shape import convolutions, tower_stride, tower_width, tower_window
from hark.models.experts import expert_modules, experts_per_token
from hark.models.linear import linear
from hark.models.lora import LoraLinear
from hark.models.policy import Policy, Prompt

SIZES = (512, 1024, 2048, 4096, 8192)  # of the square matrices whose product is timed
MAX_SECONDS = 0.5  # per product; a size that is expected to take longer is not tried
INPUT_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # the linear layers whose input is the decoder layer's


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a policy per unit of work; without a tower, the tower's fields are 0.

    token: per token, of the decoder's linear layers and their adapters. adapters: of the adapters only.
    pair: per query-key pair, of one decoder layer's attention. windows: each decoder layer's window, None for full.
    head: per position, of the LM head. projector: per audio embedding.
    convolutions: for each, (stride of its output in mel frames, multiply-adds per output position).
    tower_position: per position, of the tower's linear layers. tower_pair: per pair of positions, of its attention.
    tower_window: positions that attend to one another; None is all of a clip.
    frozen_tower: whether no parameter of the tower is trained.
    skipped_*: gradients that are not needed, to be subtracted from a backward of two forwards.
    """

    token: int
    pair: int
    windows: tuple[int | None, ...]
    head: int
    adapters: int = 0
    convolutions: tuple[tuple[int, int], ...] = ()
    tower_position: int = 0
    tower_pair: int = 0
    tower_window: int | None = None
    frozen_tower: bool = False
    projector: int = 0
    skipped_token: int = 0
    skipped_head: int = 0
    skipped_projector: int = 0

    def tower(self, frames: int) -> int:
        """Multiply-adds of the tower's forward for a clip of `frames` real mel frames."""
        if not self.convolutions:
            return 0
        convolved = sum(_positions(frames, stride) * weights for stride, weights in self.convolutions)
        positions = _positions(frames, self.convolutions[-1][0])
        whole, rest = divmod(positions, self.tower_window or positions + 1)
        pairs = whole * (self.tower_window or 0) ** 2 + rest**2
        return convolved + positions * self.tower_position + pairs * self.tower_pair

    def skipped_tower(self, frames: int) -> int:
        """Multiply-adds of the gradient of the mel frames, which a backward does not need."""
        return sum(_positions(frames, stride) * weights for stride, weights in self.convolutions[:1])

    def tokens(self, first: int, last: int) -> int:
        """Multiply-adds of the decoder for the tokens at positions first .. last - 1 of a sequence."""
        pairs = sum(_pairs(first, last, window) for window in self.windows)
        return (last - first) * self.token + pairs * self.pair


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of the passes over a step's prompts and completions.

    tower: of a frozen tower, which runs once for all passes; 0 for a trained one, which is part of each pass.
    rollout, reference: over all groups. forward, backward: over the groups that have a gradient. prompts: the part of
    `forward` that is over their prompts.
    """

    tower: int = 0
    rollout: int = 0
    reference: int = 0
    forward: int = 0
    backward: int = 0
    prompts: int = 0

    def step(
        self, *, rollout: bool = True, reference: bool = True, updates: int = 1, keep_prefill: bool = False
    ) -> int:
        """The step's total. rollout, reference: whether it has these passes. updates: its forward-backward passes.

        keep_prefill: whether the first of these begins with what the rollout computed of the prompts.
        """
        once = self.tower + rollout * self.rollout + reference * self.reference - keep_prefill * self.prompts
        return once + updates * (self.forward + self.backward)


def cost_of(policy: Policy) -> Cost:
    """The cost of a policy's layers, from the sizes of their weights."""
    config, head = policy.decoder.config, policy.model.get_output_embeddings()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linears = list(_linears(policy.decoder))
    adapters = sum(_adapter(layer) for layer in linears)
    decoder = Cost(
        token=_weights(linears) + _experts(policy.decoder) + adapters,
        adapters=adapters,
        pair=2 * config.num_attention_heads * size,
        windows=tuple(policy.windows[kind] for kind in policy.layer_types),
        head=head.weight.numel(),
        skipped_token=_frozen_weights(linears) + _skipped_input_gradient(policy),
        skipped_head=_frozen_weights([head]),
    )
    return decoder if policy.tower is None else _with_tower(decoder, policy, policy.tower)


def macs(
    cost: Cost,
    prompts: Sequence[Prompt],
    lengths: torch.Tensor,
    *,
    audio_id: int | None = None,
    groups_with_gradient: Collection[int] | None = None,
) -> Macs:
    """Multiply-adds of the passes over prompts and completions of the given lengths (B,), stop tokens included.

    audio_id: the placeholder token, which occurs once for each audio embedding of a prompt.
    groups_with_gradient: indices of the groups that have a gradient; None is all.
    """
    groups = lengths.unflatten(0, (len(prompts), -1)).tolist()
    passes = [_group(cost, *group, audio_id) for group in zip(prompts, groups, strict=True)]
    if groups_with_gradient is not None:
        passes = [
            p if n in groups_with_gradient else replace(p, forward=0, backward=0, prompts=0)
            for n, p in enumerate(passes)
        ]
    return Macs(*map(sum, zip(*map(astuple, passes), strict=True)))


def best_matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, repeat: int = 5) -> float:
    """Multiply-adds per second of the fastest product of two square matrices, computed as linear layers do.

    Sizes in SIZES are tried. Takes about a second on a CPU.
    """
    rates = []
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        linear(a, b)
        seconds = fastest(torch.device(device), linear, a, b, repeat=repeat)
        rates.append(size**3 / seconds)
        if 2**3 * seconds > MAX_SECONDS:
            break
    return max(rates)


def fastest(device: torch.device, call: Callable[..., object], *args: Any, repeat: int = 5) -> float:
    """Seconds of the fastest of some calls, each until the device has finished its work."""

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(seconds() for _ in range(repeat))


def _group(cost: Cost, prompt: Prompt, lengths: Sequence[int], audio_id: int | None) -> Macs:
    """Multiply-adds of the passes over one prompt and its completions of the given lengths."""
    start, sampled = len(prompt.ids), sum(lengths)
    fed = start + sampled - len(lengths)
    audio = 0 if audio_id is None else int((prompt.ids == audio_id).sum())
    tower = sum(cost.tower(clip.frames) for clip in prompt.clips)
    skipped = sum(cost.skipped_tower(clip.frames) for clip in prompt.clips)
    prompts = cost.tokens(0, start) + audio * cost.projector
    forward = prompts + sum(cost.tokens(start, start + length - 1) for length in lengths) + sampled * cost.head
    backward = 2 * forward
    backward -= fed * cost.skipped_token + sampled * cost.skipped_head + audio * cost.skipped_projector
    if not cost.frozen_tower:
        prompts, forward, backward = prompts + tower, forward + tower, backward + 2 * tower - skipped
    return Macs(
        tower=tower if cost.frozen_tower else 0,
        rollout=forward - (len(lengths) - 1) * cost.head,
        reference=forward - fed * cost.adapters,
        forward=forward,
        backward=backward,
        prompts=prompts,
    )


def _with_tower(decoder: Cost, policy: Policy, tower: Any) -> Cost:
    """The decoder's cost with that of the tower and the projector added."""
    costs, stride, bins = [], 1, getattr(tower.config, "num_mel_bins", 128)
    for module in convolutions(tower):
        stride *= module.stride[-1]
        over_bins = isinstance(module, nn.Conv2d)  # such a convolution is applied along the mel bins too
        bins = (bins - 1) // module.stride[0] + 1 if over_bins else bins
        costs.append((stride, module.weight.numel() * (bins if over_bins else 1)))
    projectors = {layer for module in policy.projectors for layer in _linears(module)}
    projector, inside = list(projectors), [layer for layer in _linears(tower) if layer not in projectors]
    frozen, size = policy.tower_is_frozen, _weights(projector)
    return replace(
        decoder,
        convolutions=tuple(costs) or ((tower_stride(tower), 0),),
        tower_position=_weights(inside),
        tower_pair=2 * tower_width(tower) * len(policy.tower_layers),
        tower_window=tower_window(tower),
        frozen_tower=frozen,
        projector=size,
        skipped_projector=_frozen_weights(projector) + frozen * size,
    )


def _skipped_input_gradient(policy: Policy) -> int:
    """Multiply-adds per token of the gradient of the first layer's input; 0 if trained embeddings need it."""
    if policy.decoder.get_input_embeddings().weight.requires_grad:
        return 0
    modules = policy.decoder.layers[0].named_modules()
    projections = [layer for name, layer in modules if name.endswith(INPUT_PROJECTIONS)]
    return _weights(projections) + sum(layer.lora_A.numel() for layer in projections if isinstance(layer, LoraLinear))


def _experts(decoder: Any) -> int:
    """Multiply-adds per token of the experts that it is given to."""
    return sum(
        parameter.numel() // module.num_experts * experts_per_token(decoder.config)
        for module in expert_modules(decoder)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    )


def _linears(module: nn.Module) -> Iterable[nn.Linear]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))


def _weights(layers: Iterable[nn.Linear]) -> int:
    return sum(layer.weight.numel() for layer in layers)


def _frozen_weights(layers: Iterable[nn.Linear]) -> int:
    return _weights(layer for layer in layers if not layer.weight.requires_grad)


def _adapter(layer: nn.Linear) -> int:
    return layer.lora_A.numel() + layer.lora_B.numel() if isinstance(layer, LoraLinear) else 0


def _positions(frames: int, stride: int) -> int:
    return (frames - 1) // stride + 1


def _pairs(first: int, last: int, window: int | None) -> int:
    """Query-key pairs of one layer for the queries at positions first .. last - 1."""
    if window is None or last <= window:
        return (first + 1 + last) * (last - first) // 2
    return sum(min(i + 1, window) for i in range(first, last))
