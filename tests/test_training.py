"""The update does not depend on how the work is split, and a resumed run is the run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from hark.data.examples import load_examples
from hark.data.rewards import RewardError
from hark.grpo import loop
from hark.grpo import reference as reference_module
from hark.grpo import trainer as trainer_module
from hark.grpo.advantage import group_advantages
from hark.grpo.config import ConfigError
from hark.grpo.instruments.console import LONGEST_COMPLETION, excerpt
from hark.grpo.instruments.nonfinite import NonFiniteError
from hark.grpo.instruments.record import read_step
from hark.grpo.loss import policy_loss, token_weights
from hark.grpo.runtime.checkpoint import CheckpointError, load_checkpoint
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.sft import SupervisedTrainer
from hark.grpo.types import PolicyBatch
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import rewards_of, validation_figures
from hark.models.lora import whole
from hark.models.mini import build_mini
from tests.clips import write_questions
from tests.conftest import TEXTS, build_causal_lm
from tests.ranks import on_ranks
from tests.runs import (
    NO_GRADIENT,
    ROUNDING,
    build,
    computed,
    largest_difference,
    length_reward,
    read_metrics,
    train,
    train_all,
    weights,
)


def test_the_update_is_the_same_for_any_micro_batch_and_on_one_or_two_ranks(settings, tmp_path, qwen2_audio_dir):
    for size in (1, 2, 4):
        on_ranks(1, train, [*settings, f"run.directory={tmp_path}/micro{size}", f"optim.micro_batch={size}"])
    assert largest_difference(tmp_path / "micro4", tmp_path / "micro1") < ROUNDING
    assert largest_difference(tmp_path / "micro4", tmp_path / "micro2") < ROUNDING

    runs = [[*settings, f"run.directory={tmp_path}/ranks2"]]
    runs += [[*settings, f"run.directory={tmp_path}/kept", "sharding.reshard=false", "optim.micro_batch=1"]]
    runs += [[*settings, f"run.directory={tmp_path}/recomputed", "model.recompute=true"]]
    on_ranks(2, train_all, runs)
    for name in ("ranks2", "kept", "recomputed"):
        assert largest_difference(tmp_path / "micro4", tmp_path / name) < ROUNDING, name

    start = load_file(qwen2_audio_dir / "model.safetensors")
    moved = [(weights(tmp_path / "ranks2")[name] - start[name]).abs().max() for name in start]
    assert max(moved) > 1e-3, "nothing was learnt, so nothing was compared"
    first, second = (read_metrics(tmp_path / name) for name in ("micro4", "ranks2"))
    for one, two in zip(first, second, strict=True):
        for name in computed(one):
            assert one[name] == pytest.approx(two[name], abs=1e-4), name
    assert all(line["sampler_gap"] < ROUNDING for line in first + second)


OPTIONS = [
    "loss.token_weights=token-mean",
    "loss.inner_epochs=2",
    "loss.advantage=none",
    "loss.beta=0",
    "model.train=no-tower",
]


def test_token_mean_inner_epochs_and_a_frozen_tower_are_the_same_on_one_and_two_ranks(
    settings, tmp_path, qwen2_audio_dir
):
    for ranks in (1, 2):
        on_ranks(ranks, train, [*settings, *OPTIONS, f"run.directory={tmp_path}/{ranks}"])
    assert largest_difference(tmp_path / "1", tmp_path / "2") < ROUNDING
    start, end = load_file(qwen2_audio_dir / "model.safetensors"), weights(tmp_path / "2")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and not any(name.startswith("audio_tower") for name in moved)
    lines = read_metrics(tmp_path / "2")
    assert all("kl" not in line for line in lines), "no reference, no KL"
    # The second epoch's policy has moved away from the one that sampled; the gap is the first epoch's.
    assert any(line["clip_share"] > 0 for line in lines)
    assert all(line["sampler_gap"] < ROUNDING for line in lines)


def test_bfloat16_computes_in_half_and_keeps_float32_weights(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run", "model.dtype=bfloat16"])

    def run(world: World) -> None:
        trainer = build(world, config)
        loop.train(trainer)
        trained = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}

    on_ranks(1, run)
    gaps = [line["sampler_gap"] for line in read_metrics(tmp_path / "run")]
    # bfloat16 has 8 bits: logprobs of size 5 differ by some 1e-2 where float32's differ by 1e-6.
    assert all(1e-5 < gap < 0.05 for gap in gaps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_steps_and_two_resumed_are_four_bit_for_bit(ranks, settings, tmp_path):
    whole = [*settings, f"run.directory={tmp_path}/whole", "optim.steps=4"]
    half = [*settings, f"run.directory={tmp_path}/half", "checkpoint.every=2", "optim.steps=2"]
    rest = [*settings, f"run.directory={tmp_path}/half", "checkpoint.every=2", "optim.steps=4", "run.resume=true"]
    on_ranks(ranks, train_all, [whole, half, rest])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = (read_metrics(tmp_path / name) for name in ("whole", "half"))
    for one, two in zip(first, second, strict=True):
        assert all(one[name] == two[name] for name in computed(one))


def test_the_reference_scores_each_completion_where_it_stands(settings, tmp_path):
    """In parts of like length, out of order; given back in the order of the rollout."""
    config = load_config([*settings, f"run.directory={tmp_path}/run", "optim.prompts_per_step=6"])

    def run(world: World) -> None:
        trainer = build(world, config)
        _, prompts, _ = zip(*trainer.data.step(0), strict=True)
        keys = [(n,) for n in range(6)]
        drawn = sample(trainer.policy, prompts, group_size=4, max_new_tokens=6, temperature=1.0, keys=keys)
        assert sum(drawn.split_by_length(2), []) != list(range(6)), "else no order could be lost"
        together = trainer.reference_logprobs(drawn)
        for n, prompt in enumerate(prompts):
            rows = slice(4 * n, 4 * n + 4)
            alone, _ = score(trainer.reference.policy, [prompt], drawn.tokens[rows], drawn.mask[rows], group_size=4)
            assert (alone - together[rows]).abs().max() < ROUNDING

    on_ranks(1, run)


def test_rewards_are_found_while_the_reference_scores(settings, tmp_path, monkeypatch):
    """Each waits until the other has begun."""
    config = load_config([*settings, f"run.directory={tmp_path}/run"])
    judging, scoring, judged = threading.Event(), threading.Event(), []

    def rewards(examples, completions):
        judging.set()
        judged.append(len(completions))
        assert scoring.wait(timeout=20), "the reference waits for the rewards"
        return length_reward(examples, completions)

    def scored(policy, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in policy.parameters()):  # the reference
            scoring.set()
            assert judging.wait(timeout=20), "the rewards wait for the reference"
        return score(policy, *args, **kwargs)

    def run(world: World) -> None:
        trainer = build(world, config, rewards=rewards)
        monkeypatch.setattr(reference_module, "score", scored)
        means = trainer.step(0)
        assert means["reward"] > 0 and means["kl"] == pytest.approx(0, abs=ROUNDING)
        assert scoring.is_set() and judged == [16], "each completion is judged once"

    on_ranks(1, run)


def test_a_reward_that_fails_surfaces_as_itself(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])
    failure = RewardError("reward 'accuracy' of example 'q17' failed")

    def broken(examples, completions):
        raise failure

    def run(world: World) -> None:
        with pytest.raises(RewardError) as caught:
            build(world, config, rewards=broken).step(0)
        assert caught.value is failure and caught.traceback[-1].name == "broken"

    on_ranks(1, run)


def test_padding_beside_a_longer_prompt_changes_no_gradient(case):
    """A group alone in its micro-batch, and the same group beside longer prompts and completions."""
    keys = [(0, 0, n) for n in range(3)]
    rollout = sample(case.policy, case.prompts, group_size=4, max_new_tokens=9, temperature=1.0, keys=keys)
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    batch = PolicyBatch(
        rollout.prompts,
        4,
        rollout.tokens,
        rollout.mask,
        token_weights(rollout.mask, kind="sequence-mean", completions=12, tokens=1),
        old_logprobs=rollout.logprobs,
        ref_logprobs=None,
        advantages=group_advantages(rewards, group_size=4),
    )
    gradients = []
    for size in (1, 3):
        case.policy.zero_grad()
        for micro in map(batch.select, batch.split_by_length(size)):
            logprobs, _ = score(case.policy, micro.prompts, micro.tokens, micro.mask, group_size=4)
            loss, _ = policy_loss(
                logprobs, micro.old_logprobs, None, micro.advantages, micro.weights,
                clip_low=0.2, clip_high=0.2, beta=0.0,
            )  # fmt: skip
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in case.policy.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        if NO_GRADIENT in name:
            continue
        # Gradients are sums of some hundred float32 terms: 1e-4 of the largest entry is rounding.
        assert (gradient - gradients[1][name]).abs().max() < 1e-4 * gradient.abs().max(), name


def test_supervised_training_learns_its_answers(settings, tmp_path, questions):
    overrides = ["optim.steps=40", "optim.lr=3e-3", "data.shuffle_choices=false", "optim.prompts_per_step=4"]
    questions = write_questions(tmp_path / "few", 4)
    overrides += [f"run.directory={tmp_path}/sft", f"data.train={questions}", "evaluation.before=true"]
    config = load_config([*settings, *overrides, "evaluation.every=40", "rollout.max_new_tokens=20"])

    def run(world: World) -> None:
        examples, _ = load_examples(questions)
        trainer = build(
            world, config, SupervisedTrainer, target=lambda example: f"<answer>{example.answer_text}</answer>",
        )  # fmt: skip
        trainer.validate = lambda: validation_figures(config, world, trainer.policy, examples)
        loop.train(trainer)

    on_ranks(1, run)
    lines = read_metrics(tmp_path / "sft")
    events = [line for line in lines if "event" in line]
    assert events[0]["accuracy"] == 0.0
    assert events[-1]["accuracy"] == 1.0
    assert [line["loss"] for line in lines if "loss" in line][-1] < 0.05


def test_completions_are_drawn_with_the_keys_of_the_data(settings, tmp_path, monkeypatch):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])
    used = []

    def recorded(policy, prompts, *, keys, **kwargs):
        used.extend(keys)
        return sample(policy, prompts, keys=keys, **kwargs)

    def run(world: World) -> None:
        trainer = build(world, config)
        monkeypatch.setattr(trainer_module, "sample", recorded)
        for step in range(2):
            trainer.step(step)
        assert used == [key for step in range(2) for _, _, key in trainer.data.step(step)]
        assert len(set(used)) == 8

    on_ranks(1, run)


def test_the_rewards_of_the_configuration_reach_the_advantages(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])
    texts, examples = ["<answer>rain</answer>", "rain"], load_examples(config.data.train)[0][:1]
    columns = rewards_of(config)(examples, texts, [[1], [1]], [True, True], 0).columns
    assert columns.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_a_finished_run_is_not_overwritten(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1"]
    on_ranks(1, train, run)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run.*run.resume=true"):
        on_ranks(1, train, run)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_model_is_refused_by_name(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1", "checkpoint.every=1"]
    on_ranks(1, train, run)
    build_causal_lm(tmp_path / "other")

    def resume(world: World) -> None:
        config = load_config([*run, f"model.path={tmp_path}/other", "loss.beta=0"])
        policy = make_policy(config, world)
        load_checkpoint(tmp_path / "run" / "checkpoints", policy, torch.optim.AdamW(policy.parameters()), world)

    with pytest.raises(CheckpointError, match="checkpoint of another model.*tensors differ"):
        on_ranks(1, resume)


def test_another_run_is_refused_by_name(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1", "checkpoint.every=1"]
    on_ranks(1, train, run)
    with pytest.raises(ConfigError, match=r"run.seed is 7, but the run in .* was started with 0"):
        on_ranks(1, train, [*run, "run.resume=true", "run.seed=7"])


def test_an_interrupted_save_is_not_taken_for_a_checkpoint(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=2", "checkpoint.every=1", "checkpoint.keep=1"]
    on_ranks(1, train, run)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"], "older ones go when keep is 1"
    (checkpoints / "step-000009.partial").mkdir()
    on_ranks(1, train, [*run, "run.resume=true", "optim.steps=3"])
    assert (checkpoints / "step-000003").is_dir()


def test_a_number_that_is_not_one_stops_the_run_and_keeps_the_step(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])

    def run(world: World) -> None:
        broken = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=1))
        infinite = torch.tensor([torch.inf, 1.0, 1.0, 1.0]).repeat(4)[:, None]
        trainer = build(world, broken, rewards=lambda e, c: length_reward(e, c) * infinite)
        loop.train(trainer)

    with pytest.raises(NonFiniteError, match=r"step 1, rank 0: the loss and the gradient .* examples train-"):
        on_ranks(1, run)
    record = read_step(tmp_path / "run", 1)
    assert (
        record.step == 1 and len(record.values["prompts"]) == 4 and record.values["reason"].startswith("error: step 1")
    )
    assert record.tensors["advantages"].isnan().any() and record.tensors["tokens"].shape == record.tensors["mask"].shape


def test_a_run_may_not_be_resumed_with_other_weights_trained(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1", "checkpoint.every=1"]
    on_ranks(1, train, run)
    with pytest.raises(ConfigError, match="model.train is 'no-tower', but the run in .* was started with 'all'"):
        on_ranks(1, train, [*run, "run.resume=true", "model.train=no-tower"])


def test_the_first_step_is_prepared_while_the_first_evaluation_runs(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run", "optim.steps=1"])
    order = []

    def run(world: World) -> None:
        evaluated = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, before=True))
        trainer = build(world, evaluated, validate=lambda: order.append("evaluation") or {})
        prepare, step = trainer.data.prepare, trainer.data.step
        noted = lambda number: order.append(f"prepare {number}") or prepare(number)  # noqa: E731
        trainer.data.prepare = trainer.data._data.prepare = noted  # of all ranks, and of the loader behind
        trainer.data.step = lambda number: order.append(f"step {number}") or step(number)
        loop.train(trainer)

    on_ranks(1, run)
    assert order == ["prepare 0", "evaluation", "step 0", "prepare 1"]


def test_an_evaluation_without_questions_is_refused_at_the_start(settings, tmp_path):
    with pytest.raises(ConfigError, match="neither data.validation nor data.held_out"):
        on_ranks(1, train, [*settings, f"run.directory={tmp_path}/run", "evaluation.before=true"])


def digests(prompt) -> list[str]:
    return [clip.digest for clip in prompt.clips]


def test_each_completion_is_rewarded_with_the_example_it_answers(settings, tmp_path):
    """Examples repeated in another order than completions would reward answers to other questions."""
    config = load_config([*settings, f"run.directory={tmp_path}/run"])
    judged, batches = [], []

    def rewards(examples, completions):
        judged.extend(zip([example.id for example in examples], completions, strict=True))
        return length_reward(examples, completions)

    def run(world: World) -> None:
        trainer = build(world, config, rewards=rewards)
        accumulate = trainer.accumulate
        trainer.accumulate = lambda batch: batches.append(batch) or accumulate(batch)
        trainer.step(0)
        texts = trainer.policy.completion_texts(batches[0].tokens, batches[0].mask)
        owners = [example.id for example, *_ in trainer.data.step(0) for _ in range(4)]
        assert len(set(owners)) == 4 and judged == list(zip(owners, texts, strict=True))
        sounds = [digests(prompt) for _, prompt, *_ in trainer.data.step(0)]
        assert [digests(prompt) for prompt in batches[0].prompts] == sounds

    on_ranks(1, run)


def test_a_step_that_was_logged_before_a_crash_and_done_again_is_logged_once(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=3", "checkpoint.every=1", "checkpoint.keep=3"]
    on_ranks(1, train, run)
    for step in (2, 3):  # the crash came before these were saved
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    before = read_metrics(tmp_path / "run")
    on_ranks(1, train, [*run, "run.resume=true"])
    after = read_metrics(tmp_path / "run")
    assert [line["step"] for line in after] == [1, 2, 3]
    assert all(one[name] == two[name] for one, two in zip(before, after, strict=True) for name in computed(one))


def test_the_last_step_is_saved_and_evaluated_whatever_the_rhythm(settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run", "checkpoint.every=2", "evaluation.every=2"])

    def run(world: World) -> None:
        loop.train(build(world, config, validate=lambda: {"accuracy": 0.5}))

    on_ranks(1, run)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "event" in line] == [2, 3]


def test_a_checkpoint_of_other_shapes_under_the_same_names_is_refused(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1", "checkpoint.every=1"]
    on_ranks(1, train, run)
    build_mini(tmp_path / "wider", TEXTS, vocabulary=320, hidden=128, layers=2, tower_hidden=64, tower_layers=2)
    words = [word for word in run if not word.startswith("model.path=")]

    def resume(world: World) -> None:
        policy = make_policy(load_config([*words, f"model.path={tmp_path}/wider"]), world)
        load_checkpoint(tmp_path / "run" / "checkpoints", policy, torch.optim.AdamW(policy.parameters()), world)

    with pytest.raises(CheckpointError, match=r"tensors differ, the first is .*\[.*\] in the checkpoint"):
        on_ranks(1, resume)


def test_a_resumed_run_has_the_settings_of_its_configuration_and_the_moments_of_its_checkpoint(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=1", "checkpoint.every=1", "optim.weight_decay=0.1"]
    on_ranks(1, train, run)

    def resume(world: World) -> None:
        config = load_config([*run, "optim.beta1=0.8", "optim.weight_decay=0.3"])
        trainer = build(world, config)
        load_checkpoint(tmp_path / "run" / "checkpoints", trainer.policy, trainer.optimizer, world)
        assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.8, 0.999)] * 2
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
        assert any(whole(state["exp_avg"]).any() for state in trainer.optimizer.state.values())

    on_ranks(1, resume)


def test_the_best_and_the_worst_completion_of_three_groups_are_shown_and_written(settings, tmp_path, capsys):
    config = load_config(
        [*settings, f"run.directory={tmp_path}/run", "log.completions=2", "reward.weights={accuracy: 2, format: 1}"]
    )
    shown = []

    def run(world: World) -> None:
        steps = []

        def rewards(examples, completions):
            steps.append((examples, completions))
            return length_reward(examples, completions)

        trainer = build(world, config, rewards=rewards)
        loop.train(trainer)
        examples, texts = steps[-1]
        columns = length_reward(examples, texts)
        rewards_of_all = (2 * columns[:, 0] + columns[:, 1]).unflatten(0, (-1, 4))
        for n, (best, worst) in enumerate(zip(trainer.completions()[::2], trainer.completions()[1::2], strict=True)):
            assert best.reward == pytest.approx(float(rewards_of_all[n].max()))
            assert worst.reward == pytest.approx(float(rewards_of_all[n].min()))
            assert best.id == worst.id == examples[4 * n].id and best.question == examples[4 * n].question
            row = 4 * n + int(rewards_of_all[n].argmax())
            assert best.text == texts[row] and list(best.rewards.values()) == columns[row].tolist()
            assert best.advantage >= 0 >= worst.advantage
        shown.extend(trainer.completions())

    on_ranks(1, run)
    out = capsys.readouterr().out
    assert re.findall(r"completions of step (\d+):", out) == ["2", "3"], "every second step and the last"
    assert len(shown) == 6 and all(excerpt(one.text, LONGEST_COMPLETION) in out for one in shown)
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [2] * 6 + [3] * 6
    assert lines[6:] == [one._asdict() for one in shown]


def test_with_log_completions_0_no_completions_are_shown(settings, tmp_path, capsys):
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/run", "log.completions=0"])
    assert "completions of step" not in capsys.readouterr().out


def test_the_silent_control_asks_the_same_questions_without_sound(settings, tmp_path, questions):
    words = [f"run.directory={tmp_path}/run", "evaluation.silent=true", "evaluation.limit=5"]
    config = load_config([*settings, *words])

    def run(world: World) -> None:
        policy = make_policy(config, world)
        prepare, asked = policy.prepare, []
        policy.prepare = lambda text, *clips: asked.append((text, abs(clips[0]).max())) or prepare(text, *clips)
        figures = validation_figures(config, world, policy, load_examples(questions)[0])
        assert {"accuracy", "silent_accuracy"} <= figures.keys() and figures["questions"] == 5
        heard, silent = ([(text, loud) for text, loud in asked if (loud > 0) == sound] for sound in (True, False))
        assert len(heard) == 5 and sorted(text for text, _ in heard) == sorted(text for text, _ in silent)

    on_ranks(1, run)
