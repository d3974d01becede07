"""Draws several answers to each question, and grades them: the pass rates of questions, and right answers to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from hark.data.examples import Example
from hark.data.loader import evaluation_batches
from hark.data.order import digest, shuffle_choices
from hark.data.rewards.judging import Judge
from hark.grpo.advantage import weighted_rewards
from hark.grpo.config import Config
from hark.grpo.recorded import RecordedSteps, recorded_steps
from hark.grpo.rewards import weights_at
from hark.grpo.runtime.collectives import World, gather_rows
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.launch.common.questions import bad_log, prepare_of, rewards_of, waveform_of
from hark.models.policy import Policy, Prompt, completion_ids

RIGHT = 0.5  # the least reward of a right answer


class Drawn(NamedTuple):
    """The answers to one question: whether each is right, its text, whether it has a stop token, and its reward."""

    id: str
    right: list[bool]
    texts: list[str]
    stopped: list[bool]
    rewards: list[float]


def graded_by(config: Config, reward: str) -> Config:
    """The configuration with that reward among its rewards."""
    if reward in config.reward.weights:
        return config
    weights = config.reward.weights | {reward: 0.0}
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, weights=weights))


def answers(
    config: Config, world: World, policy: Policy, examples: Sequence[Example], reward: str
) -> Iterator[list[Drawn]]:
    """The answers to the examples, some questions at a time, in their order; on rank 0, empty lists on the others."""
    size = config.rollout.batch or max(1, config.optim.prompts_per_step // world.size)
    asked = [
        shuffle_choices(one, seed=config.run.seed, step=0) if config.data.shuffle_choices else one for one in examples
    ]
    batches = evaluation_batches(
        asked[world.rank :: world.size],
        prepare_of(policy, config.rollout.max_new_tokens),
        template=config.data.template,
        waveform=waveform_of(config, policy),
        batch=size,
        workers=config.data.workers,
        skip_bad=config.data.skip_bad,
        on_bad=bad_log(config).add,
    )
    places = {example.id: place for place, example in enumerate(examples)}
    with gathered(policy), rewards_of(config) as judge:
        recorded = recorded_steps(policy, wanted=config.rollout.cuda_graphs, gathered=True)
        for _ in range(0, len(examples), size * world.size):  # as often on all ranks
            pairs = next(batches, [])
            drawn = gather_rows(draw(config, policy, judge, pairs, reward, recorded) if pairs else [], world)
            yield sorted(drawn or [], key=lambda one: places[one.id])


def draw(
    config: Config,
    policy: Policy,
    judge: Judge,
    pairs: Sequence[tuple[Example, Prompt]],
    reward: str,
    recorded: RecordedSteps | None = None,
) -> list[Drawn]:
    """G answers to each question, with the settings of rollout, graded."""
    examples, prompts = zip(*pairs, strict=True)
    rollout, size = config.rollout, config.rollout.group_size
    # Two integers: no step has such a key, so that training does not draw these answers again.
    keys = [(config.run.seed, digest(f"pass-rate/{example.id}")) for example in examples]
    drawn = sample(
        policy, prompts, keys=keys, group_size=size, max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature, batch=rollout.batch, recorded=recorded,
    )  # fmt: skip
    texts = policy.completion_texts(drawn.tokens, drawn.mask)
    ids = completion_ids(drawn.tokens, drawn.mask)
    columns = judge(examples, texts, ids, drawn.stopped.tolist(), 0).columns
    right = columns[:, list(config.reward.weights).index(reward)] >= RIGHT
    rewards = weighted_rewards(columns, weights_at(config.reward.weights, config.reward.schedule, 0))
    return [
        Drawn(example.id, right[rows].tolist(), texts[rows], drawn.stopped[rows].tolist(), rewards[rows].tolist())
        for n, example in enumerate(examples)
        for rows in [slice(n * size, (n + 1) * size)]
    ]


def measured(row: dict[str, Any], drawn: Drawn) -> dict[str, Any]:
    """The row of a question with its pass rate."""
    return row | {"pass_rate": sum(drawn.right) / len(drawn.right), "pass_samples": len(drawn.right)}


def kept(row: dict[str, Any], drawn: Drawn, most: int) -> list[dict[str, Any]]:
    """A row for each of up to `most` different right answers that ended by themselves, the best rewarded first."""
    right = [n for n in range(len(drawn.texts)) if drawn.right[n] and drawn.stopped[n] and drawn.texts[n].strip()]
    texts = dict.fromkeys(drawn.texts[n] for n in sorted(right, key=lambda n: -drawn.rewards[n]))
    rows = (row | {"id": f"{drawn.id}#{n}", "answer_to": drawn.id, "target": text} for n, text in enumerate(texts, 1))
    return list(islice(rows, most))
