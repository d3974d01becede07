"""The contract of a policy: what must hold between it and transformers' own model of the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import Rollout
from hark.models.policy import Policy, PolicyError, Prompt, on_policy

GROUP, STEPS = 3, 8  # completions of a prompt, and their most tokens
# Rounding of float32 through the layers: rows and separate sequences add the same numbers in another order.
VALUES, GRADIENTS = 2e-5, 5e-5  # of logprobs; of gradients, relative to the largest of all
HALF = 0.1  # of logprobs in bfloat16, where the order of sums changes the second digit; wrong masks change them by 3
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
    """Two questions of different lengths, with noise of more and of less than a second if the policy takes audio.

    Two clips of one prompt have the same length, because transformers' Granite Speech reads the padding of the shorter.
    """
    texts = ("Which sound is this?", "How many? Give the number of sounds, no other word.")
    questions = []
    for n, text in enumerate(texts):
        waveforms = tuple(_noise(policy, (1.03, 0.45)[n], seed=10 * n + k) for k in range(clips))
        waveforms = () if policy.sample_rate is None else waveforms
        questions.append(Question(text, waveforms, policy.prepare(text, *waveforms)))
    return questions


def verify(policy: Policy) -> None:
    """Raise PolicyError, with all findings, if a loaded policy does not keep the values of the contract.

    Its own model is called in transformers' way for comparison, so no second copy of the weights is needed.
    """
    with gathered(policy):
        findings = list(check(policy, policy.model, gradients=False))
    if not all(finding.holds for finding in findings):
        raise PolicyError(f"{policy.name}: the automatic policy does not keep the contract:\n{table(findings)}")


def table(findings: Sequence[Finding]) -> str:
    """One line for each property: whether it holds, the difference, the limit."""
    lines = [f"{'':6}{'property':42}{'difference':>12}{'limit':>9}"]
    for finding in findings:
        mark = "ok" if finding.holds else "FAILS"
        figures = (
            f"{finding.difference:12.1e}{finding.limit:9.0e}" if finding.limit else f"{finding.difference:12g}{0:9}"
        )
        lines.append(f"{mark:6}{finding.name:42}{figures}  {finding.note}".rstrip())
    return "\n".join(lines)


def check(policy: Policy, native: Any, *, gradients: bool = True) -> Iterator[Finding]:
    """Every property of the contract; gradients, which need a second copy of the weights, only if asked for.

    native: transformers' own model of the checkpoint; `policy.model` itself for comparison in place.
    """
    questions = questions_of(policy)
    rollout = _draw(policy, questions)
    yield _same_ids(policy, questions)
    scored = _scored(policy, rollout, rollout.prompts, backward=gradients)
    expected = _native(policy, native, questions, rollout, backward=gradients)
    yield _within("a row of branches = separate forwards", _largest(scored, expected, rollout.mask), _values(policy))
    if gradients:
        yield _gradients("gradients of every parameter", policy, native)
        _score_after_prefill(policy, questions)
        yield _gradients("the same with rollout.keep_prefill", policy, native)
    yield _within("stepwise decoding = one forward", _largest(rollout.logprobs, scored, rollout.mask), _values(policy))
    yield _within("a batch of prompts = one by one", _alone(policy, rollout, scored), _values(policy))
    if _values(policy) == VALUES:  # in bfloat16 the likeliest of two close tokens depends on the order of sums
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
    name = "two clips in a prompt"
    try:
        pairs = questions_of(policy, clips=2)
        drawn = _draw(policy, pairs)
        expected = _native(policy, native, pairs, drawn)
    except ValueError as error:
        return Finding(name, 0.0, 0.0, True, f"no comparison: its processor says {_short(error)}")
    return _within(name, _largest(_scored(policy, drawn, drawn.prompts), expected, drawn.mask), _values(policy))


def _draw(policy: Policy, questions: Sequence[Question], *, keep_prefill: bool = False) -> Rollout:
    keys = [(n,) for n in range(len(questions))]
    prompts = [question.prompt for question in questions]
    return sample(
        policy, prompts, group_size=GROUP, max_new_tokens=STEPS, temperature=1.0, keys=keys, keep_prefill=keep_prefill
    )


def _scored(policy: Policy, rollout: Rollout, prompts: Sequence[Prompt], *, backward: bool = False) -> torch.Tensor:
    """Logprobs (B, T) of the scorer; `backward` fills in the gradients of `_objective`."""
    with torch.set_grad_enabled(backward):
        logprobs, _ = score(policy, prompts, rollout.tokens, rollout.mask, group_size=GROUP)
    if backward:
        policy.zero_grad()
        _objective(logprobs, rollout.mask).backward()
    return logprobs.detach()


def _score_after_prefill(policy: Policy, questions: Sequence[Question]) -> None:
    """Fill in the gradients of `_objective`, with the prompts' part of them from the rollout's forward."""
    rollout = _draw(policy, questions, keep_prefill=True)
    prefill = rollout.prefill.take() if rollout.prefill else None
    assert prefill is not None
    prefix = prefill.select(range(len(questions)))
    policy.zero_grad()
    logprobs, _ = score(policy, rollout.prompts, rollout.tokens, rollout.mask, group_size=GROUP, prefix=prefix)
    _objective(logprobs, rollout.mask).backward()
    prefill.backward()


def _native(
    policy: Policy, native: Any, questions: Sequence[Question], rollout: Rollout, *, backward: bool = False
) -> torch.Tensor:
    """Logprobs (B, T) of separate forwards of transformers' own model, and gradients as in `_scored`."""
    logprobs = torch.zeros_like(rollout.logprobs)
    with torch.set_grad_enabled(backward):
        for row, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
            question = questions[row // GROUP]
            inputs = _followed(policy.native_inputs(question.text, *question.waveforms), tokens[mask])
            logits = _native_logits(policy, native, inputs)[-int(mask.sum()) - 1 : -1].float()
            suppressed = torch.tensor(policy.suppressed_ids, dtype=torch.long, device=logits.device)
            logits = logits.index_fill(-1, suppressed, -torch.inf)
            chosen = logits.log_softmax(dim=-1).gather(-1, tokens[mask][:, None]).squeeze(-1)
            logprobs = logprobs.index_put((torch.full_like(tokens[mask], row), mask.nonzero().flatten()), chosen)
    if backward:
        native.zero_grad()
        _objective(logprobs, rollout.mask).backward()
    return logprobs.detach()


@on_policy
def _native_logits(policy: Policy, native: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with _native_attention(policy, native):
        return policy.native_logits(native, _on_device(policy, inputs))


@on_policy
def _generated(policy: Policy, native: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The ids (L,) of a prompt and its greedy completion by transformers."""
    with _native_attention(policy, native), torch.no_grad():
        return native.generate(
            **_on_device(policy, inputs), do_sample=False, max_new_tokens=STEPS, eos_token_id=list(policy.stop_ids),
            suppress_tokens=list(policy.suppressed_ids) or None, pad_token_id=policy.pad_id,
        )[0]  # fmt: skip


def native_step(policy: Policy, native: Any, inputs: dict[str, torch.Tensor], group: int, tokens: int) -> None:
    """One update in transformers' way: `generate`, forward and backward with the prompt once for each completion."""
    repeated = {name: torch.cat([value] * group) for name, value in inputs.items()}
    repeated["attention_mask"] = torch.ones_like(repeated["input_ids"])
    start = repeated["input_ids"].shape[1]
    with torch.no_grad():
        made = native.generate(
            **repeated, do_sample=True, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=policy.pad_id,
            suppress_tokens=list(policy.suppressed_ids) or None,
        )  # fmt: skip
    repeated |= {"input_ids": made, "attention_mask": torch.ones_like(made)}
    logits = native(**repeated, use_cache=False).logits[:, start - 1 : -1]
    logits.log_softmax(dim=-1).gather(-1, made[:, start:, None]).sum().backward()


@contextmanager
def _native_attention(policy: Policy, native: Any) -> Iterator[None]:
    """Let transformers compute the attention if the policy's own model is called in its way."""
    config = policy.decoder.config
    before = config._attn_implementation
    config._attn_implementation = "sdpa" if native is policy.model else before
    try:
        yield
    finally:
        config._attn_implementation = before


def _on_device(policy: Policy, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dtype = policy.decoder.get_input_embeddings().weight.dtype
    return {
        name: value.to(policy.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def _followed(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs whose ids are followed by tokens."""
    ids = torch.cat([inputs["input_ids"], tokens[None].cpu()], dim=1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _objective(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sum with another weight for each token, so that no two gradients cancel."""
    weights = torch.linspace(-1.0, 2.0, mask.numel(), device=mask.device).reshape(mask.shape)
    return (logprobs * weights * mask).sum()


def _same_ids(policy: Policy, questions: Sequence[Question]) -> Finding:
    theirs = [policy.native_inputs(question.text, *question.waveforms)["input_ids"][0] for question in questions]
    differ = sum(q.prompt.ids.tolist() != ids.tolist() for q, ids in zip(questions, theirs, strict=True))
    return Finding("a prompt's ids = its processor's", differ, 0.0, not differ)


def _gradients(name: str, policy: Policy, native: Any) -> Finding:
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
    return Finding(name, worst, GRADIENTS, worst <= GRADIENTS and not missing, note)


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
        made = _generated(policy, native, inputs)[inputs["input_ids"].shape[1] :]
        differing += made.tolist() != tokens[mask].tolist()
    return Finding("greedy completions = generate", differing, 0.0, not differing)


def _never_sampled(policy: Policy, questions: Sequence[Question]) -> Finding:
    """The probability of a placeholder as the first token, which must be exactly 0."""
    if not policy.suppressed_ids:
        return Finding("no placeholder is sampled", 0.0, 0.0, True, "it has no logit")
    tokens = torch.tensor(policy.suppressed_ids, device=policy.device)[:, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logprobs, _ = score(policy, [questions[0].prompt], tokens, mask, group_size=len(tokens))
    probability = float(logprobs.exp().max())
    return Finding("no placeholder is sampled", probability, 0.0, probability == 0.0)


def _values(policy: Policy) -> float:
    return VALUES if policy.decoder.get_input_embeddings().weight.dtype == torch.float32 else HALF


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
