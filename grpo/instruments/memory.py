"""What a run needs of memory: the sizes of a model and of the work -> bytes per rank, by phase and by part.

Pure arithmetic over what this engine, FSDP2 and autograd hold; nothing is allocated. tests/test_memory.py holds it
against the engine itself.

    peak = max over phases of (weights + gradients + optimizer + reference + audio cache + gathered + KV cache
                           + activations + logits)

Not counted: the CUDA context, what the allocator loses to fragmentation, and the workspaces of cuDNN, cuBLAS and NCCL;
leave a twentieth of the device for them. Letters: d bytes of the compute dtype, m of the master dtype, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hark.grpo.instruments.shape import FLOAT, Shape, Tower
from hark.grpo.scorer import CHUNK

PARTS = (
    "weights", "gradients", "optimizer", "reference", "audio cache", "gathered", "KV cache", "activations", "logits"
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one rank does in a step: prompts in the rollout, of them `micro_batch` at a time in scoring.

    prompt: tokens of a prompt, its audio included; frames: mel frames of its clip, 0 without one; evaluated: prompts
    at a time in an evaluation, 0 without one; decoded: prompts at a time in the rollout, 0 for all of them; samples:
    False where completions are given, as in SFT.
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

    @property
    def length(self) -> int:
        """Tokens of a row: the prompt and G branches, whose last tokens are drawn but never fed."""
        return self.prompt + self.group_size * (self.max_new_tokens - 1)

    def mask(self, d: int) -> int:
        """Bytes of the branches' mask in scoring, which all layers share: booleans, and addends of d bytes."""
        branches = self.length - self.prompt
        return (1 + d) * self.micro_batch * branches * self.length

    @property
    def scored(self) -> int:
        """Completion tokens of a micro-batch."""
        return self.micro_batch * self.group_size * self.max_new_tokens


@dataclass(frozen=True)
class Setting:
    """How the model is stored and spread.

    shards: ranks that share one copy of the weights; dtype, master: bytes per element of the computation, and of
    trained weights; reference: "none", "adapters" (the policy without its adapters) or "copy"; tower_cache: bytes for
    what a frozen tower has heard.
    """

    shards: int
    dtype: int
    master: int
    train_tower: bool = True
    tower_cache: int = 0
    recompute: bool = False
    reshard: bool = True
    lora_rank: int = 0
    reference: str = "copy"
    offload: bool = False
    offload_reference: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes per rank: phase -> part -> bytes on the device at the phase's height, and bytes in host memory."""

    phases: dict[str, dict[str, int]]
    host: int

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())


def plan(shape: Shape, work: Work, setting: Setting) -> Plan:
    """Peak memory per rank of one step, phase by phase.

    Weights, the optimizer's two moments and the reference stay throughout; gradients from backward to optimizer step.
    """
    units, s = Units(shape, setting), setting
    sharded = units.sharded(units.trained)
    kept = {
        "weights": sharded + units.frozen_device,
        "optimizer": 2 * sharded,
        "reference": 0 if s.offload_reference else units.reference,
        "audio cache": units.cache,
    }
    at_once = {
        "rollout": replace(work, prompts=work.decoded or work.prompts) if work.samples else None,
        "evaluation": replace(work, prompts=work.evaluated, group_size=1) if work.evaluated else None,
    }
    phases = {name: _add(kept, _highest(_rollout(shape, drawn, units))) for name, drawn in at_once.items() if drawn}
    if s.reference != "none":
        phases["reference"] = _add(kept, _highest(_reference(shape, work, units)))
    phases["backward"] = _add(kept, {"gradients": sharded}, _highest(_backward(shape, work, units)))
    phases["optimizer"] = _add(kept, {"gradients": sharded})
    host = 4 * s.master * units.trained // s.shards + units.frozen_host if s.offload else 0
    return Plan(phases, host + (units.reference if s.offload_reference else 0))


