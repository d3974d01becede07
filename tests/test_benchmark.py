"""The benchmark compares like with like: its baseline is an oracle of the scorer, and it fails where numbers differ."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from hark.grpo import scorer
from hark.grpo.config import ConfigError
from hark.grpo.loss import policy_loss, token_weights
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.tree import branches_layout
from hark.launch.studies import benchmark, benchmark_gpu
from hark.launch.studies.baseline import Baseline, grpo_loss
from hark.launch.studies.benchmark import main
from hark.launch.studies.sides import Size, Work
from tests.conftest import TEXTS
from tests.simulation import whole_rows

pytestmark = pytest.mark.slow

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
    main([*QUICK, "--busy", "--json", str(tmp_path / "figures.json")], TINY)
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(one["shape"], one["prompts"], one["threads"], one["busy"]) for one in results] == [
        ("A", 2, 1, False), ("A", 2, 1, True),
    ]  # fmt: skip
    phases = {"rollout", "reference", "score", "optimizer", "step"}
    for result in results:
        assert all(result[name] > 0 for name in benchmark.TARGETS["A"])
        assert 0 < result["parity"] < 1e-4 and 0 < result["limit_share"] < 1
        assert set(result["seconds"]["baseline"]) == phases
        ours = result["seconds"]["hark"]  # all that the trainer's step consists of
        assert set(ours) == phases | {"load", "reward", "report", "record"}
        assert sum(ours.values()) - ours["step"] == pytest.approx(ours["step"], rel=0.1)
    heading, targets, *figures, machine = capsys.readouterr().out.splitlines()
    assert {len(line) for line in (targets, *figures)} == {len(heading)} and "1 + busy" in figures[1]
    assert machine.endswith("G multiply-adds/s")


def test_a_run_whose_numbers_differ_fails(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PARITY", 0.0)
    with pytest.raises(SystemExit, match="1"):
        main(QUICK, TINY)
    assert "the speed-ups are not valid" in capsys.readouterr().err


def gpu_study(dtype, **changes):
    """The study for GPUs, on the CPU."""
    setting = benchmark_gpu.Setting(partial(benchmark_gpu.small_config, TINY), torch.device("cpu"), dtype, repeat=1)
    work = Work(seconds=0.5, prompts=5, group_size=4, new_tokens=8, micro_batch=2)
    return list(benchmark_gpu.study(replace(setting, **changes), [("A", work), ("B", replace(work, prompts=1))]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_study_for_gpus_compares_like_with_like_in_any_dtype(dtype):
    results = gpu_study(dtype)
    assert [(result["shape"], result["prompts"]) for result in results] == [("A", 5), ("B", 1)]
    for result in results:
        assert result["equal"] and 0 < result["differences"][0] <= benchmark_gpu.BOUNDS[dtype][0]
        for side in ("baseline", "hark"):
            assert set(result["seconds"][side]) == {"rollout", "reference", "score", "optimizer", "step"}
            assert result["completions_per_second"][side] > 0
        assert result["memory_gib"]["hark"] < result["memory_gib"]["baseline"]
        assert all(result[name] > 0 for name in ("matmul_share", "limit_share", "weights_gib"))
        report = "\n".join(benchmark_gpu.lines(result))
        assert "within the rounding of the dtype" in report and "x reading the weights (target 1.5)" in report
    json.dumps(results)


def test_the_study_for_gpus_notices_completions_that_see_one_another(monkeypatch):
    def one_branch(lengths, group_size, steps):
        row = branches_layout(lengths, group_size, steps)
        return replace(row, branch=torch.zeros_like(row.branch))

    monkeypatch.setattr(scorer, "branches_layout", one_branch)
    monkeypatch.setattr(scorer, "row_attention", whole_rows)
    assert not any(result["equal"] for result in gpu_study(torch.bfloat16))


def test_the_studied_models_share_their_weights_but_not_their_gradients():
    setting = benchmark_gpu.Setting(partial(benchmark_gpu.small_config, TINY), torch.device("cpu"), torch.bfloat16)
    models = benchmark_gpu.Models(setting)
    for name, parameter in models.policy.model.named_parameters():
        theirs = models.theirs.get_parameter(name)
        assert theirs.data_ptr() == parameter.data_ptr() != models.frozen.model.get_parameter(name).data_ptr()
        assert theirs is not parameter and theirs.requires_grad == parameter.requires_grad
        assert parameter.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in (*models.frozen.parameters(), *models.their_frozen.parameters()))


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch, capsys):
    def full(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark_gpu.DeviceBaselineSide, "rollout", full)
    result = gpu_study(torch.float32)[0]
    assert "the baseline runs out of memory with 5 prompts" in capsys.readouterr().out
    assert result["seconds"].keys() == {"hark"} and result["speedups"] is None
    assert "faster" not in "\n".join(benchmark_gpu.lines(result))


def test_the_studied_models_take_what_a_run_would_choose(capsys):
    setting = benchmark_gpu.Setting(
        partial(benchmark_gpu.small_config, TINY), torch.device("cpu"), torch.float32, "auto"
    )
    (result,) = benchmark_gpu.study(setting, [("A", benchmark_gpu.Work(1.0, 2, 3, 6, 1))])
    assert (
        result["attention"] == "sdpa"
        and "attention: sdpa, because FlexAttention needs a GPU" in capsys.readouterr().out
    )


def test_the_study_for_gpus_needs_one():
    with pytest.raises(ConfigError, match="no CUDA device was found"):
        benchmark_gpu.main([])


def test_each_study_has_its_own_flags(capsys):
    """Flags for a GPU are unknown to the study on the CPU, and the defaults of the GPU's are those of the 7B."""
    with pytest.raises(SystemExit):
        benchmark.parse(["--dtype", "bfloat16"])
    assert "unrecognized arguments: --dtype" in capsys.readouterr().err
    chosen = benchmark_gpu.parse(["--attention", "flex"])
    assert (chosen.model, chosen.dtype, chosen.attention) == ("qwen2-audio-7b", "bfloat16", "flex")
    works = benchmark_gpu.works_of(chosen)
    assert [(shape, work.prompts, work.micro_batch) for shape, work in works] == [
        ("A", 8, 4), ("A", 32, 4), ("B", 8, 2), ("B", 32, 2),
    ]  # fmt: skip
    assert benchmark.parse([]).prompts == [1, 4] and benchmark.parse([]).micro_batch == 1


@pytest.mark.parametrize("study", [benchmark, benchmark_gpu])
@pytest.mark.parametrize("flags", [["--group", "1"], ["--prompts", "0"], ["--repeat", "0"]])
def test_sizes_that_cannot_be_measured_are_refused(study, flags, capsys):
    with pytest.raises(SystemExit):
        study.parse(flags)
    assert "must be at least" in capsys.readouterr().err
