"""The contract of a policy: what must hold between it and transformers' own model of the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import Rollout
from hark.models.policy import Policy, Prompt

GROUP, STEPS = 3, 8  # completions of a prompt, and their most tokens
# Rounding of float32 through the layers: rows and separate sequences add the same numbers in another order.
VALUES, GRADIENTS = 2e-5, 5e-5  # of logprobs; of gradients, relative to the largest of all
CHANGED = VALUES  # another clip must change a logprob by more


@dataclass(frozen=True)
class Finding:
    """One property: whether it holds, and the difference that was found, which must be within `limit`."""

    name: str
    difference: float
    limit: float
    holds: bool
    note: str = ""


@dataclass(frozen=True)
class Question:
    """A prompt: its text, its clips, and what the policy makes of them."""

    text: str
    waveforms: tuple[np.ndarray, ...]
    prompt: Prompt


def questions_of(policy: Policy, *, clips: int = 1) -> list[Question]:
    """Two questions of different lengths, with noise of different lengths if the policy takes audio.

    Two clips of one prompt have the same length, because transformers' Granite Speech reads the padding of the shorter.
    """
    texts = ("Which sound is this?", "How many? Give the number of sounds, no other word.")
    questions = []
    for n, text in enumerate(texts):
        waveforms = tuple(_noise(policy, 1.03 + 0.4 * n, seed=10 * n + k) for k in range(clips))
        waveforms = () if policy.sample_rate is None else waveforms
        questions.append(Question(text, waveforms, policy.prepare(text, *waveforms)))
    return questions


def check(policy: Policy, native: Any, *, gradients: bool = True) -> Iterator[Finding]:
    """Every property of the contract, in float32 on one process.

    native: transformers' own model of the checkpoint.
    """
    questions = questions_of(policy)
    rollout = _draw(policy, questions)
    yield _same_ids(policy, questions)
    scored = _scored(policy, rollout, rollout.prompts, backward=gradients)
    expected = _native(policy, native, questions, rollout, backward=gradients)
    yield _within("a row of branches = separate forwards", _largest(scored, expected, rollout.mask), VALUES)
    if gradients:
        yield _gradients(policy, native)
    yield _within("stepwise decoding = one forward", _largest(rollout.logprobs, scored, rollout.mask), VALUES)
    yield _within("a batch of prompts = one by one", _alone(policy, rollout, scored), VALUES)
    yield _greedy(policy, native, questions)
    yield from _audio(policy, native, questions, rollout, scored)


def _audio(
    policy: Policy, native: Any, questions: Sequence[Question], rollout: Rollout, scored: torch.Tensor
) -> Iterator[Finding]:
    """What holds for a policy that takes audio."""
    if policy.sample_rate is None:
        return
    others = [policy.prepare(q.text, *(np.ascontiguousarray(w[::-1]) for w in q.waveforms)) for q in questions]
    change = _largest(_scored(policy, rollout, others), scored, rollout.mask)
    yield Finding("another clip changes the logprobs", change, CHANGED, change > CHANGED, "at least")
    yield _never_sampled(policy, questions)
    yield _two_clips(policy, native)


def _two_clips(policy: Policy, native: Any) -> Finding:
    name, pairs = "two clips in a prompt", questions_of(policy, clips=2)
    drawn = _draw(policy, pairs)
    try:
        expected = _native(policy, native, pairs, drawn)
    except ValueError as error:
        return Finding(name, 0.0, 0.0, True, f"no comparison: its processor says {_short(error)}")
    return _within(name, _largest(_scored(policy, drawn, drawn.prompts), expected, drawn.mask), VALUES)


def _draw(policy: Policy, questions: Sequence[Question]) -> Rollout:
    keys = [(n,) for n in range(len(questions))]
    prompts = [question.prompt for question in questions]
    return sample(policy, prompts, group_size=GROUP, max_new_tokens=STEPS, temperature=1.0, keys=keys)


def _scored(policy: Policy, rollout: Rollout, prompts: Sequence[Prompt], *, backward: bool = False) -> torch.Tensor:
    """Logprobs (B, T) of the scorer; `backward` fills in the gradients of `_objective`."""
    with torch.set_grad_enabled(backward):
        logprobs, _ = score(policy, prompts, rollout.tokens, rollout.mask, group_size=GROUP)
    if backward:
        policy.zero_grad()
        _objective(logprobs, rollout.mask).backward()
    return logprobs.detach()


def _native(
    policy: Policy, native: Any, questions: Sequence[Question], rollout: Rollout, *, backward: bool = False
) -> torch.Tensor:
    """Logprobs (B, T) of separate forwards of transformers' own model, and gradients as in `_scored`."""
    logprobs = torch.zeros_like(rollout.logprobs)
    with torch.set_grad_enabled(backward):
        for row, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
            question = questions[row // GROUP]
            inputs = _followed(policy.native_inputs(question.text, *question.waveforms), tokens[mask])
            logits = policy.native_logits(native, inputs)[-int(mask.sum()) - 1 : -1]
            logits = logits.index_fill(-1, torch.tensor(policy.suppressed_ids, dtype=torch.long), -torch.inf)
            chosen = logits.log_softmax(dim=-1).gather(-1, tokens[mask][:, None]).squeeze(-1)
            logprobs = logprobs.index_put((torch.tensor(row), mask.nonzero().flatten()), chosen)
    if backward:
        native.zero_grad()
        _objective(logprobs, rollout.mask).backward()
    return logprobs.detach()


def _followed(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs whose ids are followed by tokens."""
    ids = torch.cat([inputs["input_ids"], tokens[None]], dim=1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _objective(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sum with another weight for each token, so that no two gradients cancel."""
    weights = torch.linspace(-1.0, 2.0, mask.numel()).reshape(mask.shape)
    return (logprobs * weights * mask).sum()


def _same_ids(policy: Policy, questions: Sequence[Question]) -> Finding:
    theirs = [policy.native_inputs(question.text, *question.waveforms)["input_ids"][0] for question in questions]
    differ = sum(q.prompt.ids.tolist() != ids.tolist() for q, ids in zip(questions, theirs, strict=True))
    return Finding("a prompt's ids = its processor's", differ, 0.0, not differ)


def _gradients(policy: Policy, native: Any) -> Finding:
    """The largest difference of a gradient, relative to the largest gradient of all."""
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    own, other = (
        {name: p.grad for name, p in model.named_parameters() if name in trained and p.grad is not None}
        for model in (policy.model, native)
    )
    missing = sorted(own.keys() ^ other.keys())
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    worst, where = max((float((own[n] - other[n]).abs().max()) / largest, n) for n in own.keys() & other.keys())
    note = f"one side has none for {missing[0]}" if missing else f"of {len(own)} tensors, most in {where}"
    return Finding("gradients of every parameter", worst, GRADIENTS, worst <= GRADIENTS and not missing, note)


def _alone(policy: Policy, rollout: Rollout, scored: torch.Tensor) -> float:
    """The largest difference between prompts scored as one batch and one by one."""
    differences = []
    for n in range(len(rollout.prompts)):
        part = rollout.select([n])
        alone = _scored(policy, part, part.prompts)
        together = scored[rollout.rows([n])][:, : alone.shape[1]]
        differences.append(_largest(alone, together, part.mask))
    return max(differences)


def _greedy(policy: Policy, native: Any, questions: Sequence[Question]) -> Finding:
    """Greedy completions against `generate`, which stops at the same tokens and draws no placeholder either."""
    prompts = [question.prompt for question in questions]
    rollout = sample(policy, prompts, group_size=1, max_new_tokens=STEPS, temperature=0.0)
    differing = 0
    for question, tokens, mask in zip(questions, rollout.tokens, rollout.mask, strict=True):
        inputs = policy.native_inputs(question.text, *question.waveforms)
        with torch.no_grad():
            made = native.generate(
                **inputs, do_sample=False, max_new_tokens=STEPS, eos_token_id=list(policy.stop_ids),
                suppress_tokens=list(policy.suppressed_ids) or None, pad_token_id=policy.pad_id,
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        differing += made[0, start:].tolist() != tokens[mask].tolist()
    return Finding("greedy completions = generate", differing, 0.0, not differing)


def _never_sampled(policy: Policy, questions: Sequence[Question]) -> Finding:
    """The probability of a placeholder as the first token, which must be exactly 0."""
    if not policy.suppressed_ids:
        return Finding("no placeholder is sampled", 0.0, 0.0, True, "it has no logit")
    tokens = torch.tensor(policy.suppressed_ids)[:, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logprobs, _ = score(policy, [questions[0].prompt], tokens, mask, group_size=len(tokens))
    probability = float(logprobs.exp().max())
    return Finding("no placeholder is sampled", probability, 0.0, probability == 0.0)


def _within(name: str, difference: float, limit: float) -> Finding:
    return Finding(name, difference, limit, difference <= limit)


def _largest(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    return float((a - b).abs()[mask].max())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:80]


def _noise(policy: Policy, seconds: float, *, seed: int) -> np.ndarray:
    """Noise that grows louder, so that it differs from itself backwards."""
    length = round(seconds * (policy.sample_rate or 1))
    noise = np.random.default_rng(seed).standard_normal(length).astype(np.float32)
    return noise * np.linspace(0.02, 0.2, length, dtype=np.float32)
