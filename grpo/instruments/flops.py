"""The multiply-adds that a step cannot do without, and the best rate at which this machine does any.

    forward = sum over prompts of tower(f) + A * projector + P * token + pairs(0, P)
              + sum over completions of (T - 1) * token + pairs(P, P + T - 1) + T * head
    tower(f) = sum over convolutions of places * weights + s * layers + s^2 * heard pair
    pairs(first, last) = sum over layers of pair * sum over i in first .. last - 1 of min(i + 1, window)

f are the clip's real mel frames, s = places behind the convolutions (50 per second), A the audio embeddings. So each
prompt token, each real frame and each completion token counts once; a completion's last token is drawn, never fed; and
the LM head counts at completion positions alone. A token attends to the prompt and to its own branch. The prefill and
the decoding of a rollout together, the reference's forward and the policy's are one `forward` each, but that a rollout
draws a group's G first tokens from one prediction; a group that has no gradient needs no forward and backward of the
policy. Norms, activations and softmax, which are no matrix products, count nothing. One multiply-add is two
floating-point operations.

A backward is two forwards, one for the gradient of each of a product's factors, less those that nobody needs: that of
a frozen weight; that of the mel frames; with the embeddings frozen, that of the first layer's input; with the tower
frozen, that of the projector's. A frozen tower is heard once a step, whoever needs what it gives, and never in a
backward. The reference has no adapters.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import nn

from hark.models.linear import linear
from hark.models.lora import LoraLinear
from hark.models.policy import Policy, Prompt

SIZES = (512, 1024, 2048, 4096, 8192)  # of the square matrices whose product is timed
PATIENCE = 0.5  # seconds that a product may take; larger ones are not tried
CUDA = "cuda"
READERS = ("q_proj", "k_proj", "v_proj")  # the linear layers that read a decoder layer's input


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a policy per unit of work; all 0 for the tower of a policy without one.

    token: the decoder's linear layers with their adapters, per token; adapters: these alone. pair: one decoder layer's
    attention, per query and key it attends to. windows: how many positions back each decoder layer looks. head: the LM
    head, per position. convolutions: (stride so far, weights) of each, per place of its output. layers: the tower's
    linear layers, per place; tower_pair: its attention, per pair of places; frozen_tower: whether none of it is
    trained. projector: per audio embedding. spared_*: what a backward does not need of twice the forward.
    """

    token: int
    pair: int
    windows: tuple[int | None, ...]
    head: int
    adapters: int = 0
    convolutions: tuple[tuple[int, int], ...] = ()
    layers: int = 0
    tower_pair: int = 0
    frozen_tower: bool = False
    projector: int = 0
    spared_token: int = 0
    spared_head: int = 0
    spared_projector: int = 0

    def tower(self, frames: int) -> int:
        """Multiply-adds of hearing a clip of `frames` real mel frames."""
        if not self.convolutions:
            return 0
        convolved = sum(_places(frames, stride) * weights for stride, weights in self.convolutions)
        places = _places(frames, self.convolutions[-1][0])
        return convolved + places * self.layers + places**2 * self.tower_pair

    def spared_tower(self, frames: int) -> int:
        """Multiply-adds of the gradient with respect to the mel frames, which a backward leaves out."""
        return sum(_places(frames, stride) * weights for stride, weights in self.convolutions[:1])

    def tokens(self, first: int, last: int) -> int:
        """Multiply-adds of feeding the decoder the tokens at positions first .. last - 1 of a prompt and a branch."""
        pairs = sum(_attended(first, last, window) for window in self.windows)
        return (last - first) * self.token + pairs * self.pair


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of the passes over a step's prompts and completions.

    heard: a frozen tower's, once for all passes. rollout, reference: over all groups. forward, backward: over those
    that have a gradient.
    """

    heard: int = 0
    rollout: int = 0
    reference: int = 0
    forward: int = 0
    backward: int = 0

    def step(self, *, rollout: bool = True, reference: bool = True, updates: int = 1) -> int:
        """Of a whole step: the rollout, the reference's forward, and each update's forward and backward."""
        once = self.heard + rollout * self.rollout + reference * self.reference
        return once + updates * (self.forward + self.backward)


def cost_of(policy: Policy) -> Cost:
    """What a policy's layers cost, from the sizes of its weights."""
    config, head = policy.decoder.config, policy.model.get_output_embeddings()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = list(_linears(policy.decoder))
    adapters = sum(_adapter(layer) for layer in linear)
    decoder = Cost(
        token=_weights(linear) + adapters,
        adapters=adapters,
        pair=2 * config.num_attention_heads * size,
        windows=tuple(policy.windows[kind] for kind in policy.layer_types),
        head=head.weight.numel(),
        spared_token=_frozen(linear) + _unread_gradient(policy),
        spared_head=_frozen([head]),
    )
    return decoder if policy.tower is None else _with_tower(decoder, policy)


