"""The sizes of a policy and the activation bytes of its layers, from which memory.py computes the memory of a run.

The formulas are for transformers' Qwen2 layers and its Whisper-like towers under sdpa; other layers need about as much.
Attention is counted for fused kernels (memory-efficient on CUDA, flash on the CPU). They save query, key, value, output
and one float32 per head and query. They save no attention probabilities. All layers share one mask, `Work.mask`.
FlexAttention has no mask, and saves keys and values once for the query heads that share them, which is not counted.

Letters: D hidden size, I inner size of the MLP, A heads * head size, d bytes per element of the compute dtype. Norms
compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hark.models.experts import expert_modules, experts_per_token
from hark.models.lora import adapted_layers
from hark.models.policy import Policy

FLOAT = 4  # bytes of float32


@dataclass(frozen=True)
class Tower:
    """Sizes of an audio tower. layer: parameters of one layer. rest: parameters outside the layers.

    stride: mel frames of one position in the layers.
    """

    layers: int
    width: int
    inner: int
    heads: int
    layer: int
    rest: int
    stride: int = 2

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest

    def saved(self, clips: int, frames: int, d: int) -> int:
        """Activation bytes that one layer saves for its backward: inputs and outputs of two norms, attention, MLP."""
        length = frames // self.stride + 1
        per_token = d * (8 * self.width + 2 * self.inner) + FLOAT * self.heads
        return clips * length * per_token

    def gradients(self, clips: int, frames: int, d: int) -> int:
        """Peak bytes of activation gradients in one layer's backward; the peak is in its MLP."""
        return d * clips * (frames // self.stride + 1) * 2 * (self.inner + self.width)

    def inputs(self, clips: int, frames: int, d: int) -> int:
        """Bytes of one layer's input."""
        return d * clips * (frames // self.stride + 1) * self.width

    def convolutions(self, clips: int, frames: int, d: int) -> int:
        """Bytes that the two convolutions save: outputs (100 and 50 positions per second) before and after the GELU."""
        return 6 * self.inputs(clips, frames, d)

    def forward_peak(self, clips: int, frames: int, d: int) -> int:
        """Peak activation bytes of a forward without gradient; the peak is in an MLP or in the first convolution."""
        length = frames // self.stride + 1
        return d * clips * length * (max(2 * self.inner + 3 * self.width, 6 * self.width))


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    layer: parameters of one decoder layer. root: parameters outside all layers, which form FSDP's root unit:
    embeddings, head, last norm, projector and the tower's convolutions, positions and last norm.
    adapters: parameters of one decoder layer's adapters at rank 1, the sum of the targets' input and output sizes.
    outer_adapters: parameters at rank 1 of the adapters outside the decoder's layers.
    projector: parameters between the audio tower and the decoder.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    layer: int
    root: int
    adapters: int
    outer_adapters: int = 0
    projector: int = 0
    tower: Tower | None = None

    @property
    def parameters(self) -> int:
        tower_layers = self.tower.layers * self.tower.layer if self.tower else 0
        return self.root + self.layers * self.layer + tower_layers

    @property
    def attention(self) -> int:
        """Width of the queries of all heads, A."""
        return self.heads * self.head_size

    def saved(self, d: int) -> int:
        """Activation bytes per token that a decoder layer saves for its backward.

        Two norms, (4 + 2 d) D each: input in float32, normalised input, output. Attention, 4 d A + 4 heads: query, key
        and value (repeated for each query head), output, logsumexp. MLP, 4 d I: gate, its activation, up, product.
        """
        attention = 4 * d * self.attention + FLOAT * self.heads
        return 2 * (FLOAT + 2 * d) * self.hidden + attention + 4 * d * self.inner

    def gradients(self, d: int) -> int:
        """Peak bytes per token of activation gradients in a decoder layer's backward; the peak is in its MLP."""
        return d * (2 * self.inner + 2 * self.hidden)

    def forward_peak(self, d: int) -> int:
        """Peak activation bytes per token of a decoder layer without gradient: in the MLP, attention or a norm."""
        mlp, attention = 3 * self.inner + 2 * self.hidden, 2 * self.hidden + 6 * self.attention
        return max(d * mlp, d * attention, (d + 3 * FLOAT) * self.hidden)


def shape_of(policy: Policy, *, targets: Sequence[str] = ()) -> Shape:
    """Sizes of a policy, whose parameters may be on the meta device. All layers are assumed to be of one size.

    targets: the layers that would get adapters, as in `Lora`.
    """
    config, layers = policy.decoder.config, list(policy.decoder.layers)
    linears = adapted_layers(policy, targets).values()
    inside = [{id(module) for module in layer.modules()} for layer in layers]
    sizes = {id(linear): linear.in_features + linear.out_features for linear in linears}
    tower = None if policy.tower is None else _tower_of(policy, policy.tower)
    in_layers = sum(map(_count, layers)) + (tower.layers * tower.layer if tower else 0)
    head, embeddings = policy.model.get_output_embeddings(), policy.decoder.get_input_embeddings()
    return Shape(
        layers=len(layers),
        hidden=config.hidden_size,
        inner=_inner(policy),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=head.weight.shape[0],
        tied=head.weight is embeddings.weight,
        layer=_count(layers[0]),
        root=_count(policy.model) - in_layers,
        adapters=sum(size for linear, size in sizes.items() if linear in inside[0]),
        outer_adapters=sum(size for linear, size in sizes.items() if not any(linear in ids for ids in inside)),
        projector=sum(map(_count, policy.projectors)),
        tower=tower,
    )


def _inner(policy: Policy) -> int:
    """Inner size of the MLP; of all experts that a token is given to."""
    config = policy.decoder.config
    sparse = any(True for _ in expert_modules(policy.decoder))
    inner = _first(config, "moe_intermediate_size") if sparse else None
    return inner * experts_per_token(config) if inner else config.intermediate_size


def _tower_of(policy: Policy, tower: Any) -> Tower:
    config, layers = tower.config, list(policy.tower_layers)
    width = tower_width(tower)
    return Tower(
        layers=len(layers),
        width=width,
        inner=_first(config, "encoder_ffn_dim", "intermediate_size") or getattr(config, "feedforward_mult", 4) * width,
        heads=_first(config, "encoder_attention_heads", "num_attention_heads", "num_heads"),
        layer=_count(layers[0]),
        rest=_count(tower) - sum(map(_count, layers)),
        stride=tower_stride(tower),
    )


def tower_width(tower: Any) -> int:
    return _first(tower.config, "d_model", "hidden_size", "hidden_dim")


def convolutions(tower: Any) -> list[Any]:
    """The convolutions of an audio tower before its layers, in order."""
    inside = {module for layer in tower.layers for module in layer.modules()}
    return [module for module in tower.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module not in inside]


def tower_stride(tower: Any) -> int:
    """Mel frames of one position in an audio tower's layers; 2 where it stacks frames instead of convolving them."""
    return math.prod(module.stride[-1] for module in convolutions(tower)) if convolutions(tower) else 2


def tower_window(tower: Any) -> int | None:
    """Positions that attend to one another in an audio tower; None is all of a clip."""
    config, stride = tower.config, tower_stride(tower)
    frames = _first(config, "n_window_infer") or 2 * (_first(config, "n_window") or 0)
    return frames // stride or _first(config, "context_size")


def _first(config: Any, *names: str) -> Any:
    """The first of these values that a config has; None if it has none."""
    return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
