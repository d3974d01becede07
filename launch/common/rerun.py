"""Runs recorded steps again with the model. Each stage gets what the record holds of those before it.

A difference in one stage thus causes no other: if the completions differ, the recorded ones are scored all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from hark.data.described import described
from hark.data.prompts import target
from hark.grpo.advantage import weighted_rewards
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.draft import recorded_advantages
from hark.grpo.instruments.record import RecordError, StepRecord, joined
from hark.grpo.runtime.checkpoint import load_checkpoint
from hark.grpo.runtime.collectives import World, gather_rows
from hark.grpo.trainer import Trainer
from hark.grpo.types import Rollout
from hark.launch.common.policies import choose_attention, make_policy, make_reference
from hark.launch.common.questions import rewards_of, training_examples, training_loader
from hark.launch.common.run_directory import left_out_by

OF_TOKENS = (  # recorded inputs, (B, T)
    "tokens", "mask", "old_logprobs", "scored_logprobs", "ref_logprobs", "token_advantages", "weights",
)  # fmt: skip
OF_COMPLETIONS = ("stopped", "rewards", "advantages")


@contextmanager
def prepared_trainer(config: Config, world: World) -> Iterator[Trainer]:
    """The trainer of a run, at its first step."""
    if config.optim.prompts_per_step % world.size:
        raise ConfigError(f"a step has {config.optim.prompts_per_step} prompts, no multiple of {world.size} processes")
    policy = make_policy(config, world)
    choose_attention(config, world, policy)
    left_out = left_out_by(Path(config.run.directory))
    examples = training_examples(config, world, policy, left_out).training
    with training_loader(config, world, policy, examples) as loader:
        yield Trainer(
            config, world, policy, data=loader, rewards=rewards_of(config), describe=described,
            reference=make_reference(config, world, policy), target=partial(target, template=config.data.template),
        )  # fmt: skip


def restore(trainer: Trainer, run: Path, step: int) -> int:
    """Load the newest checkpoint of a run before `step`; returns its finished steps, 0 for the model it began with."""
    manifest = load_checkpoint(
        run / "checkpoints", trainer.policy, trainer.optimizer, trainer.world, at_most=step - 1,
        further=trainer.further_policies(),
    )  # fmt: skip
    if manifest is None:
        return 0
    trainer.restore(manifest.state)
    return manifest.step


def rerun(trainer: Trainer, record: StepRecord) -> StepRecord | None:
    """Run one step again, from the weights that the trainer has; returns its record on rank 0."""
    world, step = trainer.world, record.step
    since, positions = record.values["since"], [prompt["position"] for prompt in record.values["prompts"]]
    share = trainer.data.share(positions)
    examples, prompts, keys = zip(*trainer.data.at(step - 1, share, since=since), strict=True)
    own = _part(record, [positions.index(position) for position in share], world)
    trainer.reference.beta = record.values["beta"]
    trainer.recorder.begin(step)
    drawn = trainer.draw(prompts, keys)
    scored = Rollout(
        prompts, drawn.group_size, own["tokens"], own["mask"], logprobs=own["old_logprobs"], stopped=own["stopped"]
    )
    texts = trainer.policy.completion_texts(scored.tokens, scored.mask)
    names = list(trainer.config.reward.weights)
    columns = trainer.rewards.columns(trainer.rewards.start(examples, scored, texts, step - 1))
    ref_logprobs = trainer.reference_logprobs(scored)
    scored_logprobs = trainer.scored_again(scored) if "scored_logprobs" in own else None
    trainer.recorder.note(
        examples=examples, prompts=prompts, keys=keys, positions=share, since=since, rollout=drawn, texts=texts,
        reward_names=names, columns=columns,
    )  # fmt: skip
    old, ref = own.get("scored_logprobs", own["old_logprobs"]), own.get("ref_logprobs")
    weights = trainer.rewards.weights(step - 1)
    reward = weighted_rewards(own["rewards"], weights)
    penalties = trainer.objective.penalties(old, ref, scored.mask, trainer.reference.beta)
    advantages = trainer.advantages(own["rewards"], weights, scored.mask, penalties)
    counted = trainer.objective.counted(scored.mask, scored.stopped)
    tokens = float(trainer.objective.counted(record.tensors["mask"], record.tensors["stopped"]).sum())
    batch = trainer.with_answers(trainer.batch(scored, old, ref, advantages, counted, tokens), examples)
    found = {"tokens": drawn.tokens, "mask": drawn.mask, "ref_logprobs": ref_logprobs, "reward": reward}
    found |= {"scored_logprobs": scored_logprobs}
    found |= recorded_advantages(advantages, scored.mask) | {"weights": batch.weights}
    recorded = dataclasses.replace(
        batch, advantages=own.get("token_advantages", own["advantages"]), weights=own["weights"]
    )
    for _ in range(trainer.config.loss.inner_epochs):
        trainer.update(recorded, step - 1, examples)
    trainer.reference.move(trainer.policy, step - 1)
    part = trainer.recorder.take()
    tensors = part.tensors | {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}
    parts = gather_rows([dataclasses.replace(part, tensors=tensors)], world)
    return None if parts is None else joined(parts)


def _part(record: StepRecord, groups: Sequence[int], world: World) -> dict[str, torch.Tensor]:
    """The rows of some groups of the recorded inputs, those of (B, T) cut to their longest completion."""
    if not record.is_whole:
        missing = sorted(set(range(record.values["ranks"])) - set(record.values["parts"]))
        raise RecordError(f"step {record.step}: the parts of ranks {missing} are missing; it cannot be run again")
    size = record.values["group_size"]
    rows = [group * size + branch for group in groups for branch in range(size)]
    longest = int(record.tensors["mask"][rows].sum(dim=1).max())
    cut = {name: record.tensors[name][rows, :longest] for name in OF_TOKENS if name in record.tensors}
    whole = {name: record.tensors[name][rows] for name in OF_COMPLETIONS}
    return {name: value.to(world.device) for name, value in (cut | whole).items()}
