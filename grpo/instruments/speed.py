"""The seconds of a step by phase, from the sizes of the model and the work and the rates of a device.

    device   = OVERHEAD * (multiply-adds / products + those of attention / attention + bytes / memory)
    host     = layers * LAUNCHES * launch
    seconds  = max(device, host) on a GPU, which computes while the host launches; device + host on a CPU

A forward moves twice the bytes that it saves for a backward, as each is written and read, and a backward moves twice as
many. A decode step reads all weights, and the keys and values of prompts and branches. Sampling and the LM head move
float32 copies of the logits. AdamW reads and writes weights, gradients and moments. A frozen tower computes in the
rollout alone. The rollout waits until all weights are gathered; other collectives are hidden behind the passes of
reference and update, as far as these are longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hark.grpo.instruments.flops import Macs, fastest
from hark.grpo.instruments.memory import Setting, Work
from hark.grpo.instruments.shape import FLOAT, Shape
from hark.models.linear import Linear, packed_weights

# What is not counted, as a share: copies, allocation, kernels that do not reach their rate. Of steps on a CPU.
OVERHEAD = 1.2
# Additions of small tensors that take the host as long as the operators of a decoder layer with their Python.
LAUNCHES = 265
RECORDED = 5e-5  # seconds that the kernels of a recorded decoder layer take at least: 34, of 1.5 microseconds each
LOGITS = 6  # float32 copies of the logits that scoring writes or reads, in a forward and in a backward each
DRAWS = (
    40  # bytes per token of the vocabulary that a draw moves: float32 logprobs, float64 probabilities and their sums
)
ADAMW = 9  # times that AdamW and clipping read or write a tensor of the size of the trained weights


# Bytes of weights that are read to measure the rate, more than a cache holds, but no more than so many weights. Those
# of a small model stay in a cache in a rollout too, and each packed one takes 8 MB of addresses beside its size.
STREAMED, MOST_STREAMED = 2**28, 128


class Counts(NamedTuple):
    """Multiply-adds outside of attention, and those of attention."""

    products: float
    attention: float


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    products, attention: multiply-adds per second of the layers' products, and of the products of attention. memory:
    bytes per second. launch: seconds to launch an addition of small tensors. link: bytes per second that a rank gets
    in a collective. overlaps: whether the device computes while the host launches.
    """

    products: float
    attention: float
    memory: float
    launch: float
    link: float
    overlaps: bool = True

    def seconds(self, counts: Counts, moved: float, layers: float = 0.0, read: float = 0.0) -> float:
        """Seconds of operations with so many multiply-adds and moved bytes, in so many calls of layers.

        read: bytes of weights, which are read while the products are computed.
        """
        products = max(counts.products / self.products, read / self.memory)
        device = OVERHEAD * (products + counts.attention / self.attention + moved / self.memory)
        host = layers * LAUNCHES * self.launch
        return max(device, host) if self.overlaps else device + host


# Of bfloat16 without sparsity: four fifths of the products and of the memory rate that the maker states, a third of the
# products for attention under a mask, collectives over NVLink, and a layer's operators in 0.7 ms of the host.
DEVICES = {
    "a100": Rates(products=1.25e14, attention=0.4e14, memory=1.6e12, launch=2.6e-6, link=2.0e11),
    "h100": Rates(products=4.0e14, attention=1.3e14, memory=2.7e12, launch=2.6e-6, link=3.3e11),
    "h200": Rates(products=4.0e14, attention=1.3e14, memory=3.8e12, launch=2.6e-6, link=3.3e11),
}


