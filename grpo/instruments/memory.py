"""The memory that a run needs, in bytes per rank, by phase and by part, from the sizes of the model and the work.

Arithmetic only: nothing is allocated. tests/test_memory.py compares it with the bytes measured in a simulated step.

    peak = max over phases of (weights + gradients + optimizer + reference + audio cache + recorded + gathered
                           + KV cache + activations + logits)

Not counted: the CUDA context, fragmentation in the allocator, and the workspaces of cuDNN, cuBLAS and NCCL. Leave a
twentieth of the device for them. Letters: d bytes per element of the compute dtype, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hark.grpo.instruments.shape import FLOAT, Shape, Tower
from hark.grpo.scorer import CHUNK
from hark.models.attention import mask_row
from hark.models.cache import STEPS

PARTS = (
    "weights", "gradients", "optimizer", "reference", "audio cache", "recorded", "gathered", "KV cache", "activations",
    "logits",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step.

    prompts: in a step. micro_batch: prompts at a time in scoring. prompt: tokens of a prompt, audio included.
    frames: mel frames of a prompt's clip, 0 without audio. evaluated: prompts at a time in an evaluation, 0 without
    one. decoded: prompts at a time in the rollout, 0 for all. samples: False if there is no rollout, as in SFT.
    micro_branches: completions of each prompt at a time in scoring, 0 for all.
    """

    prompts: int
    micro_batch: int
    prompt: int
    frames: int
    group_size: int
    max_new_tokens: int
    evaluated: int = 0
    decoded: int = 0
    samples: bool = True
    micro_branches: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row: the prompt, and G branches without their last tokens, which are not fed to the decoder."""
        return self.prompt + self.group_size * (self.max_new_tokens - 1)

    @property
    def branches(self) -> int:
        """Completions of a group that are scored at a time."""
        return min(self.micro_branches or self.group_size, self.group_size)

    @property
    def splits(self) -> bool:
        """Whether a group is scored in parts, apart from its prompt."""
        return self.branches < self.group_size

    @property
    def fed(self) -> int:
        """Tokens of the branches of a row that are scored at a time."""
        return self.branches * (self.max_new_tokens - 1)

    def mask(self, d: int) -> int:
        """Bytes of the branches' mask in scoring, once for all layers: in boolean and in additive form (d bytes)."""
        length = self.prompt + self.fed
        return self.micro_batch * self.fed * (length + d * mask_row(length))

    @property
    def scored(self) -> int:
        """Completion tokens of a micro-batch that are scored at a time."""
        return self.micro_batch * self.branches * self.max_new_tokens


@dataclass(frozen=True)
class Setting:
    """How the model is stored and sharded.

    shards: ranks that share one copy of the weights. replicas: such copies. dtype: bytes per element of the computation
    and of frozen weights. master: bytes per element of trained weights. tower_cache: bytes for the outputs of a frozen
    tower.
    keep_prefill: whether the rollout's forward over all prompts of a step is kept for its first update. recorded:
    whether decode steps are CUDA graphs, which keep what they read from rollout to rollout.
    reference: "none", "adapters" (the policy with its adapters disabled), "copy" (weights of its own) or "moving" (the
    same, which change and are stored as those of the policy). attention: of scoring, "sdpa" or "flex".
    """

    shards: int
    dtype: int
    master: int
    train: str = "all"
    tower_cache: int = 0
    recompute: bool = False
    reshard: bool = True
    lora_rank: int = 0
    reference: str = "copy"
    replicas: int = 1
    offload: bool = False
    offload_reference: bool = False
    keep_prefill: bool = False
    recorded: bool = False
    attention: str = "sdpa"


