"""The benchmark compares like with like: its baseline is an oracle of the scorer, and it fails where numbers differ."""

import json

import benchmark
import pytest
import torch
from baseline import Baseline, grpo_loss
from benchmark import Size, main

from grpo.loss import policy_loss, token_weights
from grpo.sampler import sample
from grpo.scorer import score
from tests.conftest import TEXTS

TINY = Size(vocabulary=320, hidden=64, inner=96, layers=2, tower_hidden=64, tower_layers=1)
QUICK = "--shape A --prompts 2 --threads 1 --group 2 --new-tokens 3 --repeat 1".split()


@pytest.mark.parametrize("case", ["qwen2_audio"], indirect=True)
def test_the_scorer_gives_the_logprobs_and_gradients_of_the_r1_aqa_procedure(case):
    """Prompts of three lengths, so that both ways of padding are tested. Tolerances as in test_parity.py."""
    keys = [(0, 0, n) for n in range(3)]
    drawn = sample(case.policy, case.prompts, group_size=4, max_new_tokens=6, temperature=1.0, keys=keys)
    drawn_everywhere = torch.ones_like(drawn.mask)
    baseline = Baseline.load(case.directory)
    expected = baseline.logprobs(baseline.inputs(TEXTS, case.waveforms), drawn.tokens, group_size=4)
    logprobs, _ = score(case.policy, case.prompts, drawn.tokens, drawn_everywhere, group_size=4)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)

    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    others = expected.detach() + 0.1, expected.detach() - 0.1, advantages
    grpo_loss(expected, *others, drawn.mask, clip=0.2, beta=0.04).backward()
    weights = token_weights(drawn.mask, kind="sequence-mean", completions=12, tokens=0)
    policy_loss(logprobs, *others, weights, clip_low=0.2, clip_high=0.2, beta=0.04)[0].backward()
    theirs = dict(baseline.model.named_parameters())
    for name, parameter in case.policy.model.named_parameters():
        if parameter.requires_grad:
            scale = theirs[name].grad.abs().max()
            assert scale > 0, f"{name} takes no part in the result"
            torch.testing.assert_close(parameter.grad / scale, theirs[name].grad / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen2_audio"], indirect=True)
def test_the_baseline_draws_completions_of_full_length_without_placeholders(case):
    baseline = Baseline.load(case.directory)
    torch.manual_seed(0)
    tokens = baseline.rollout(baseline.inputs(TEXTS, case.waveforms), group_size=4, new_tokens=6)
    assert tokens.shape == (12, 6)
    assert not (tokens == baseline.audio_id).any() and len(tokens.unique(dim=0)) > 3


def test_a_run_reports_every_target_and_writes_it_as_json(tmp_path, capsys):
    main([*QUICK, "--json", str(tmp_path / "figures.json")], TINY)
    (result,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert (result["shape"], result["prompts"], result["threads"]) == ("A", 2, 1)
    assert all(result[name] > 0 for name in benchmark.TARGETS["A"])
    assert 0 < result["parity"] < 1e-4 and 0 < result["limit_share"] < 1
    for side in ("baseline", "hark"):
        assert set(result["seconds"][side]) == {"rollout", "reference", "score", "optimizer", "step"}
    heading, targets, figures = capsys.readouterr().out.splitlines()
    assert len(heading) == len(targets) == len(figures)


def test_a_run_whose_numbers_differ_fails(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PARITY", 0.0)
    with pytest.raises(SystemExit, match="1"):
        main(QUICK, TINY)
    assert "no speed-up counts" in capsys.readouterr().err
