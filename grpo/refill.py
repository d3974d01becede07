"""Dynamic sampling: groups whose rewards are all equal are replaced by those of the next prompts of the run's order.

DAPO (arXiv 2503.14476, section 3.2) draws until the batch is full of groups with spread. Here a step draws candidates
from a cursor on, and trains on the first `prompts` groups with spread in that order. The next step goes on after the
last of them. So neither the sizes of the draws nor the number of ranks nor a resume change what is trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hark.grpo.runtime.collectives import World, exchange_rows
from hark.grpo.shared_data import Key, TrainingData
from hark.grpo.types import Rollout, stacked
from hark.models.policy import Prompt


@dataclass(frozen=True)
class Drawn:
    """This rank's groups of a step: N examples with their completions, and where they are in the run's order.

    positions: of the examples, ascending. columns: (B, K) reward columns; None where they are not computed yet.
    cursor: with rollout.refill, the position at which the next step begins. figures: metrics of the draws, the same on
    all ranks. waited: seconds of waiting for other ranks.
    """

    examples: tuple[Any, ...]
    prompts: tuple[Prompt, ...]
    keys: tuple[Key, ...]
    rollout: Rollout
    positions: tuple[int, ...]
    columns: torch.Tensor | None = None
    cursor: int | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    waited: float = 0.0


class _Group(NamedTuple):
    """One group: its completions and its reward columns (G, K)."""

    rollout: Rollout
    columns: torch.Tensor


def chosen(spread: Sequence[bool], wanted: int) -> tuple[list[int], int]:
    """Which of the candidates to train on, in their order, and how many are used up.

    The first `wanted` with spread; those after the last of them are not used up. If there are fewer with spread, all of
    them and the first without, and all candidates are used up.
    """
    found = [n for n, has in enumerate(spread) if has][:wanted]
    if len(found) == wanted:
        return found, found[-1] + 1
    others = [n for n, has in enumerate(spread) if not has]
    return sorted(found + others[: wanted - len(found)]), len(spread)


def next_draw(spread: Sequence[bool], wanted: int, *, further: int, ranks: int) -> int:
    """How many candidates to draw after those: 0 if enough have spread, or if the bound is reached.

    The number of missing groups divided by the share of candidates with spread so far (`wanted` if none has it), at
    most `wanted`, and rounded up to a multiple of `ranks`. `wanted` is such a multiple.
    """
    drawn, found = len(spread), sum(spread)
    left = (1 + further) * wanted - drawn
    if found >= wanted or not left:
        return 0
    needed = -(-(wanted - found) * drawn // found) if found else wanted
    return min(-(-needed // ranks) * ranks, wanted, left)


def draw_with_spread(
    data: TrainingData,
    step: int,
    cursor: int,
    *,
    prompts: int,
    further: int,
    world: World,
    pad_id: int,
    draw: Callable[[Sequence[tuple[Any, Prompt, Key]], Sequence[int]], tuple[Rollout, torch.Tensor, float]],
    spread: Callable[[torch.Tensor], Sequence[bool]],
) -> Drawn:
    """Draw candidates from `cursor` on until `prompts` groups have spread, at most (1 + `further`) * `prompts`.

    draw: returns the completions of this rank's candidates, whose positions it gets too, their reward columns (B, K),
    and the seconds for which it waited for other ranks. spread: says for each group whether its rewards differ.
    pad_id: fills up the tokens of shorter completions.
    """
    flags: list[bool] = []
    known: dict[int, tuple[Any, Prompt, Key]] = {}
    groups: dict[int, _Group] = {}
    waited = 0.0
    while size := next_draw(flags, prompts, further=further, ranks=world.size):
        first = cursor + len(flags)
        positions = data.share(range(first, first + size))
        candidates = data.at(step, positions, since=cursor)
        rollout, columns, seconds = draw(candidates, positions)
        waited += seconds
        found = exchange_rows(list(zip(positions, spread(columns), strict=True)), world)
        flags += [has for _, has in sorted(found)]
        known |= zip(positions, candidates, strict=True)
        groups |= {
            position: _Group(rollout.select([n]), columns[rollout.rows([n])]) for n, position in enumerate(positions)
        }
    kept, used = chosen(flags, prompts)
    every, after = [cursor + n for n in kept], cursor + used
    positions = data.share(every)
    groups = _moved(groups, every, positions, world)
    missing = [position for position in positions if position not in known]
    known |= zip(missing, data.at(step, missing, since=cursor), strict=True)
    data.prepare_at(step + 1, data.share(range(after, after + prompts)), since=after)
    examples, asked, keys = zip(*(known[position] for position in positions), strict=True)
    return Drawn(
        examples,
        asked,
        keys,
        _joined([groups[position].rollout for position in positions], asked, pad_id),
        tuple(positions),
        columns=torch.cat([groups[position].columns for position in positions]),
        cursor=after,
        figures={
            "drawn_prompts": len(flags),
            "kept_share": sum(flags[n] for n in kept) / len(flags),
            "used_prompts": after,
        },
        waited=waited,
    )


def _moved(groups: dict[int, _Group], kept: Sequence[int], own: Sequence[int], world: World) -> dict[int, _Group]:
    """This rank's groups with those that others drew and this rank trains on, at the positions `own` of those `kept`.

    A prompt is not sent: its rank prepares it again.
    """
    sent = [(position, _on(group, "cpu")) for position, group in groups.items() if position in {*kept} - {*own}]
    received = [(position, group) for position, group in exchange_rows(sent, world) if position in own]
    return groups | {position: _on(group, world.device) for position, group in received}


def _on(group: _Group, device: torch.device | str) -> _Group:
    """The tensors of a group on a device, without its prompt."""
    rollout = group.rollout
    moved = Rollout(
        (),
        rollout.group_size,
        rollout.tokens.to(device),
        rollout.mask.to(device),
        logprobs=rollout.logprobs.to(device),
        stopped=rollout.stopped.to(device),
    )
    return _Group(moved, group.columns.to(device))


def _joined(parts: Sequence[Rollout], prompts: tuple[Prompt, ...], pad_id: int) -> Rollout:
    """The groups of several rollouts as one, padded to the longest completion."""
    return Rollout(
        prompts,
        parts[0].group_size,
        stacked([part.tokens for part in parts], value=pad_id),
        stacked([part.mask for part in parts]),
        logprobs=stacked([part.logprobs for part in parts]),
        stopped=stacked([part.stopped for part in parts]),
    )
