"""The bytes that ranks send one another in a step of GRPO, by a formula.

    bytes     = (n - 1) / n * (d * gathered + 4 * reduced) + 2 (R - 1) / R * 4 * reduced / n
    gathered  = root * (1 + copy + E M) + layers * (1 + reference + E M * (2 if resharding else 1))
    reduced   = trained * E M
    reference = M if resharding else copy; 0 without a reference

This is what each rank receives; with ring algorithms it sends as much. n ranks share one copy of the weights. In an
all-gather or a reduce-scatter each of them receives (n - 1) / n of the whole tensor. In an all-reduce over R replicas
each receives 2 (R - 1) / R of its tensor.

root, layers: elements of sharded weights in FSDP's root unit and in its layers, those of the reference where it has
weights of its own. trained: those with a gradient. A weight is padded to a multiple of n rows, and the padding counts.
d: bytes per element of the compute dtype; gradients are reduced in float32. E M: inner epochs times micro-batches, of
which there are fewer where groups are skipped. The rollout gathers all weights once. copy: 1 where the reference has
weights of its own, whose root is gathered once; else 0: the reference pass then gathers the policy's root, which stays
gathered for the policy's first micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hark.grpo.runtime.sharding import whole_weights
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy

FLOAT = 4  # bytes of float32


@dataclass(frozen=True)
class Sharded:
    """Elements of a policy's sharded weights, each with the rows that pad it to a multiple of the ranks."""

    root: int
    layers: int
    trained: int


def sharded_elements(policy: Policy, shards: int) -> Sharded:
    """What is sharded of a policy, before or after it is."""
    whole = whole_weights(policy)
    padded = {p: _padded(p.shape, shards) for p in policy.parameters() if p not in whole}
    in_layers = {p for layer in policy.layers() for p in layer.parameters()}
    return Sharded(
        root=sum(size for p, size in padded.items() if p not in in_layers),
        layers=sum(size for p, size in padded.items() if p in in_layers),
        trained=sum(size for p, size in padded.items() if p.requires_grad),
    )


def step_bytes(
    policy: Policy,
    reference: Policy | WithoutAdapters | None,
    *,
    shards: int,
    replicas: int = 1,
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    micro_batches: int,
    inner_epochs: int = 1,
) -> float:
    """Bytes that a rank receives in a step of GRPO, by the formula above."""
    own, updates = sharded_elements(policy, shards), inner_epochs * micro_batches
    gathered = own.root * (1 + updates) + own.layers * (1 + updates * (2 if reshard else 1))
    if reference is not None:
        copy = isinstance(reference, Policy)
        theirs = sharded_elements(reference, shards) if copy else own
        gathered += copy * theirs.root + (micro_batches if reshard else copy) * theirs.layers
    reduced = FLOAT * own.trained * updates
    within = (dtype.itemsize * gathered + reduced) * (shards - 1) / shards
    return within + 2 * reduced / shards * (replicas - 1) / replicas


def _padded(shape: torch.Size, shards: int) -> int:
    return -(-shape[0] // shards) * shards * shape[1:].numel()