class Units:
    """What is trained and what is frozen, and the size of FSDP's units: the root, a decoder layer, a tower layer.

    A frozen tower stands whole on each rank. With one rank to a copy all frozen weights are whole already, while
    trained ones get a gathered copy even then. Sizes are elements unless said; `*_trained` are those with gradients.
    """

    def __init__(self, shape: Shape, setting: Setting):
        self.setting = setting
        d, n, lora = setting.dtype, setting.shards, setting.lora_rank > 0
        tower = shape.tower or Tower(0, 0, 0, 0, 0, 0)
        whole = tower.parameters if lora or not setting.train_tower else 0
        self.cache = setting.tower_cache if whole else 0  # bytes
        frozen = shape.parameters - whole if lora else 0
        adapters = setting.lora_rank * shape.adapters
        root = shape.root - (tower.rest if whole else 0)
        self.trained = adapters * shape.layers if lora else shape.parameters - whole
        self.frozen_host = d * frozen // n if setting.offload else 0  # bytes
        self.frozen_device = d * whole + d * frozen // n - self.frozen_host  # bytes
        self.root_trained = 0 if lora else root
        self.layer_trained = adapters if lora else shape.layer
        self.embedding_trained = 0 if lora else shape.vocabulary * shape.hidden
        self.tower_layer = 0 if whole else tower.layer
        gathers = n > 1 or not lora or setting.offload
        self.root = root if gathers else 0
        self.layer = (shape.layer if gathers else 0) + (adapters if lora else 0)
        self.all = self.root + shape.layers * self.layer + tower.layers * self.tower_layer
        self.buffer = d * self.layer if n > 1 else 0  # bytes of an all-gather's buffer; one rank copies in place
        # A buffer is freed after the next unit's copy out of its own: at a pass's first unit this one is the root's.
        self.entry = d * (self.root + 2 * (self.tower_layer or self.layer)) if n > 1 else 0  # bytes
        self._place_reference(shape, whole)

    def _place_reference(self, shape: Shape, whole: int) -> None:
        """Bytes of the reference: its own, and what is gathered of it in use; a frozen tower is the policy's."""
        s, rest = self.setting, shape.tower.rest if shape.tower and whole else 0
        copy = s.reference == "copy"
        gathers = copy and (s.shards > 1 or s.offload_reference)
        self.reference = s.dtype * (shape.parameters - whole) // s.shards if copy else 0
        layer = shape.layer if whole or not shape.tower else shape.tower.layer  # of the first unit
        root, next_too = s.dtype * (shape.root - rest), s.shards > 1
        passing = root + s.dtype * shape.layer * (1 + next_too)
        self.reference_passing = (passing if s.reshard else s.dtype * (shape.parameters - whole)) if gathers else 0
        self.reference_entry = root + 2 * s.dtype * layer if gathers and s.reshard and next_too else 0

    def sharded(self, elements: int) -> int:
        """Bytes on the device of this rank's share of so many elements in the master dtype."""
        return 0 if self.setting.offload else self.setting.master * elements // self.setting.shards

    def gathered(self) -> int:
        """Bytes of gathered weights in a pass over the layers: the root, a layer or all, and the next one's buffer."""
        return self.setting.dtype * (self.root + self.layer if self.setting.reshard else self.all) + self.buffer


def _rollout(shape: Shape, work: Work, units: Units) -> Iterator[dict[str, int]]:
    """All weights gathered; the KV cache of N rows; then either the prefill's layers or the draws.

    KV cache: layers * 2 * kv_heads * head_size * d * N * (P + G (T - 1)).
    Decode: a layer's scores of a step in float32, thrice, and their weights, (B, heads, P + T - 1).
    Draws: float32 logprobs, then float64 probabilities and their running sum, (B, V): 4 + 8 + 8 bytes.
    """
    d, n, gathered = units.setting.dtype, work.prompts, units.setting.dtype * units.all
    cache = shape.layers * 2 * shape.kv_heads * shape.head_size * d * n * work.length
    prompt = n * work.prompt
    prefill = prompt * (shape.passing(d) + d * shape.hidden)
    decode = n * work.group_size * (work.prompt + work.max_new_tokens - 1) * shape.heads * (3 * FLOAT + d)
    drawn = 20 * n * work.group_size * shape.vocabulary
    yield {"gathered": gathered, "KV cache": cache, "activations": prefill}
    yield {"gathered": gathered, "KV cache": cache, "activations": decode, "logits": drawn}
    if shape.tower:
        yield {"gathered": gathered, "activations": shape.tower.passing(n, work.frames, d)}
    yield {"gathered": gathered + units.buffer}


