"""Replay finds nothing where nothing is wrong, and locates deliberate faults at the quantity that they are in."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from hark.data.described import described
from hark.grpo import loop
from hark.grpo.config import ConfigError
from hark.grpo.instruments.record import RecordError, place_of, read_step, write_part
from hark.grpo.instruments.replay import ORDER, differences, first_difference, sampled_mask
from hark.grpo.runtime.collectives import World
from hark.grpo.trainer import Trainer
from hark.launch import replay, step
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import rewards_of
from hark.models.loading import load_policy
from tests.ranks import as_torchrun, on_ranks
from tests.runs import build

REWARD = '''def length(group):
    """Something that differs between the completions of a random model."""
    return [len(text) % 7 / 7 for text in group.texts]
'''


@pytest.fixture
def run(settings, tmp_path) -> list[str]:
    (tmp_path / "mine.py").write_text(REWARD)
    rewards = f"reward.weights={{{tmp_path}/mine.py:length: 2}}"
    more = ["rollout.temperature=0.9", "loss.inner_epochs=2", "checkpoint.every=2", "checkpoint.keep=3"]
    return [*settings, f"run.directory={tmp_path}/run", rewards, "record.every=1", *more]


def train(world: World, settings: list[str], fault=lambda trainer: None) -> None:
    config = load_config(settings)
    trainer = build(world, config, rewards=rewards_of(config), describe=described)
    fault(trainer)
    loop.train(trainer)


def replayed(capsys, *words: object) -> tuple[int, str]:
    """The exit status and the output of `hark replay`."""
    capsys.readouterr()
    status = 0
    try:
        replay.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_nothing_differs_in_a_sound_run(run, tmp_path, capsys):
    on_ranks(1, train, run)
    status, out = replayed(capsys, tmp_path / "run")
    assert status == 0 and "all 3 records agree: 10 quantities are equal, 0 differ by rounding" in out
    status, out = replayed(capsys, tmp_path / "run", "1:3", "--model")
    assert status == 0 and "with the model after 0 steps, on 1 of 1 ranks" in out
    of_other_losses = len(("token_advantages", "scored_logprobs", "importance"))
    assert (
        f"all 3 records agree: {sum(map(len, ORDER)) - of_other_losses} quantities are equal, 0 differ by rounding"
        in out
    )
    status, out = replayed(capsys, tmp_path / "run", "3", "--model")
    assert status == 0 and "step 3 of" in out and "with the model after 2 steps" in out


OTHER = [
    "loss.kind=reinforce_pp", "loss.beta=0.1", "loss.importance_cap=2", "loss.kl_target=0.001", "loss.entropy=0.01",
    "loss.truncated=mask", "loss.kl_horizon=32", "loss.sft=0.5",
]  # fmt: skip


def test_advantages_of_tokens_a_differing_sampler_and_an_adapted_beta_are_replayed(run, tmp_path, capsys):
    on_ranks(1, train, [*run, *OTHER])
    betas = [read_step(tmp_path / "run", step).values["beta"] for step in (1, 2, 3)]
    assert betas[0] == 0.1 and len(set(betas)) == 3
    record = read_step(tmp_path / "run", 2)
    assert {"token_advantages", "scored_logprobs", "importance"} <= record.tensors.keys()
    status, out = replayed(capsys, tmp_path / "run")
    assert status == 0 and "all 3 records agree: 12 quantities are equal, 0 differ by rounding" in out
    status, out = replayed(capsys, tmp_path / "run", "1:3", "--model")
    assert status == 0 and f"all 3 records agree: {sum(map(len, ORDER))} quantities are equal" in out


@pytest.mark.parametrize(
    "settings_of_run", [["lora.rank=2"], ["model.train=no-tower"], ["loss.beta=0"], ["data.silent_share=0.5"]]
)
def test_nothing_differs_with_adapters_a_frozen_tower_no_reference_and_silenced_prompts(
    run, tmp_path, capsys, settings_of_run
):
    on_ranks(1, train, [*run, *settings_of_run, "optim.steps=2"])
    for words in ([], ["--model"]):
        status, out = replayed(capsys, tmp_path / "run", "1:2", *words)
        assert status == 0 and ", 0 differ by rounding" in out, out


def test_a_run_on_two_ranks_is_replayed_on_one_and_on_two(run, tmp_path, capsys):
    """AdamW divides gradients that are 0 but for rounding by their size, so a high rate would amplify the rounding."""
    run = [*run, "loss.inner_epochs=1", "optim.lr=1e-5"]
    on_ranks(2, train, run)
    status, out = replayed(capsys, tmp_path / "run", "1:3", "--model")
    assert status == 0, out
    as_torchrun(2, replay.main, [str(tmp_path / "run"), "1:3", "--model"])


def stale(trainer: Trainer) -> None:
    """Sample with the weights from which the run began."""
    old = load_policy(trainer.config.model.path)
    draw, policy = trainer.draw, trainer.policy

    def wrong(prompts, keys, **options):
        trainer.policy = old
        try:
            return draw(prompts, keys, **options)
        finally:
            trainer.policy = policy

    trainer.draw = wrong


def wrong_normalisation(trainer: Trainer) -> None:
    weights = trainer.objective.weights
    trainer.objective.weights = lambda counted, **totals: weights(counted, **totals) * 1.25


def wrong_mask(trainer: Trainer) -> None:
    """Leave out the stop tokens."""
    draw = trainer.draw

    def wrong(prompts, keys, **options):
        rollout = draw(prompts, keys, **options)
        rows = torch.arange(len(rollout.mask))[rollout.stopped]
        mask = rollout.mask.clone()
        mask[rows, rollout.mask.sum(dim=1)[rows] - 1] = False
        mask[:, 0] = True
        return dataclasses.replace(rollout, mask=mask, logprobs=rollout.logprobs * mask)

    trainer.draw = wrong


def wrong_reference(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.reference.policy.model.get_output_embeddings().weight.mul_(1.01)


def silent(trainer: Trainer) -> None:
    """Drop the sound before the features are computed."""
    prepare = trainer.policy.prepare
    trainer.data._data._prepare = lambda chat, *waveforms: prepare(chat, *(0 * waveform for waveform in waveforms))


def deaf(trainer: Trainer) -> None:
    """Drop the sound inside of the policy, in sampling and in scoring."""
    policy = trainer.policy
    encode = policy.encode
    policy.encode = lambda clips: 0 * encode(clips)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "alone", "with_model"),
    [
        (wrong_normalisation, "weights", "weights"),
        (wrong_mask, "mask", "mask"),
        (stale, None, "old_logprobs"),
        (wrong_reference, None, "ref_logprobs"),
        (silent, None, "audio"),
        (deaf, None, "old_logprobs"),
    ],
)
def test_a_fault_is_located_at_its_quantity(run, tmp_path, capsys, fault, alone, with_model):
    """Steps 1 to 3: the fault is in the run, and not in the replay."""
    on_ranks(1, train, run, fault)
    status, out = replayed(capsys, tmp_path / "run", "1:3")
    assert (status, f"the first is {alone}, at step 1\n" in out) == ((1, True) if alone else (0, False)), out
    status, out = replayed(capsys, tmp_path / "run", "1:3", "--model")
    first = re.search("the first is (.*), at step", out)[1]
    # The tokens are drawn before their logprobs are known, and may or may not be other ones.
    assert status == 1 and (first if first != "tokens" else "old_logprobs") == with_model, out
    if with_model == "ref_logprobs":
        assert out.count("DIFFERS") == 1, "a fault in one stage is not reported in those after it"


def test_a_changed_number_in_a_record_is_found_where_it_is(run, tmp_path, capsys):
    on_ranks(1, train, run)
    record = read_step(tmp_path / "run", 2)
    tensors = {name: tensor.clone() for name, tensor in record.tensors.items()}
    tensors["advantages"][6] += 0.5
    write_part(tmp_path / "run", dataclasses.replace(record, tensors=tensors))
    status, out = replayed(capsys, tmp_path / "run")
    name = record.values["prompts"][1]["row"]["id"]
    assert status == 1 and "the first is advantages, at step 2" in out
    assert f"DIFFERS: 5.00e-01; first at completion 2 of {name}: " in out and "(step 2)" in out


def test_a_replay_with_a_missing_step_says_which(run, tmp_path, capsys):
    on_ranks(1, train, run)
    shutil.rmtree(place_of(tmp_path / "run", 1))
    with pytest.raises(RecordError, match="step 1 is not recorded; the steps from 1, .* to 2 are needed"):
        replay.main([str(tmp_path / "run"), "2", "--model"])


def test_other_settings_give_what_the_step_would_have_been(run, tmp_path, capsys):
    """Worked out from the record: without the KL term the loss is the surrogate alone."""
    on_ranks(1, train, run)
    status, out = replayed(capsys, tmp_path / "run", "2", "--set", "loss.beta=0", "loss.advantage=none")
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()[1:]}
    assert status == 0 and float(rows["beta * KL"][0]) > 0 == float(rows["beta * KL"][1])
    tensors = read_step(tmp_path / "run", 2).tensors
    centred = tensors["reward"].unflatten(0, (-1, 4))
    centred = (centred - centred.mean(dim=1, keepdim=True)).flatten()
    assert float(rows["advantages, mean size"][1]) == pytest.approx(float(centred.abs().mean()), rel=1e-4)
    assert float(rows["loss"][0]) == pytest.approx(float(tensors["loss"][..., -1].sum()), rel=1e-4)


def test_settings_that_a_record_cannot_be_computed_with_are_refused(run, tmp_path):
    on_ranks(1, train, run)
    with pytest.raises(ConfigError, match="--set optim.lr=1: expected settings that begin with loss. or reward."):
        replay.main([str(tmp_path / "run"), "2", "--set", "optim.lr=1"])


def test_two_runs_part_at_the_first_step_after_their_settings_differ(run, tmp_path, capsys):
    on_ranks(1, train, run)
    on_ranks(1, train, [*run, f"run.directory={tmp_path}/other", "loss.clip_high=0.01"])
    on_ranks(1, train, [*run, f"run.directory={tmp_path}/same"])
    status, out = replayed(capsys, tmp_path / "run", "--from", tmp_path / "same")
    assert status == 0 and "equal, to rounding, in 3 recorded steps, 1 to 3" in out
    status, out = replayed(capsys, tmp_path / "run", "--from", tmp_path / "other")
    assert status == 1 and "part at step 1, in clipped: DIFFERS" in out


def test_a_mask_ends_with_the_first_stop_token():
    tokens = torch.tensor([[5, 2, 0, 2], [5, 6, 7, 8], [2, 2, 2, 0]])
    assert sampled_mask(tokens, [2]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_the_lines_of_a_loss_add_up_to_it(run, tmp_path, capsys):
    on_ranks(1, train, run)
    record = read_step(tmp_path / "run", 2)
    capsys.readouterr()
    name = record.values["prompts"][1]["row"]["id"]
    step.main([str(tmp_path / "run"), "2", "--question", name, "--completion", "2", "--show", "loss"])
    lines = capsys.readouterr().out.splitlines()
    sums = [line for line in lines if "sum of the completion" in line]
    for number, line in enumerate(sums):
        assert float(line.split()[-1]) == pytest.approx(float(record.tensors["loss"][6, :, number].sum()), rel=1e-2)
    assert len(sums) == 2, "one for each update"
    tokens = int(record.tensors["mask"][6].sum())
    assert len(lines) == 2 + 2 + 2 * (3 + tokens)


def test_a_step_is_printed_without_control_characters(run, tmp_path, capsys):
    on_ranks(1, train, run)
    record = read_step(tmp_path / "run", 2)
    texts = [completion | {"text": "\x1b[2Jred"} for completion in record.values["completions"]]
    write_part(tmp_path / "run", dataclasses.replace(record, values=record.values | {"completions": texts}))
    capsys.readouterr()
    for more in (
        [],
        ["--show", "likeliest"],
        ["--show", "loss"],
        ["--question", record.values["prompts"][0]["row"]["id"]],
    ):
        step.main([str(tmp_path / "run"), "2", *more])
    out = capsys.readouterr().out
    assert "\\x1b[2Jred" in out and "\x1b" not in out


def test_differences_are_in_the_order_of_a_step(run, tmp_path):
    on_ranks(1, train, run)
    record = read_step(Path(tmp_path / "run"), 2)
    tensors = dict(record.tensors, kl=record.tensors["kl"] + 1.0, ref_logprobs=record.tensors["ref_logprobs"] - 1.0)
    found = differences(record, dataclasses.replace(record, tensors=tensors))
    assert first_difference(found).quantity == "ref_logprobs"
    assert first_difference(differences(record, record)) is None
