"""What the algorithm needs of a model: the one interface between `grpo` and a model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.attention import TREE, Attend, Pass, attend_to_row, in_this_pass, use_tree_attention
from hark.models.cache import TowerCache

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hark.models.lora import Lora


Function = TypeVar("Function", bound=Callable[..., Any])


class PolicyError(ValueError):
    """A model, checkpoint or prompt that a policy cannot use."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the policy.

    ids: (P,) int64 token ids, the audio placeholder already repeated once per audio embedding.
    log_mel: (M, F) float32 log-mel, or None for a prompt without audio.
    frames: how many of the F come from the clip; those behind it are what its convolutions still reach.
    sound: a digest of the log-mel, by which a frozen tower knows what it has heard before.
    """

    ids: torch.Tensor
    log_mel: torch.Tensor | None = None
    frames: int = 0
    sound: str = ""


def on_policy(function: Function) -> Function:
    """Let a function of a policy, `function(policy, ...)`, run inside the policy's forward.

    There FSDP has gathered the weights of the root; outside, to use a weight or call a sub-module fails or computes with
    stale weights. A function so decorated must not be called by another one.
    """

    @wraps(function)
    def run(policy: Any, *args: Any, **kwargs: Any) -> Any:
        return policy(function, *args, **kwargs)

    return run  # type: ignore[return-value]


class Policy(nn.Module):
    """A causal decoder, whatever embeds its prompts, and their tokenizer.

    A model family subclasses this: it says where the decoder stands and supplies `prepare` and `embed`. The policy is
    the only FSDP root, and FSDP gathers weights in the hooks of `forward`; so everything that touches a weight is a
    function of the policy decorated by `on_policy`, never a call of a sub-module from outside.
    """

    # (prefix in the hub's tensor names, prefix in the module tree); names without an entry are the same in both.
    hub_prefixes: tuple[tuple[str, str], ...] = ()

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model = model.eval()  # dropout and layer-drop off: the sampler and the scorer are one function
        self.tokenizer = tokenizer
        self._refuse_unmaskable_layers()
        use_tree_attention(self.decoder.config)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function(policy, *args, **kwargs)` with every weight it needs gathered."""
        return function(self, *args, **kwargs)

    # What a family supplies.

    def prepare(self, text: str, waveform: np.ndarray | None) -> Prompt:
        """Turn a user's text and a waveform (samples,) at `sample_rate` into a prompt; runs on the CPU, in threads."""
        raise NotImplementedError

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed prompts, audio spliced in: embeddings (N, P, D), padded on the right, and lengths (N,)."""
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """The bare decoder: takes `inputs_embeds`, gives hidden states."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module | None:
        """The audio tower, or None."""
        return None

    directory: Path  # the checkpoint it was built from
    name: str  # what it was asked for by: a directory or a hub name
    device = torch.device("cpu")  # where it computes; its weights may be kept in host memory
    sample_rate: int | None = None  # Hz of the waveforms `prepare` takes; None for a text-only policy
    mesh: DeviceMesh | None = None  # the ranks it is sharded over
    reshards = False  # whether sharding frees each layer's gathered weights after its forward
    offloads = False  # whether sharding keeps the weights in host memory
    attention = "sdpa"  # of rows that are scored; or "flex", for GPUs
    lora: Lora | None = None  # what its adapters are like, if it has any
    tower_cache: TowerCache | None = None  # what a frozen tower has heard; None while the tower is trained
    audio_id: int | None = None  # the placeholder that audio embeddings take the place of
    suppressed_ids: tuple[int, ...] = ()  # never sampled and outside the scored distribution: placeholders

    # What every family shares.

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: all that the checkpoint's generation config names."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @property
    def pad_id(self) -> int:
        """The id that fills a completion after its end; masked everywhere."""
        return self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def windows(self) -> dict[str, int | None]:
        """How many positions back each type of layer looks; None is all the way."""
        config = self.decoder.config
        window = getattr(config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        types = getattr(config, "layer_types", None) or (default,)
        return {kind: window if kind == "sliding_attention" else None for kind in types}

    @property
    def moving_frequencies(self) -> str | None:
        """The kind of rotary frequencies that depend on the longest position of a call, or None; most do not."""
        kinds = getattr(getattr(self.decoder, "rotary_emb", None), "rope_type", None) or ()
        kinds = (kinds,) if isinstance(kinds, str) else kinds.values()  # some decoders have one for each type of layer
        return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The type of each decoder layer, one of `windows`."""
        return tuple(getattr(self.decoder.config, "layer_types", None) or [*self.windows] * len(self.decoder.layers))

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., D) of token ids (...)."""
        return self.decoder.get_input_embeddings()(tokens)

    def decode(
        self,
        embeddings: torch.Tensor,
        masks: dict[str, torch.Tensor] | None,
        positions: torch.Tensor,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """Run the decoder on embeddings (N, L, D) at positions (N, L): hidden states (N, L, D).

        masks: for each type of layer in `windows`, (N, 1, Lm, S) bool, True where a query may attend to a key. A mask
        of Lm < L is for the last Lm queries, and those before are causal. None where `attend` has masks of its own.
        attend: the attention of each layer where it is not `models.attention.attend_to_row`, such as `DecodeAttention` there; it
        may have the masks otherwise.
        """
        masks = dict.fromkeys(self.windows) if masks is None else masks
        layers = Pass(attend or attend_to_row)
        # As addends, once: from booleans sdpa would make them anew in each layer, and keep each for the backward.
        addends = {kind: None if mask is None else _addend(mask, embeddings.dtype) for kind, mask in masks.items()}
        typed = getattr(self.decoder.config, "layer_types", None)
        with layers.run():
            output = self.decoder(
                inputs_embeds=embeddings,
                attention_mask=addends if typed else next(iter(addends.values())),
                position_ids=positions,
                use_cache=False,
            )
        if layers.attended != list(range(len(self.decoder.layers))):
            raise PolicyError(
                f"{type(self.model).__name__}: its layers called attention as {layers.attended}, not once in "
                "each of them in order, by which the keys and values of a rollout are kept; choose another model"
            )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., V) of hidden states (..., D), scaled as the family scales them."""
        config = self.decoder.config
        logits = self.model.get_output_embeddings()(hidden)
        # Cohere multiplies, Granite divides, Gemma caps; most do nothing, and then no pass over the vocabulary is made.
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        if scale != 1.0:
            logits = logits * scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def tower_is_frozen(self) -> bool:
        """Whether there is a tower, and none of it is trained."""
        return self.tower is not None and not any(p.requires_grad for p in self.tower.parameters())

    def layers(self) -> Iterable[nn.Module]:
        """The modules to shard and to recompute one by one: the decoder's layers, then the tower's."""
        yield from self.decoder.layers
        if self.tower is not None:
            yield from self.tower.layers

    def share_tower(self, other: Policy) -> None:
        """Hear with another policy's frozen tower, and with its memory of what was heard; both of one checkpoint."""
        raise NotImplementedError

    def recompute_activations(self) -> None:
        """Keep only each layer's input for the backward pass and run the layer again there."""
        for layer in self.layers():
            layer.forward = partial(_recomputed, layer.forward)

    def freeze_tower(self) -> None:
        """Train everything but the audio tower."""
        if self.tower is not None:
            self.tower.requires_grad_(False)

    def completion_ids(self, text: str) -> torch.Tensor:
        """Ids (T,) of a completion that says `text` and then ends as the chat template ends a turn."""
        template = self.tokenizer.chat_template or ""
        ends = [stop for stop in self.stop_ids if self.tokenizer.convert_ids_to_tokens(stop) in template]
        return torch.tensor([*self.tokenizer(text, add_special_tokens=False)["input_ids"], (ends or self.stop_ids)[0]])

    def completion_texts(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Text of each completion of (B, T) tokens, without its stop token.

        Other special tokens stay visible: a completion that has them is not well formed, and rewards must see it.
        """
        rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
        rows = [row[:-1] if row and row[-1] in self.stop_ids else row for row in rows]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False)

    def hub_name(self, name: str) -> str:
        """The hub's name of the tensor that `self.model` calls `name`."""
        for hub, own in self.hub_prefixes:
            if name.startswith(own):
                return hub + name[len(own) :]
        return name

    def _refuse_unmaskable_layers(self) -> None:
        config = self.decoder.config
        types = set(getattr(config, "layer_types", None) or ())
        unknown = types - {"full_attention", "sliding_attention"}
        if unknown or not hasattr(self.decoder, "layers"):
            what = f"layers of type {', '.join(sorted(unknown))}" if unknown else "no list of attention layers"
            raise PolicyError(
                f"{type(self.model).__name__} has {what}: a group is one row under a tree mask, which only attention "
                "layers (full or sliding) can take; choose a model with attention in every layer"
            )
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            raise PolicyError(
                f"{type(self.decoder).__name__} takes no positions, and would count those of a branch from the row's "
                "beginning; choose a model that does"
            )
        # Eager attention adds a boolean mask as numbers and is silently wrong.
        if config._attn_implementation not in ("sdpa", TREE):
            raise PolicyError(f"the decoder's attention is {config._attn_implementation!r}; the tree mask needs 'sdpa'")


def _addend(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(in_this_pass(forward), *args, use_reentrant=False, **kwargs)


def pad_ids(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts into ids (N, P), padded on the right, and lengths (N,)."""
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    ids = nn.utils.rnn.pad_sequence([prompt.ids for prompt in prompts], batch_first=True, padding_value=pad_id)
    return ids.to(device), lengths.to(device)
