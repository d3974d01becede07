"""What is known of a step while it runs, and its form in a recorded step."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from hark.grpo.instruments.record import FORMAT, StepRecord
from hark.grpo.types import Batch, PolicyBatch, Rollout
from hark.models.policy import Policy, Prompt

PACKAGES = ("hark", "torch", "transformers", "tokenizers", "safetensors", "numpy")
TERMS = ("logprobs", "entropy", "ratio", "clipped", "kl", "importance", "loss")  # of each token in each update

Describe = Callable[[Any], dict[str, Any]]  # an example -> its "row", its "line" and its "clips", for JSON


@dataclass
class Draft:
    """A step so far; a field is None or empty until the step has computed it.

    positions, since: the places of the prompts in the run's order, and that at which the step begins.
    columns: (B, K), a column for each of `reward_names`; rewards: (B,). answers: for the first questions, by control.
    updates: for each update its figures. terms: for each update (rows, terms (b, T)) of each micro-batch.
    """

    step: int
    examples: Sequence[Any] = ()
    prompts: Sequence[Prompt] = ()
    keys: Sequence[Sequence[int]] = ()
    positions: Sequence[int] = ()
    since: int | None = None
    rollout: Rollout | None = None
    texts: Sequence[str] = ()
    reward_names: Sequence[str] = ()
    columns: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    answers: Sequence[dict[str, Any]] = ()
    batch: Batch | None = None
    learning_rate: float | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    terms: list[list[tuple[torch.Tensor, dict[str, torch.Tensor]]]] = field(default_factory=list)
    weights_before: dict[str, str] | None = None
    weights_after: dict[str, str] | None = None
    is_written: bool = False


def record_of(draft: Draft, policy: Policy, describe: Describe) -> StepRecord:
    """One rank's part of a recorded step."""
    tensors = {name: tensor.detach().cpu() for name, tensor in _tensors(draft) if tensor is not None}
    groups = draft.batch or draft.rollout
    texts = draft.texts or ([] if groups is None else policy.completion_texts(groups.tokens, groups.mask))
    stopped = [None] * len(texts) if draft.rollout is None else draft.rollout.stopped.tolist()
    values = {
        "format": FORMAT,
        "step": draft.step,
        "group_size": 1 if groups is None else groups.group_size,
        "reward_names": list(draft.reward_names),
        "stop_ids": list(policy.stop_ids),
        "pad_id": policy.pad_id,
        "since": draft.since,
        "learning_rate": draft.learning_rate,
        "beta": getattr(draft.batch, "beta", None),
        "weights_before": draft.weights_before,
        "weights_after": draft.weights_after,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "prompts": [_prompt(draft, n, policy, describe) for n in range(len(draft.examples))],
        "completions": [{"text": text, "stopped": ended} for text, ended in zip(texts, stopped, strict=True)],
        "updates": draft.updates,
        "tokens": _token_texts(policy, tensors),
    }
    return StepRecord(values, tensors)


def _tensors(draft: Draft) -> Iterator[tuple[str, torch.Tensor | None]]:
    if draft.prompts:
        yield "prompt_ids", torch.cat([prompt.ids for prompt in draft.prompts])
        yield "prompt_lengths", torch.tensor([len(prompt.ids) for prompt in draft.prompts])
    groups = draft.batch or draft.rollout
    if groups is not None:
        yield from (("tokens", groups.tokens), ("mask", groups.mask))
    if draft.rollout is not None:
        yield from (("old_logprobs", draft.rollout.logprobs), ("stopped", draft.rollout.stopped))
    yield from (("rewards", draft.columns), ("reward", draft.rewards))
    if draft.batch is not None:
        yield "weights", draft.batch.weights
        yield from _terms(draft, draft.batch.mask)
    if isinstance(draft.batch, PolicyBatch):
        yield from recorded_advantages(draft.batch.advantages, draft.batch.mask).items()
        yield "ref_logprobs", draft.batch.ref_logprobs
        if draft.batch.sampled_logprobs is not None:
            yield "scored_logprobs", draft.batch.old_logprobs


def recorded_advantages(advantages: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Advantages (B,) as a record holds them; those (B, T) of tokens are held too, beside their means."""
    if advantages.dim() == 1:
        return {"advantages": advantages}
    return {"advantages": advantages.sum(dim=1) / mask.sum(dim=1), "token_advantages": advantages}


def _terms(draft: Draft, mask: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The terms of each update, (B, T, U); of the first one also its likeliest tokens, (B, T, k)."""
    for name in TERMS:
        updates = [_scattered(parts, name, mask) for parts in draft.terms if name in parts[0][1]]
        if updates:
            yield name, torch.stack(updates, dim=-1)
    for name in ("likeliest_ids", "likeliest_logprobs"):
        if draft.terms and draft.terms[0][0][1][name].shape[-1]:
            yield name, _scattered(draft.terms[0], name, mask)


def _scattered(
    parts: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]], name: str, mask: torch.Tensor
) -> torch.Tensor:
    """A term of all completions, (B, T, ...), from those of its micro-batches; 0 at padding and where none is."""
    first = parts[0][1][name]
    result = first.new_zeros((*mask.shape, *first.shape[2:]))
    for rows, terms in reversed(parts):  # a group that is repeated with weight 0 counts the first time
        result[rows, : terms[name].shape[1]] = terms[name]
    return result * mask.reshape(*mask.shape, *[1] * (first.dim() - 2))


def _prompt(draft: Draft, n: int, policy: Policy, describe: Describe) -> dict[str, Any]:
    described, prompt = describe(draft.examples[n]), draft.prompts[n]
    made = [{"features": clip.digest, "frames": clip.frames, "tokens": clip.tokens} for clip in prompt.clips]
    sources = described.get("clips") or [{}] * len(made)
    answers = {"answers": draft.answers[n]} if n < len(draft.answers) else {}
    own = {
        "key": list(draft.keys[n]) if draft.keys else [],
        "position": draft.positions[n],
        "text": _prompt_text(policy, prompt.ids.tolist()),
        "clips": [source | clip for source, clip in zip(sources, made, strict=True)],
    }
    return described | own | answers


def _prompt_text(policy: Policy, ids: Sequence[int]) -> str:
    """The prompt as it is given to the model, with one placeholder for each clip."""
    pairs = zip([None, *ids], ids, strict=False)
    return policy.tokenizer.decode([id for before, id in pairs if id != policy.audio_id or id != before])


def _token_texts(policy: Policy, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The text of each token of the completions and of the likeliest ones, by its id."""
    used = [tensors[name].flatten().long() for name in ("tokens", "likeliest_ids") if name in tensors]
    ids = torch.cat(used).unique().tolist() if used else []
    texts = policy.tokenizer.batch_decode([[id] for id in ids], clean_up_tokenization_spaces=False)
    return dict(zip(map(str, ids), texts, strict=True))