@dataclass(frozen=True)
class Plan:
    """Bytes per rank. phases: phase -> part -> bytes on the device at the phase's peak. host: bytes in host memory."""

    phases: dict[str, dict[str, int]]
    host: int

    @property
    def worst(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes on the device in the worst phase."""
        return self.total(self.worst)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())


def plan(shape: Shape, work: Work, setting: Setting) -> Plan:
    """Peak memory per rank of one step, phase by phase.

    Weights, AdamW's two moments and the reference exist in every phase; gradients from backward to optimizer step.
    """
    units, s = UnitSizes(shape, setting), setting
    sharded = units.sharded(units.trained)
    constant = {
        "weights": sharded + units.frozen_device,
        "optimizer": 2 * sharded,
        "reference": 0 if s.offload_reference else units.reference,
        "audio cache": units.tower_cache,
        "recorded": units.recorded,
    }
    phases = {}
    if work.samples:
        drawn = replace(work, prompts=work.decoded or work.prompts)
        shorter = replace(drawn, max_new_tokens=min(work.max_new_tokens, STEPS + 1))
        stays = _cache(shape, shorter, s.dtype) if s.recorded else 0
        rollout = _rollout(shape, drawn, units, kept=_kept(shape, work, units), stays=stays)
        phases["rollout"] = _add(constant, _peak(rollout))
        constant["KV cache"] = stays  # from here on
    if work.evaluated:
        answered = replace(work, prompts=work.evaluated, group_size=1)
        phases["evaluation"] = _add(constant, _peak(_rollout(shape, answered, units)))
    if s.reference != "none":
        phases["reference"] = _add(constant, _peak(_reference(shape, work, units)))
    backward = _backward_after_prompts if s.keep_prefill or work.splits else _backward
    phases["backward"] = _add(constant, {"gradients": sharded}, _peak(backward(shape, work, units)))
    phases["optimizer"] = _add(constant, {"gradients": sharded})
    host = 4 * s.master * units.trained // s.shards + units.frozen_host if s.offload else 0
    return Plan(phases, host + (units.reference if s.offload_reference else 0))


class UnitSizes:
    """Sizes of FSDP's units (the root, a decoder layer, a tower layer), and of what is trained and frozen.

    Every rank holds all of a frozen tower. With one shard, frozen weights are not gathered, but trained weights still
    get a gathered copy. whole: one process alone computes in float32, and uses its weights as they are. Sizes are in
    elements, or in bytes where a comment says so.
    root, layer: gathered elements of a unit; gathered_tower_layer, and tower_layer of its weights if they are trained.
    total: gathered elements of all units. *_trained: elements with a gradient. reduced: bytes per such element of a
    unit while its gradients are reduced: the unsharded gradient, and its float32 copy.
    """

    def __init__(self, shape: Shape, setting: Setting):
        self.setting = setting
        d, n, lora = setting.dtype, setting.shards, setting.lora_rank > 0
        tower = shape.tower or Tower(0, 0, 0, 0, 0, 0)
        partly = lora or setting.train == "projector"  # most of the weights are frozen
        outer = setting.lora_rank * shape.outer_adapters
        frozen_tower = tower.parameters if (partly or setting.train == "no-tower") and not outer else 0
        self.tower_cache = setting.tower_cache if frozen_tower else 0  # bytes
        projector = shape.projector if setting.train == "projector" and not lora else 0
        frozen = shape.parameters - frozen_tower - projector if partly else 0
        adapters = setting.lora_rank * shape.adapters
        root = shape.root - (tower.rest if frozen_tower else 0)
        self.trained = adapters * shape.layers + outer + projector if partly else shape.parameters - frozen_tower
        self.frozen_host = d * frozen // n if setting.offload else 0  # bytes
        self.frozen_device = d * frozen_tower + d * frozen // n - self.frozen_host  # bytes
        self.root_trained = projector + outer if partly else root
        self.layer_trained = adapters if partly else shape.layer
        self.embedding_trained = 0 if partly else shape.vocabulary * shape.hidden
        self.tower_layer = 0 if frozen_tower else tower.layer
        self.whole = n == setting.replicas == 1 and d == FLOAT and not setting.offload
        self.reduced = d if self.whole else d + FLOAT
        gathers = n > 1 or not partly or setting.offload
        self.root = 0 if self.whole else root if gathers else projector
        self.layer = 0 if self.whole else (shape.layer if gathers else 0) + (adapters if lora else 0)
        self.gathered_tower_layer = 0 if self.whole else self.tower_layer
        self.total = self.root + shape.layers * self.layer + tower.layers * self.gathered_tower_layer
        # Bytes of the copies that recorded steps read: of what is gathered, but for layers of the tower.
        self.recorded = d * (self.root + shape.layers * self.layer) if setting.recorded else 0
        self.gather_buffer = d * self.layer if n > 1 else 0  # bytes; with one shard there is no buffer
        # Bytes at the first layer of a pass, in addition to the gathered root. The root's all-gather buffer is freed
        # only after the layer is copied out of its own buffer, so both buffers and the gathered layer exist.
        self.first_layer = d * (self.root + 2 * (self.tower_layer or self.layer)) if n > 1 else 0
        self._set_reference(shape, frozen_tower)

    def _set_reference(self, shape: Shape, frozen_tower: int) -> None:
        """Bytes of a reference with weights of its own, sharded and gathered; a frozen tower is the policy's."""
        s, rest = self.setting, shape.tower.rest if shape.tower and frozen_tower else 0
        copy, elements = s.reference in ("copy", "moving"), shape.parameters - frozen_tower
        moving, total = s.reference == "moving", s.dtype * elements
        gathers = copy and (s.shards > 1 or s.offload_reference or moving and not self.whole)
        self.reference = (s.master if moving else s.dtype) * elements // s.shards if copy else 0
        layer = shape.layer if frozen_tower or not shape.tower else shape.tower.layer  # of the first unit
        root, prefetches = s.dtype * (shape.root - rest), s.shards > 1
        resharding = root + s.dtype * shape.layer * (1 + prefetches)
        self.reference_gathered = (resharding if s.reshard else total) if gathers else 0
        self.reference_first_layer = root + 2 * s.dtype * layer if gathers and s.reshard and prefetches else 0

    def sharded(self, elements: int) -> int:
        """Bytes on the device of this rank's shard of `elements` in the master dtype; 0 if offloaded."""
        return 0 if self.setting.offload else self.setting.master * elements // self.setting.shards

    def gathered(self) -> int:
        """Gathered bytes during a pass: the root, one layer (all without resharding), and the next layer's buffer."""
        weights = self.root + self.layer if self.setting.reshard else self.total
        return self.setting.dtype * weights + self.gather_buffer


def _rollout(shape: Shape, work: Work, units: UnitSizes, kept: int = 0, stays: int = 0) -> Iterator[dict[str, int]]:
    """Candidates for the peak of a rollout: prefill, decoding, the audio tower, gathering all weights.

    kept: bytes of the prompts' forward that stay for the update. stays: of the cache of the rollout before.

    KV cache: layers * 2 * kv_heads * head_size * d * N * (P + G (T - 1)).
    Decoding: one layer's attention scores, three float32 copies and the weights in d bytes, (B, heads, P + T - 1).
    Sampling: float32 logprobs, float64 probabilities and their cumulative sum, (B, V): 4 + 8 + 8 bytes.
    """
    d, n, gathered = units.setting.dtype, work.prompts, units.setting.dtype * units.total
    cache = _cache(shape, work, d)
    prompt = n * work.prompt
    prefill = kept + prompt * (shape.forward_peak(d) + d * shape.hidden)
    decode = kept + n * work.group_size * (work.prompt + work.max_new_tokens - 1) * shape.heads * (3 * FLOAT + d)
    sampling = 20 * n * work.group_size * shape.vocabulary
    yield {"gathered": gathered, "KV cache": cache, "activations": prefill}
    yield {"gathered": gathered, "KV cache": cache, "activations": decode, "logits": sampling}
    if shape.tower and not kept:
        yield {"gathered": gathered, "KV cache": stays, "activations": shape.tower.forward_peak(n, work.frames, d)}
    yield {"gathered": gathered + units.gather_buffer, "KV cache": stays}


def _cache(shape: Shape, work: Work, d: int) -> int:
    """Bytes of the keys and values of all prompts and branches."""
    return work.prompts * work.length * shape.layers * _keys(shape, d)


def _kept(shape: Shape, work: Work, units: UnitSizes) -> int:
    """Bytes that the forward over all prompts of a step saves for its backward, where it is kept."""
    return _prompts(shape, work, units, work.prompts) if units.setting.keep_prefill else 0


def _prompts(shape: Shape, work: Work, units: UnitSizes, count: int) -> int:
    """Bytes that a forward over so many prompts saves for its backward, with the keys and values of all layers."""
    d, recompute = units.setting.dtype, units.setting.recompute
    layer = d * shape.hidden + _keys(shape, d) if recompute else shape.saved(d)
    tower = _tower_saved(shape.tower, units, count, work.frames) if shape.tower and units.tower_layer else 0
    return count * work.prompt * (shape.layers * layer + d * shape.hidden) + tower


def _keys(shape: Shape, d: int) -> int:
    """Bytes of the keys and values of a token in one layer."""
    return 2 * shape.kv_heads * shape.head_size * d


def _tower_saved(tower: Tower, units: UnitSizes, clips: int, frames: int) -> int:
    d, recompute = units.setting.dtype, units.setting.recompute
    layer = tower.inputs(clips, frames, d) if recompute else tower.saved(clips, frames, d)
    return tower.layers * layer + tower.convolutions(clips, frames, d)


def _reference(shape: Shape, work: Work, units: UnitSizes) -> Iterator[dict[str, int]]:
    """Candidates for the peak of the reference's forward: a layer, the LM head, the audio tower, the first layer."""
    s, d = units.setting, units.setting.dtype
    gathered = units.gathered() if s.reference == "adapters" else units.reference_gathered
    tokens = work.micro_batch * (max(work.prompt, work.fed) if work.splits else work.length)
    kept = _kept(shape, work, units)
    if work.splits:
        kept += work.micro_batch * work.prompt * shape.layers * _keys(shape, d)
    layer = kept + tokens * shape.forward_peak(d) + _mask(work, s)
    head = kept + 2 * d * work.scored * shape.hidden
    yield {"gathered": gathered, "activations": layer}
    yield {"gathered": gathered, "activations": head, "logits": _head(shape, work)}
    if shape.tower:
        yield {"gathered": gathered, "activations": kept + shape.tower.forward_peak(work.micro_batch, work.frames, d)}
    if s.reference != "adapters":
        yield {"gathered": units.reference_first_layer, "activations": kept}
    else:
        yield {"gathered": d * units.root + units.first_layer, "activations": kept}


def _backward(shape: Shape, work: Work, units: UnitSizes) -> Iterator[dict[str, int]]:
    """Candidates for the peak of a forward and backward.

    `plan` adds the sharded gradients. "gradients" here are unsharded gradients (d bytes) and their float32 copies. With
    one micro-batch, the sharded gradients that do not exist yet are subtracted: `missing`, and `missing_outside` when
    only those outside the decoder layers are missing.
    """
    s, d, tokens = units.setting, units.setting.dtype, work.micro_batch * work.length
    layer, inputs = tokens * shape.saved(d), d * tokens * shape.hidden
    decoder = shape.layers * (inputs if s.recompute else layer) + _mask(work, s)
    recomputed = layer if s.recompute else 0
    clips, tower = (work.micro_batch, work.frames, d), shape.tower if units.tower_layer else None
    tower_layer = tower.saved(*clips) if tower else 0
    if tower:
        decoder += _tower_saved(tower, units, work.micro_batch, work.frames)
    in_tower = decoder - shape.layers * (inputs if s.recompute else layer) - _mask(work, s)
    embedding, accumulates = d * units.embedding_trained, work.prompts > work.micro_batch
    missing = 0 if accumulates else units.sharded(units.trained)
    missing_outside = 0 if accumulates else units.sharded(units.trained - shape.layers * units.layer_trained)
    yield {"gathered": d * units.root + units.first_layer, "activations": in_tower}
    yield {  # the LM head, on one chunk of tokens
        "gathered": units.gathered(),
        "gradients": (embedding if work.scored > CHUNK else 0) - missing,
        "activations": decoder + tokens * shape.hidden * (FLOAT + 2 * d) + 2 * d * work.scored * shape.hidden,
        "logits": _head(shape, work),
    }
    yield {  # a decoder layer, while gradients of the layer after it are reduced
        "gathered": units.gathered(),
        "gradients": embedding + units.reduced * units.layer_trained - missing,
        "activations": decoder + recomputed + tokens * shape.gradients(d),
    }
    yield {  # the embeddings: gradients from the LM head, from completion tokens and from prompt tokens
        "gathered": d * units.root,
        "gradients": (2 if shape.tied else 3) * embedding - missing_outside,
        "activations": in_tower + 2 * inputs,
    }
    if tower:
        yield {  # a layer of the tower
            "gathered": d * (units.root + 2 * units.gathered_tower_layer),
            "gradients": (1 if shape.tied else 2) * embedding + units.reduced * units.tower_layer - missing_outside,
            "activations": in_tower + (tower_layer if s.recompute else 0) + tower.gradients(*clips),
        }
    yield {"gradients": _root_reduction(units, accumulates)}


def _backward_after_prompts(shape: Shape, work: Work, units: UnitSizes) -> Iterator[dict[str, int]]:
    """The same with a forward over prompts apart: over branches, part by part, then over the prompts.

    These are all of a step, whose forward the rollout has kept, or those of a micro-batch.
    """
    s, d, m, layers = units.setting, units.setting.dtype, work.micro_batch, shape.layers
    n = work.prompts if s.keep_prefill else m
    kept, tokens = _prompts(shape, work, units, n), m * work.fed
    gradients = n * work.prompt * layers * _keys(shape, d)  # of the prompts' keys and values
    copied = m * work.prompt * 2 * shape.attention * d  # the same in front of those of branches, for each query head
    saved, recomputed = tokens * shape.saved(d) + copied, 0
    if s.recompute:
        saved, recomputed = d * tokens * shape.hidden, saved
    branches = kept + layers * saved + _mask(work, s)
    accumulates = work.prompts > m or work.splits
    embedding, missing = d * units.embedding_trained, 0 if accumulates else units.sharded(units.trained)
    yield {  # the LM head, on one chunk of tokens
        "gathered": units.gathered(),
        "gradients": (embedding if work.scored > CHUNK else 0) - missing,
        "activations": branches + tokens * shape.hidden * (FLOAT + 2 * d) + 2 * d * work.scored * shape.hidden,
        "logits": _head(shape, work),
    }
    reduced = embedding + units.reduced * units.layer_trained  # while gradients of the layer after it are reduced
    yield {  # a decoder layer, over the branches
        "gathered": units.gathered(),
        "gradients": reduced - missing,
        "activations": branches + recomputed + gradients + tokens * shape.gradients(d),
    }
    of_layer = n * work.prompt * (shape.gradients(d) + (shape.saved(d) if s.recompute else 0))
    yield {
        "gathered": units.gathered(),
        "gradients": reduced,
        "activations": kept + gradients + of_layer,
    }  # the prompts
    if shape.tower and units.tower_layer:
        clips = n, work.frames, d
        in_tower = _tower_saved(shape.tower, units, n, work.frames) + shape.tower.gradients(*clips)
        yield {  # a layer of the tower
            "gathered": d * (units.root + 2 * units.gathered_tower_layer),
            "gradients": embedding + units.reduced * units.tower_layer,
            "activations": in_tower + (shape.tower.saved(*clips) if s.recompute else 0),
        }
    yield {"gradients": _root_reduction(units, accumulates=True)}


def _root_reduction(units: UnitSizes, accumulates: bool) -> int:
    """Bytes in addition to the sharded gradients while the root unit's gradients are reduced in float32.

    First the unsharded gradient (d bytes) and its float32 copy; then that copy and this rank's shard of the sum. After
    one backward the shard is the gradient that `plan` counts; after several it is added to that of earlier ones.
    """
    if units.whole:
        return 0
    s, root = units.setting, units.root_trained
    counted = 0 if accumulates else units.sharded(root)
    shard = FLOAT * root // s.shards - counted
    return max((s.dtype + FLOAT) * root, FLOAT * root + shard)


def _mask(work: Work, setting: Setting) -> int:
    """Bytes of the mask in scoring; FlexAttention has one of blocks, of some kilobytes."""
    return 0 if setting.attention == "flex" else work.mask(setting.dtype)


def _head(shape: Shape, work: Work) -> int:
    """Bytes of one chunk of scored tokens over the vocabulary: four float32 copies, in forward and in backward."""
    return 4 * FLOAT * min(CHUNK, work.scored) * shape.vocabulary


def _peak(candidates: Iterator[dict[str, int]]) -> dict[str, int]:
    return max(candidates, key=lambda parts: sum(parts.values()))


def _add(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(p.get(name, 0) for p in parts) for name in PARTS}
