"""The interface between the algorithm in `grpo` and a model family: `Policy`, and `Prompt`, its input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hark import UserError
from hark.data.chat import Chat
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.attention import (
    TREE,
    AttentionFunction,
    DecoderPass,
    bind_current_pass,
    compiled,
    mask_row,
    sdpa_attention,
    tree_attention,
    use_tree_attention,
)
from hark.models.cache import TowerCache
from hark.models.linear import linear_to_float32
from hark.models.norms import use_fused_norms

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class PolicyError(UserError, ValueError):
    """A model, checkpoint or prompt that a policy cannot use."""


@dataclass(frozen=True)
class Audio:
    """A clip in the form that an audio tower takes.

    features: float32, in the family's own form: a log-mel (M, F) or windows of one (W, M, F).
    frames: how many of the F are of the clip; those after them are padding.
    tokens: audio embeddings that the tower makes of it.
    digest: a hash of `features`, the key of the clip in a `TowerCache`.
    """

    features: torch.Tensor
    frames: int
    tokens: int
    digest: str = ""


@dataclass(frozen=True)
class Prompt:
    """One prompt in the form that a policy takes, made by `Policy.prepare`.

    ids: (P,) int64 token ids, with one audio placeholder for each audio embedding.
    clips: in the order of their placeholders; empty for a prompt without audio.
    """

    ids: torch.Tensor
    clips: tuple[Audio, ...] = ()


@dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters; `models/lora.py` adds them to a policy.

    rank, alpha: as in the paper, the adapter's output is scaled by alpha / rank.
    targets: the linear layers that get an adapter; see `adapted_layers` of models/lora.py.
    path: a directory of saved adapters to start from; None starts from new ones.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    path: Path | None = None


def on_policy(
    function: Callable[Concatenate[Policy, Arguments], Result],
) -> Callable[Concatenate[Callable[..., Any], Arguments], Result]:
    """Decorate `function(policy, ...)` so that it runs inside the policy's `forward`.

    FSDP gathers the root's weights in the hooks of `forward`. Code that uses a weight or calls a sub-module outside of
    it fails or computes with stale weights. Decorated functions must not call each other.
    """

    @wraps(function)
    def run(policy: Callable[..., Any], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return policy(function, *args, **kwargs)

    return run


def _runs(ids: tuple[int, ...]) -> tuple[slice, ...]:
    """Ids as slices of neighbours; there may be 150,000 ids, so this is not for each step of the sampler."""
    starts = [n for n, token in enumerate(ids) if n == 0 or token != ids[n - 1] + 1]
    return tuple(slice(ids[a], ids[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(ids)], strict=False))


class Policy(nn.Module):
    """A causal decoder with its tokenizer, and an audio tower if the family has one.

    A model family subclasses this and supplies `decoder`, `prepare` and `embed`. The policy is the only FSDP root. Code
    outside of it that uses a weight must be a function decorated by `on_policy`.
    """

    # The start of the names of stored tensors, a regular expression, that the policy does not use and an export copies.
    untouched: str | None = None
    model: Any  # a model of transformers, whose attributes depend on the family
    tokenizer: Any

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model = model.eval()  # no dropout or layer-drop: sampler and scorer must agree
        use_fused_norms(self.model)
        self.tokenizer = tokenizer
        self._check_decoder()
        use_tree_attention(self.decoder.config)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `function(policy, *args, **kwargs)`; FSDP's hooks around this call gather the weights."""
        return function(self, *args, **kwargs)

    # To be supplied by a family.

    @staticmethod
    def build(config: Any) -> Any:
        """Make the model of a transformers config, with random parameters."""
        raise NotImplementedError

    def prepare(self, chat: Chat, *waveforms: np.ndarray) -> Prompt:
        """Make a prompt from a user's text, or from turns, and waveforms (samples,) at `sample_rate`.

        Runs on the CPU, in several threads. Raises DataError for an example that the family cannot take.
        """
        raise NotImplementedError

    def audio_tokens(self, frames: int) -> int:
        """How many embeddings the tower makes of a clip of `frames` mel frames; needs the model's config only."""
        return 0

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        """One prompt as transformers' own processor gives it to its own model, with which the contract compares."""
        raise NotImplementedError

    def native_logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits (L, V) that transformers' own model computes for `native_inputs`."""
        return model(**inputs, use_cache=False).logits[0]

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (N, P, D) of prompts, audio embeddings in place of placeholders, and lengths (N,) in tokens.

        Shorter prompts are padded on the right.
        """
        raise NotImplementedError

    @property
    def decoder(self) -> Any:
        """The decoder without its LM head: takes `inputs_embeds`, returns hidden states."""
        raise NotImplementedError

    @property
    def tower(self) -> Any | None:
        """The audio tower, or None."""
        return None

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """The modules between the audio tower and the decoder."""
        return ()

    directory: Path  # of the checkpoint
    name: str  # the directory or hub name that was given to `load_policy`
    device = torch.device("cpu")  # of the computation; sharded weights may be kept in host memory
    sample_rate: int | None = None  # Hz of the waveforms that `prepare` takes; None for a text-only policy
    mesh: DeviceMesh | None = None  # the ranks that it is sharded over
    reshards = False  # whether FSDP frees each layer's gathered weights after its forward
    offloads = False  # whether FSDP keeps the sharded weights in host memory
    attention = "sdpa"  # of the scorer: "sdpa", or "flex" on a GPU, where siblings' pairs are not computed
    lora: Lora | None = None  # settings of its adapters; None without adapters
    tower_cache: TowerCache | None = None  # outputs of a frozen tower; None without a cache
    audio_id: int | None = None  # the placeholder token, one for each audio embedding
    _suppressed_ids: tuple[int, ...] = ()
    suppressed_runs: tuple[slice, ...] = ()  # the suppressed ids as slices of neighbours

    # Shared by all families.

    @property
    def positions(self) -> int | None:
        """The longest prompt and completion together, in tokens, that the decoder was made for; None if unknown."""
        return getattr(self.decoder.config, "max_position_embeddings", None)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens of probability 0 in sampling and scoring: placeholders; in a codec policy all text tokens."""
        return self._suppressed_ids

    @suppressed_ids.setter
    def suppressed_ids(self, ids: tuple[int, ...]) -> None:
        self._suppressed_ids, self.suppressed_runs = ids, _runs(ids)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: those of the checkpoint's generation config, or else of its tokenizer."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @property
    def pad_id(self) -> int:
        """The token that pads completions; always masked."""
        return self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def windows(self) -> dict[str, int | None]:
        """The sliding window of each type of layer, in positions, the query's own included; None is full attention."""
        config = self.decoder.config
        window = getattr(config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        types = getattr(config, "layer_types", None) or (default,)
        return {kind: window if kind == "sliding_attention" else None for kind in types}

    @property
    def dynamic_rope_type(self) -> str | None:
        """The type of rotary embedding if its frequencies depend on the longest position of a call; else None."""
        kinds = getattr(getattr(self.decoder, "rotary_emb", None), "rope_type", None) or {}
        kinds = (kinds,) if isinstance(kinds, str) else kinds.values()  # a dict if layer types differ
        return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)

    def check_length(self, tokens: int) -> None:
        """Raise PolicyError for a sequence that is so long that rotary frequencies depend on it.

        Frequencies of these types are those of the longest sequence of a call, so a prompt would change its neighbours.
        """
        if self.dynamic_rope_type is None:
            return
        rotary, rope = self.decoder.rotary_emb, self.decoder.config.rope_parameters
        parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
        limits = [
            part["original_max_position_embeddings"] for part in parts if "original_max_position_embeddings" in part
        ]
        limit = min(limits or [rotary.original_max_seq_len])
        if tokens > limit:
            raise PolicyError(
                f"{type(self.model).__name__}: a sequence of {tokens} tokens; above {limit} its rotary frequencies, of "
                f"type {self.dynamic_rope_type!r}, depend on the longest sequence of a batch; use shorter clips or a "
                "smaller rollout.max_new_tokens"
            )

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The type of each decoder layer: a key of `windows`."""
        return tuple(getattr(self.decoder.config, "layer_types", None) or [*self.windows] * len(self.decoder.layers))

    @property
    def per_layer_width(self) -> int:
        """Width of the further embeddings of a token, one for each layer, that Gemma's decoders take; 0 in others."""
        return (getattr(self.decoder.config, "hidden_size_per_layer_input", None) or 0) * len(self.decoder.layers)

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., D) of token ids (...), int64; followed by those for each layer if there are any."""
        embeddings = self.decoder.get_input_embeddings()(tokens)
        if not self.per_layer_width:
            return embeddings
        return torch.cat([embeddings, self.decoder.get_per_layer_inputs(tokens).flatten(-2)], dim=-1)

    def decode(
        self,
        embeddings: torch.Tensor,
        masks: dict[str, torch.Tensor] | None,
        positions: torch.Tensor,
        attention: AttentionFunction | None = None,
    ) -> torch.Tensor:
        """Hidden states (N, L, D) of the decoder for embeddings (N, L, D) at positions (N, L).

        masks: for each type of layer in `windows`, (N, 1, Lm, S) bool, True where a query may attend to a key; None if
        `attention` needs no masks. With `sdpa_attention` a mask of Lm < L is for the last Lm queries, and the queries
        before them attend causally.
        attention: what each layer calls, with the mask of its type in additive form; None is `sdpa_attention`.
        Raises PolicyError for a decoder whose layers do not call attention exactly once each, in order.
        """
        # Converted here, once: sdpa would convert a boolean mask in each layer and save each copy for the backward.
        dtype = embeddings.dtype
        additive = {kind: None if masks is None else _additive(masks[kind], dtype) for kind in self.windows}
        current = DecoderPass(attention or sdpa_attention, tuple(additive.values()))
        inputs: dict[str, torch.Tensor] = {}
        if self.per_layer_width:
            embeddings, others = embeddings.tensor_split((embeddings.shape[-1] - self.per_layer_width,), dim=-1)
            inputs["per_layer_inputs"] = others.unflatten(-1, (len(self.decoder.layers), -1))
        typed = getattr(self.decoder.config, "layer_types", None)
        with current.active():
            output = self.decoder(
                inputs_embeds=embeddings,
                **inputs,
                attention_mask=additive if typed else next(iter(additive.values())),
                position_ids=positions,
                use_cache=False,
            )
        if current.called != list(range(len(self.decoder.layers))):
            raise PolicyError(
                f"{type(self.model).__name__}: its layers called attention as {current.called}; expected one call per "
                "layer, in order, because the KV cache of a rollout holds one entry per layer; choose another model"
            )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) in float32 of hidden states (..., D), scaled and capped as the family's config says."""
        config = self.decoder.config
        logits = linear_to_float32(hidden, self.model.get_output_embeddings())
        # Cohere multiplies, Granite divides, Gemma caps. The multiplication is skipped where the factor is 1.
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        if scale != 1.0:
            logits = logits * scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def tower_is_frozen(self) -> bool:
        """Whether there is an audio tower and none of its parameters is trained."""
        return self.tower is not None and not any(p.requires_grad for p in self.tower.parameters())

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return () if self.tower is None else self.tower.layers

    def layers(self) -> Iterable[nn.Module]:
        """The decoder's layers, then the tower's: each is one FSDP unit and one checkpointed segment."""
        yield from self.decoder.layers
        yield from self.tower_layers

    def share_tower(self, other: Policy) -> None:
        """Replace the audio tower and its cache by another policy's; both must come from the same checkpoint."""
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Compile the decoder's layers without their attention: operators between two products become one kernel.

        To be called before `recompute_activations`, which wraps the layers. On the CPU, torch needs a C++ compiler.
        """
        use_tree_attention(self.decoder.config, torch.compiler.disable(tree_attention))
        for layer in self.decoder.layers:
            layer.forward = compiled(layer.forward)

    def recompute_activations(self) -> None:
        """Turn on gradient checkpointing: save only each layer's input and run the layer again in the backward."""
        for layer in self.layers():
            layer.forward = partial(_recomputed, layer.forward)

    def select_trained(self, part: str) -> None:
        """Train "all" weights, all but the audio tower's ("no-tower"), the "projector" alone, or "nothing".

        Raises PolicyError for the projector of a policy that has none.
        """
        if part == "projector" and not self.projectors:
            raise PolicyError(f"{type(self.model).__name__} has no projector to train; set model.train to all")
        # Weights are only frozen: some, such as tables of positions, are frozen in the model itself.
        kept = {
            "all": set(self.parameters()),
            "no-tower": set(self.parameters()) - set(self.tower.parameters() if self.tower else ()),
            "projector": {parameter for module in self.projectors for parameter in module.parameters()},
            "nothing": set(),
        }[part]
        for parameter in set(self.parameters()) - kept:
            parameter.requires_grad_(False)

    def completion_ids(self, text: str) -> torch.Tensor:
        """Ids (T,) of `text` as a completion, with the stop token that the chat template puts at the end of a turn."""
        template = self.tokenizer.chat_template or ""
        ends = [stop for stop in self.stop_ids if self.tokenizer.convert_ids_to_tokens(stop) in template]
        return self.known_ids([*text_ids(self.tokenizer, text), (ends or self.stop_ids)[0]])

    def padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack prompts into ids (N, P), padded on the right, and lengths (N,), on the policy's device."""
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        ids = nn.utils.rnn.pad_sequence([prompt.ids for prompt in prompts], batch_first=True, padding_value=self.pad_id)
        return ids.to(self.device), lengths.to(self.device)

    def known_ids(self, ids: Sequence[int]) -> torch.Tensor:
        """Ids (T,) as a tensor. Raises PolicyError for one without an embedding, which would end the process on a GPU.

        The placeholder of audio may have none.
        """
        count = self.decoder.get_input_embeddings().weight.shape[0]
        outside = [id for id in ids if id >= count and id != self.audio_id]
        if outside:
            raise PolicyError(
                f"the tokenizer gives the token {outside[0]}, and the model has {count}; copy the tokenizer from the "
                "checkpoint that the model was made from"
            )
        return torch.tensor(ids)

    def completions(self, texts: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts as completions on the policy's device: tokens (B, T), padded on the right, and mask (B, T)."""
        ids = [self.completion_ids(text) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id).to(self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        return tokens, torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]

    def completion_texts(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Texts of B completions, given as tokens (B, T) and mask (B, T), without the stop token.

        Other special tokens are kept: a completion with one is malformed, and rewards must be able to detect that.
        """
        rows = completion_ids(tokens, mask)
        rows = [row[:-1] if row and row[-1] in self.stop_ids else row for row in rows]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False)

    def _check_decoder(self) -> None:
        """Raise PolicyError for a decoder that cannot take a tree mask or positions."""
        config = self.decoder.config
        types = set(getattr(config, "layer_types", None) or ())
        unknown = types - {"full_attention", "sliding_attention"}
        if unknown or not hasattr(self.decoder, "layers"):
            what = f"layers of type {', '.join(sorted(unknown))}" if unknown else "no list of attention layers"
            raise PolicyError(
                f"{type(self.model).__name__} has {what}: the completions of a group share a row under a tree mask, "
                "which only attention layers (full or sliding) support; choose a model with attention in every layer"
            )
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            raise PolicyError(
                f"{type(self.decoder).__name__} takes no positions: it would number the tokens of a branch from the "
                "start of the row instead of the prompt's end; choose a model that takes position_ids"
            )
        # transformers chooses sdpa if the decoder calls a registered attention function.
        if config._attn_implementation not in ("sdpa", TREE):
            raise PolicyError(
                f"{type(self.decoder).__name__} uses {config._attn_implementation!r} attention; expected 'sdpa', "
                "because only then do its layers call a registered attention function; choose another model"
            )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the mask is True, -inf elsewhere, with rows that begin where the memory-efficient kernel can read them.

    Of any other mask that kernel makes a copy in each layer, and keeps it for the backward.
    """
    *rows, keys = mask.shape
    whole = torch.zeros((*rows, mask_row(keys)), dtype=dtype, device=mask.device)
    return whole[..., :keys].masked_fill_(~mask, -torch.inf)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(bind_current_pass(forward), *args, use_reentrant=False, **kwargs)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as it stands in a completion, without a stop token."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completion_ids(tokens: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The ids of each of B completions, given as tokens (B, T) and mask (B, T), without padding."""
    rows = zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def completion_lengths(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """The tokens of each distinct text as a completion, with its stop token, the longest first."""
    lengths = {text: len(text_ids(tokenizer, text)) + 1 for text in dict.fromkeys(texts)}
    return dict(sorted(lengths.items(), key=lambda pair: -pair[1]))