def step_seconds(
    shape: Shape,
    work: Work,
    setting: Setting,
    passes: Macs,
    pairs: Macs,
    rates: Rates,
    *,
    trained: int,
    updates: int = 1,
    gathered: float = 0.0,
    received: float = 0.0,
) -> dict[str, float]:
    """Seconds of each phase of a step on one rank, and of communication that computation does not hide.

    passes: multiply-adds of the rank's step; pairs: those of attention among them. trained: weights of this rank's
    shard that are trained. updates: inner epochs. gathered: bytes that the rollout waits for. received: bytes of all
    collectives of the step.
    """
    d, kept, phases = setting.dtype, setting.keep_prefill, {}
    if work.samples:
        phases["rollout"] = _rollout(shape, work, setting, passes, pairs, rates)
    if setting.lora_rank or setting.train != "all":
        shape = replace(shape, tower=None)  # from here on its outputs are known
    prompts, branches = work.prompts * work.prompt, work.prompts * work.group_size * (work.max_new_tokens - 1)
    moved = 2 * _saved(shape, work, d, prompts + branches)
    head = LOGITS * FLOAT * shape.vocabulary * work.prompts * work.group_size * work.max_new_tokens
    parts = -(-work.prompts // work.micro_batch) * -(-work.group_size // work.branches)
    layers = parts * (shape.layers + (shape.tower.layers if shape.tower else 0))
    if setting.reference != "none":
        phases["reference"] = rates.seconds(_counts(passes, pairs, "reference"), moved + head, layers)
    forward = rates.seconds(_counts(passes, pairs, "forward"), moved + head, layers)
    saved = rates.seconds(_counts(passes, pairs, "prompts"), 2 * _saved(shape, work, d, prompts)) if kept else 0.0
    backward = rates.seconds(_counts(passes, pairs, "backward"), 2 * moved + head, 2 * layers)
    again = forward if setting.recompute else 0.0
    phases["backward"] = updates * (forward + backward + again) - saved
    phases["optimizer"] = updates * rates.seconds(Counts(0, 0), ADAMW * setting.master * trained)
    if received:
        hidden = phases.get("reference", 0.0) + phases["backward"]
        phases["communication"] = gathered / rates.link + max(0.0, (received - gathered) / rates.link - hidden)
    return phases


def _counts(passes: Macs, pairs: Macs, name: str) -> Counts:
    attention = getattr(pairs, name)
    return Counts(getattr(passes, name) - attention, attention)


def _rollout(shape: Shape, work: Work, setting: Setting, passes: Macs, pairs: Macs, rates: Rates) -> float:
    """Prefill, then one step per token: all weights are read once, and the keys and values of what is attended to.

    The host launches a recorded step at once.
    """
    d, recorded = setting.dtype, setting.recorded and rates.overlaps
    n, rows, steps = work.prompts, work.prompts * work.group_size, work.max_new_tokens - 1
    layers = shape.layers + (shape.tower.layers if shape.tower else 0)
    prompts, tower = _counts(passes, pairs, "prompts"), _counts(passes, pairs, "tower")  # the second: a frozen one
    heard = Counts(prompts.products + tower.products, prompts.attention + tower.attention)
    prefill = rates.seconds(heard, 2 * _saved(shape, work, d, n * work.prompt), layers)
    weights = d * (shape.layers * shape.layer + shape.vocabulary * shape.hidden)
    keys = 2 * shape.layers * shape.kv_heads * shape.head_size * d * (n * work.prompt + rows * steps / 2)
    draw = DRAWS * rows * shape.vocabulary
    # Few rows are bound by reading weights, many by products. What attention reads counts, and not its products.
    products = _counts(passes, pairs, "rollout").products - prompts.products
    calls = 0 if recorded else shape.layers
    step = rates.seconds(Counts(products / max(steps, 1), 0), keys + draw, calls, read=weights)
    return prefill + steps * max(step, shape.layers * RECORDED if recorded else 0.0)


def _saved(shape: Shape, work: Work, d: int, tokens: float) -> float:
    """Bytes that a forward over tokens, and over the clips of the prompts, would save for a backward."""
    of_tower = shape.tower.layers * shape.tower.saved(work.prompts, work.frames, d) if shape.tower else 0
    return shape.layers * shape.saved(d) * tokens + of_tower


@torch.inference_mode()
def measured(device: torch.device, dtype: torch.dtype, shape: Shape, tokens: int, rows: int) -> Rates:
    """The rates of a device, in a few seconds: of products and attention over so many tokens with a layer's sizes, and
    of reading weights for so many rows.
    """
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    count = min(max(2, STREAMED // (x.element_size() * shape.inner * shape.hidden)), MOST_STREAMED)
    layers = nn.ModuleList(
        Linear(shape.hidden, shape.inner, bias=False, device=device, dtype=dtype) for _ in range(count)
    )
    query = torch.randn(1, shape.heads, tokens, shape.head_size, device=device, dtype=dtype)
    small = torch.zeros(8, device=device)
    pairs = 2 * query.numel() * tokens
    with packed_weights(layers):  # as the rollout reads them
        reading = fastest(device, lambda: [layer(x[:rows]) for layer in layers])
    return Rates(
        products=x.numel() * shape.inner / fastest(device, layers[0], x),
        attention=pairs / fastest(device, scaled_dot_product_attention, query, query, query),
        memory=sum(weight.nbytes for weight in layers.parameters()) / reading,
        launch=fastest(device, lambda: [small.add(1.0) for _ in range(1000)]) / 1000,
        link=float("inf"),
        overlaps=device.type == "cuda",
    )