def macs(
    cost: Cost,
    prompts: Sequence[Prompt],
    lengths: torch.Tensor,
    *,
    audio_id: int | None = None,
    groups_with_gradient: Collection[int] | None = None,
) -> Macs:
    """Multiply-adds of passes over prompts with completions of the given lengths (B,), the stop token included.

    audio_id: the placeholder, by which a prompt's audio embeddings are counted. groups_with_gradient: places of the groups that have
    a gradient; None is all.
    """
    groups = lengths.unflatten(0, (len(prompts), -1)).tolist()
    passes = [_group(cost, *group, audio_id) for group in zip(prompts, groups, strict=True)]
    if groups_with_gradient is not None:
        passes = [p if n in groups_with_gradient else replace(p, forward=0, backward=0) for n, p in enumerate(passes)]
    return Macs(*map(sum, zip(*map(astuple, passes), strict=True)))


def best_matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, repeat: int = 5) -> float:
    """Multiply-adds per second of the fastest product of square matrices found, of the kind that linear layers do.

    Takes a second on a CPU.
    """
    rates = []
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        linear(a, b)
        seconds = min(_seconds(a, b) for _ in range(repeat))
        rates.append(size**3 / seconds)
        if 2**3 * seconds > PATIENCE:
            break
    return max(rates)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type == CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    linear(a, b)
    if a.device.type == CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _group(cost: Cost, prompt: Prompt, lengths: Sequence[int], audio_id: int | None) -> Macs:
    """Passes over one prompt with its completions."""
    start, drawn = len(prompt.ids), sum(lengths)
    fed = start + drawn - len(lengths)
    audio = 0 if audio_id is None else int((prompt.ids == audio_id).sum())
    tower, spared = cost.tower(prompt.frames), cost.spared_tower(prompt.frames)
    forward = cost.tokens(0, start) + sum(cost.tokens(start, start + length - 1) for length in lengths)
    forward += drawn * cost.head + audio * cost.projector
    backward = 2 * forward
    backward -= fed * cost.spared_token + drawn * cost.spared_head + audio * cost.spared_projector
    if not cost.frozen_tower:
        forward, backward = forward + tower, backward + 2 * tower - spared
    return Macs(
        heard=tower if cost.frozen_tower else 0,
        rollout=forward - (len(lengths) - 1) * cost.head,
        reference=forward - fed * cost.adapters,
        forward=forward,
        backward=backward,
    )


def _with_tower(decoder: Cost, policy: Policy) -> Cost:
    """The cost with what the tower and the layers between it and the decoder add."""
    tower, convolutions, stride = policy.tower, [], 1
    for module in tower.modules():
        if isinstance(module, nn.Conv1d):
            stride *= module.stride[0]
            convolutions.append((stride, module.weight.numel()))
    others = {*_linears(policy.decoder), *_linears(tower), policy.model.get_output_embeddings()}
    projector = [layer for layer in _linears(policy.model) if layer not in others]
    frozen, size = policy.tower_is_frozen, _weights(projector)
    return replace(
        decoder,
        convolutions=tuple(convolutions),
        layers=_weights(_linears(tower)),
        tower_pair=2 * tower.config.d_model * len(tower.layers),
        frozen_tower=frozen,
        projector=size,
        spared_projector=_frozen(projector) + frozen * size,
    )


def _unread_gradient(policy: Policy) -> int:
    """Multiply-adds per token of the gradient with respect to the first layer's input, if nothing before is trained."""
    if policy.decoder.get_input_embeddings().weight.requires_grad:
        return 0
    modules = policy.decoder.layers[0].named_modules()
    readers = [layer for name, layer in modules if name.endswith(READERS)]
    return _weights(readers) + sum(layer.lora_A.numel() for layer in readers if isinstance(layer, LoraLinear))


def _linears(module: nn.Module) -> Iterable[nn.Linear]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))


def _weights(layers: Iterable[nn.Linear]) -> int:
    return sum(layer.weight.numel() for layer in layers)


def _frozen(layers: Iterable[nn.Linear]) -> int:
    return _weights(layer for layer in layers if not layer.weight.requires_grad)


def _adapter(layer: nn.Linear) -> int:
    return layer.lora_A.numel() + layer.lora_B.numel() if isinstance(layer, LoraLinear) else 0


def _places(frames: int, stride: int) -> int:
    return (frames - 1) // stride + 1


def _attended(first: int, last: int, window: int | None) -> int:
    """Keys that the queries at positions first .. last - 1 attend to, themselves included."""
    if window is None or last <= window:
        return (first + 1 + last) * (last - first) // 2
    return sum(min(i + 1, window) for i in range(first, last))
