"""The sampler, the scorer and Hugging Face give the same numbers, in values and in gradients.

Tolerances: all is float32, whose rounding is 6e-8 relative; through some layers of sums in another order, logprobs of
size 1 to 10 differ by up to about 1e-5, and gradients, which are sums over some hundred tokens, by up to about 1e-4 of
their size. A wrong mask, position or audio frame shows as 1e-2 and more.
"""

import numpy as np
import pytest
import torch

from hark.grpo import scorer
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from tests.conftest import TEXTS, Case

GROUP, LIMIT = 4, 9
VALUES = dict(atol=1e-5, rtol=1e-5)


def drawn(case: Case, temperature: float = 1.0):
    keys = [(0, 0, n) for n in range(len(case.prompts))]
    return sample(case.policy, case.prompts, group_size=GROUP, max_new_tokens=LIMIT, temperature=temperature, keys=keys)


def hf_logprobs(case: Case, hf, rollout, row: int, temperature: float = 1.0) -> torch.Tensor:
    """Logprobs (L,) of completion `row` by one ordinary forward pass over [prompt | completion]."""
    n = row // rollout.group_size
    completion = rollout.tokens[row][rollout.mask[row]]
    inputs = case.hf_inputs(n)
    ids = torch.cat([inputs["input_ids"][0], completion])
    inputs |= {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    logits = hf(**inputs).logits[0].float() / temperature
    logits[:, list(case.policy.suppressed_ids)] = -torch.inf
    predicted = logits[len(ids) - len(completion) - 1 : -1].log_softmax(-1)
    return predicted.gather(-1, completion[:, None]).squeeze(-1)


def test_sampler_logprobs_equal_scorer_logprobs_equal_hugging_face(case):
    hf = case.load_hf()
    rollout = drawn(case, temperature=1.3)
    assert rollout.mask.sum(1).unique().numel() > 1, "completions of one length would not test the padding"
    scored, _ = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=GROUP, temperature=1.3)
    torch.testing.assert_close(rollout.logprobs, scored.detach(), **VALUES)
    with torch.no_grad():
        for row in range(len(rollout.tokens)):
            expected = hf_logprobs(case, hf, rollout, row, temperature=1.3)
            torch.testing.assert_close(rollout.logprobs[row][rollout.mask[row]], expected, **VALUES)
    assert (rollout.logprobs[~rollout.mask] == 0).all() and (scored[~rollout.mask] == 0).all()


@pytest.mark.parametrize("size", [1, 7])
def test_to_score_in_chunks_changes_no_value_and_no_gradient(case, monkeypatch, size):
    """One token at a time, and in chunks of which the last is not full."""
    rollout = drawn(case)
    assert rollout.mask.sum() % 7
    found = []
    for chunk in (scorer.CHUNK, size):
        monkeypatch.setattr(scorer, "CHUNK", chunk)
        case.policy.zero_grad()
        logprobs, spread = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=GROUP, likeliest=3)
        logprobs.sum().backward()
        found.append(
            [
                logprobs,
                spread.entropy,
                spread.likeliest_logprobs,
                *(p.grad for p in case.policy.parameters() if p.grad is not None),
            ]
        )
    for whole, part in zip(*found, strict=True):
        # Products of other sizes round otherwise: values as above, gradients in relation to their largest entry.
        assert (whole - part).abs().max() <= 1e-4 * whole.abs().max() + 1e-6


def test_gradients_of_a_shared_row_equal_those_of_separate_hugging_face_rows(case):
    rollout = drawn(case)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)) * rollout.mask
    logprobs, _ = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=GROUP)
    (weights * logprobs).sum().backward()

    hf = case.load_hf()
    for row in range(len(rollout.tokens)):
        (weights[row][rollout.mask[row]] * hf_logprobs(case, hf, rollout, row)).sum().backward()

    ours = dict(case.policy.model.named_parameters())
    compared = 0
    for name, parameter in hf.named_parameters():
        if not ours[name].requires_grad:
            continue  # the tower's sinusoids, which are fixed; transformers lets them move once they were loaded
        scale = parameter.grad.abs().max()
        assert scale > 0, f"{name} takes no part in the result"
        torch.testing.assert_close(
            ours[name].grad / scale, parameter.grad / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared == sum(p.requires_grad for p in case.policy.parameters())
    if case.name == "qwen2_audio":
        assert ours["model.audio_tower.conv1.weight"].grad.abs().max() > 0


def test_greedy_sampling_equals_hugging_face_generate_token_for_token(case):
    hf = case.load_hf()
    rollout = sample(case.policy, case.prompts, group_size=1, max_new_tokens=12, temperature=0)
    for n in range(len(TEXTS)):
        inputs = case.hf_inputs(n)
        out = hf.generate(
            **inputs, do_sample=False, max_new_tokens=12, suppress_tokens=list(case.policy.suppressed_ids) or None
        )
        expected = out[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(rollout.tokens[n][rollout.mask[n]], expected)


@pytest.mark.parametrize("case", ["qwen2_audio"], indirect=True)
def test_changing_the_waveform_changes_the_logprobs_of_its_own_group_only(case):
    rollout = drawn(case)
    other = case.policy.prepare(TEXTS[1], np.ascontiguousarray(case.waveforms[1][::-1]))
    assert torch.equal(other.ids, case.prompts[1].ids), "the ids alone do not tell the clips apart"
    changed = (case.prompts[0], other, case.prompts[2])
    before, _ = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=GROUP)
    after, _ = score(case.policy, changed, rollout.tokens, rollout.mask, group_size=GROUP)
    difference = (before - after).abs().unflatten(0, (-1, GROUP)).amax(dim=(1, 2))
    assert difference[1] > 1e-3
    assert difference[0] < 1e-6 and difference[2] < 1e-6


def test_a_completion_of_one_token_is_scored_from_the_prompt_alone(case):
    keys = [(1, 0, n) for n in range(3)]
    rollout = sample(case.policy, case.prompts, group_size=GROUP, max_new_tokens=1, temperature=1.0, keys=keys)
    scored, (entropy, *_) = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=GROUP)
    torch.testing.assert_close(rollout.logprobs, scored.detach(), **VALUES)
    # The entropy is the mean of -log p over the distribution: the same for all siblings, at most log V.
    assert (entropy.unflatten(0, (-1, GROUP)).std(dim=1) < 1e-5).all()
    assert (0 < entropy).all() and (entropy < np.log(320)).all()