def _reference(shape: Shape, work: Work, units: Units) -> Iterator[dict[str, int]]:
    """A forward without gradient, by the reference or by the policy without its adapters."""
    s, d = units.setting, units.setting.dtype
    gathered = units.reference_passing if s.reference == "copy" else units.gathered()
    tokens = work.micro_batch * work.length
    passing = tokens * shape.passing(d) + work.mask(d)
    yield {"gathered": gathered, "activations": passing}
    yield {"gathered": gathered, "activations": 2 * d * work.scored * shape.hidden, "logits": _head(shape, work)}
    if shape.tower:
        yield {"gathered": gathered, "activations": shape.tower.passing(work.micro_batch, work.frames, d)}
    if s.reference == "copy":
        yield {"gathered": units.reference_entry}
    else:
        yield {"gathered": d * units.root + units.entry}


def _backward(shape: Shape, work: Work, units: Units) -> Iterator[dict[str, int]]:
    """The moments of a forward and backward at which memory is highest.

    Gradients here are those beside the sharded ones: whole on their rank, in d bytes, and their float32 copies; less,
    in the first micro-batch, the sharded ones that are yet to come.
    """
    s, d, tokens = units.setting, units.setting.dtype, work.micro_batch * work.length
    layer, inputs = tokens * shape.kept(d), d * tokens * shape.hidden
    decoder = shape.layers * (inputs if s.recompute else layer) + work.mask(d)
    again = layer if s.recompute else 0  # the activations of the layer that is computed again
    clips, tower = (work.micro_batch, work.frames, d), shape.tower if units.tower_layer else None
    heard = tower.kept(*clips) if tower else 0
    if tower:
        decoder += tower.layers * (tower.inputs(*clips) if s.recompute else heard) + tower.convolutions(*clips)
    in_tower = decoder - shape.layers * (inputs if s.recompute else layer) - work.mask(d)
    embedding, adds = d * units.embedding_trained, work.prompts > work.micro_batch
    early = 0 if adds else units.sharded(units.trained)
    late = 0 if adds else units.sharded(units.trained - shape.layers * units.layer_trained)
    yield {"gathered": d * units.root + units.entry, "activations": in_tower}
    yield {  # the head's logits, of a chunk at a time
        "gathered": units.gathered(),
        "gradients": (embedding if work.scored > CHUNK else 0) - early,
        "activations": decoder + tokens * shape.hidden * (FLOAT + 2 * d) + 2 * d * work.scored * shape.hidden,
        "logits": _head(shape, work),
    }
    yield {  # the last layer, while the one behind it is reduced
        "gathered": units.gathered(),
        "gradients": embedding + (d + FLOAT) * units.layer_trained - early,
        "activations": decoder + again + tokens * shape.gradients(d),
    }
    yield {  # the embeddings: the gradients of the head, of the completions' and of the prompts' embeddings
        "gathered": d * units.root,
        "gradients": (2 if shape.tied else 3) * embedding - late,
        "activations": in_tower + 2 * inputs,
    }
    if tower:
        yield {  # the tower's last layer
            "gathered": d * (units.root + 2 * units.tower_layer),
            "gradients": (1 if shape.tied else 2) * embedding + (d + FLOAT) * units.tower_layer - late,
            "activations": in_tower + (heard if s.recompute else 0) + tower.gradients(*clips),
        }
    yield {"gradients": _root_reduction(work, units)}


def _root_reduction(work: Work, units: Units) -> int:
    """Bytes, beside the sharded gradients, while those of the root unit are reduced in float32.

    First the whole gradient (d) and its float32 copy; then that copy and this rank's share, which is the gradient
    itself unless it adds to an earlier micro-batch's.
    """
    s, root = units.setting, units.root_trained
    own = 0 if work.prompts > work.micro_batch else units.sharded(root)
    share = FLOAT * root // s.shards - own
    return max((s.dtype + FLOAT) * root, FLOAT * root + share)


def _head(shape: Shape, work: Work) -> int:
    """Bytes of one chunk of scored tokens over the vocabulary: four float32 copies, in forward as in backward."""
    return 4 * FLOAT * min(CHUNK, work.scored) * shape.vocabulary


def _highest(moments: Iterator[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def _add(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(p.get(name, 0) for p in parts) for name in PARTS}
