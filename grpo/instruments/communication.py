"""The bytes that each rank receives in a step of GRPO, by a formula. With ring algorithms it sends as much.

    bytes     = (shards - 1) / shards * (d * gathered + 4 * reduced)
                + 2 * (replicas - 1) / replicas * 4 * trained * epochs / shards
    gathered  = root * (1 + copy + passes) + layers * (1 + reference + passes * (2 if resharding else 1))
    reduced   = trained * passes
    reference = micro-batches if resharding else copy; 0 without a reference

shards: ranks that share one copy of the weights. In an all-gather or a reduce-scatter a rank receives
(shards - 1) / shards of the full tensor; in an all-reduce, 2 * (replicas - 1) / replicas of its tensor.

root, layers: elements of sharded weights in FSDP's root unit and in its layers; in the terms `copy` and `reference`,
those of the reference's weights if it has its own. trained: elements with a gradient. FSDP pads a weight to a multiple
of `shards` rows, and the padding counts. d: bytes per element of the compute dtype; gradients are reduced in float32.

passes: inner epochs times micro-batches, fewer if groups are skipped. Between replicas only the last micro-batch of an
epoch reduces gradients. The rollout gathers all weights once. copy: 1 if the reference has weights of its own, whose
root is gathered once; else 0. With copy 0 the reference pass gathers the policy's root, and the policy's first
micro-batch uses it without gathering it again.

With rollout.keep_prefill the micro-batches of the first epoch neither gather the layers of the tower nor reduce
gradients of tower and projector. The backward through the prompts gathers all once, and reduces all gradients but those
of the LM head. With optim.micro_branches the same holds for each part of a micro-batch, in every epoch, and each
micro-batch has a forward over its prompts too, and a backward through them.
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
    """Elements of a policy's sharded weights, including the rows that pad each to a multiple of the ranks."""

    root: int
    layers: int
    trained: int
    tower_layers: int  # of `layers`
    of_prompts: int  # of `trained`, in tower and projector
    head: int  # of `trained`, if it has weights of its own


def sharded_elements(policy: Policy, shards: int) -> Sharded:
    """Elements of the weights that FSDP shards over `shards` ranks; the policy may be sharded or not yet."""
    unsharded = whole_weights(policy)
    padded = {p: _padded(p.shape, shards) for p in policy.parameters() if p not in unsharded}
    in_layers = {p for layer in policy.layers() for p in layer.parameters()}
    in_tower = {p for layer in policy.tower_layers for p in layer.parameters()}
    hearing = [policy.tower, *policy.projectors] if policy.tower is not None else []
    of_prompts = {p for module in hearing for p in module.parameters()}
    head = policy.model.get_output_embeddings().weight
    own_head = head.requires_grad and head is not policy.decoder.get_input_embeddings().weight
    return Sharded(
        root=sum(size for p, size in padded.items() if p not in in_layers),
        layers=sum(size for p, size in padded.items() if p in in_layers),
        trained=sum(size for p, size in padded.items() if p.requires_grad),
        tower_layers=sum(size for p, size in padded.items() if p in in_tower),
        of_prompts=sum(size for p, size in padded.items() if p in of_prompts and p.requires_grad),
        head=padded[head] if own_head else 0,
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
    keep_prefill: bool = False,
    parts: int = 1,
) -> float:
    """Bytes that a rank receives in a step of GRPO, by the formula of this module.

    reference: a policy with weights of its own, the policy with its adapters disabled, or None.
    dtype: of the computation. reshard: whether layers are gathered again for the backward. keep_prefill: whether the
    rollout's forward over the prompts is kept. parts: in which a group is scored.
    """
    own = sharded_elements(policy, shards)
    gathered, reduced = own.root + own.layers, 0  # in the rollout
    for epoch in range(inner_epochs):
        more = _epoch(own, micro_batches, parts, kept=keep_prefill and not epoch, times=2 if reshard else 1)
        gathered, reduced = gathered + more[0], reduced + more[1]
    if reference is not None:
        theirs = sharded_elements(reference, shards) if isinstance(reference, Policy) else own
        copy = theirs is not own
        layers = theirs.layers + (theirs.layers - theirs.tower_layers) * (parts if parts > 1 else 0)
        gathered += copy * theirs.root + (micro_batches * layers if reshard else copy * theirs.layers)
    within = (dtype.itemsize * gathered + FLOAT * reduced) * (shards - 1) / shards
    between = FLOAT * own.trained * inner_epochs / shards
    return within + 2 * between * (replicas - 1) / replicas


def _epoch(own: Sharded, micro_batches: int, parts: int, *, kept: bool, times: int) -> tuple[int, int]:
    """Elements that an epoch gathers and reduces. times: how often a forward and a backward gather a layer."""
    if parts == 1 and not kept:
        return micro_batches * (own.root + own.layers * times), micro_batches * own.trained
    decoder, scored, backwards = own.layers - own.tower_layers, micro_batches * parts, 1 if kept else micro_batches
    gathered = scored * (own.root + decoder * times)
    # A forward over prompts apart gathers the tower too, whose weights no part of the group needs in between.
    gathered += backwards * (own.root + (own.layers if kept else decoder * times + 2 * own.tower_layers))
    return gathered, scored * (own.trained - own.of_prompts) + backwards * (own.trained - own.head)


def _padded(shape: torch.Size, shards: int) -> int:
    return -(-shape[0] // shards) * shards * shape[1:].numel()
