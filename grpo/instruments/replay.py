"""Recomputes a recorded step, and compares two records of a step quantity by quantity, causes before effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from hark.grpo.advantage import weighted_rewards
from hark.grpo.instruments.draft import recorded_advantages
from hark.grpo.instruments.record import StepRecord
from hark.grpo.objective import Objective

# Differences up to these are rounding, in relation to the largest value of a quantity.
ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2}
# And up to these in any case: values that are 0 but for the rounding of terms that cancel.
FLOOR = {"kl": 1e-6, "entropy": 1e-6, "loss": 1e-9, "grad_norms": 1e-6, "grad_norm": 1e-6}
ORDER = (  # of the quantities, as a step computes them
    ("examples", "prompts", "audio", "seeds", "weights_before"),
    ("tokens", "mask", "stopped", "old_logprobs", "texts"),
    ("rewards", "reward", "advantages", "token_advantages", "weights", "ref_logprobs", "scored_logprobs"),
    ("logprobs", "entropy", "likeliest_logprobs", "ratio", "clipped", "kl", "importance", "loss"),
    ("grad_norms", "grad_norm", "learning_rate", "weights_after"),
)
RECOMPUTED = (
    "mask", "stopped", "rewards", "reward", "advantages", "token_advantages", "weights",
    "ratio", "clipped", "kl", "importance", "loss",
)  # fmt: skip
EXACT = ("tokens", "mask", "stopped", "clipped")  # tensors that have no rounding


class Difference(NamedTuple):
    """How two records differ in one quantity.

    values: how many are compared. largest: the largest absolute difference; infinite where things that are not numbers
    differ. limit: up to which it is rounding. place, first, second: where it is first above the limit, or else where it
    is largest, and both values.
    """

    quantity: str
    values: int
    largest: float
    limit: float
    place: str
    first: Any
    second: Any

    @property
    def is_equal(self) -> bool:
        return self.largest == 0

    @property
    def is_rounding(self) -> bool:
        return 0 < self.largest <= self.limit


def recomputed(
    record: StepRecord,
    *,
    columns: torch.Tensor,
    reward_weights: Sequence[float],
    objective: Objective,
    beta: float,
) -> StepRecord:
    """The record with all that follows from its tokens, logprobs and reward columns (B, K) computed again.

    beta: the KL weight of the step; with 0 the recorded logprobs of the reference are left out.
    """
    old, ref = record.tensors, record.tensors.get("ref_logprobs") if beta else None
    mask = sampled_mask(old["tokens"], record.values["stop_ids"])
    new = {"mask": mask, "rewards": columns, "reward": weighted_rewards(columns, reward_weights)}
    new["stopped"] = (mask & is_stop(old["tokens"], record.values["stop_ids"])).any(dim=1)
    scored = old.get("scored_logprobs", old["old_logprobs"])
    penalties = objective.penalties(scored, ref, old["mask"], beta)
    size = record.values["group_size"]
    advantages = objective.advantages(columns, reward_weights, old["mask"], penalties, group_size=size)
    new |= recorded_advantages(advantages, old["mask"])
    counted = objective.counted(old["mask"], old["stopped"])
    new["weights"] = objective.weights(counted, completions=len(mask), tokens=float(counted.sum()))
    updates = []
    for number in range(old["logprobs"].shape[-1] if "logprobs" in old else 0):
        logprobs = old["logprobs"][..., number]
        _, terms = objective.loss(
            logprobs, scored, ref, advantages, new["weights"], mask=old["mask"], beta=beta,
            sampled_logprobs=old["old_logprobs"] if "scored_logprobs" in old else None,
            entropy=old["entropy"][..., number],
        )  # fmt: skip
        # A group without a gradient was not scored if there is no KL term; its logprobs are 0.
        had_pass = logprobs.ne(0).any(dim=1, keepdim=True) & old["mask"]
        updates.append({name: term.masked_fill(~had_pass, 0) for name, term in terms.items()})
    for name in updates[0] if updates else ():
        new[name] = torch.stack([terms[name] for terms in updates], dim=-1)
    return dataclasses.replace(record, tensors=old | new)


def is_stop(tokens: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    return torch.isin(tokens, torch.tensor(stop_ids))


def sampled_mask(tokens: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    """The mask (B, T) of sampled tokens (B, T): all up to the first stop token, which counts."""
    stops = is_stop(tokens, stop_ids).int()
    return stops.cumsum(dim=1) - stops == 0


def differences(
    first: StepRecord, second: StepRecord, *, dtype: str = "float32", among: Sequence[str] | None = None
) -> list[Difference]:
    """What two records of one step hold, compared in the order in which a step computes it; what one lacks is left out.

    dtype: of the computation, which says what counts as rounding. among: the quantities to compare; None is all.
    """
    one, other = _quantities(first), _quantities(second)
    names = [name for part in ORDER for name in part if among is None or name in among]
    names = [name for name in names if one.get(name) is not None and other.get(name) is not None]
    return [_difference(name, one[name], other[name], first, ROUNDING[dtype]) for name in names]


def first_difference(found: Sequence[Difference]) -> Difference | None:
    """The first quantity that differs by more than rounding: what comes after it may differ because of it."""
    return next((one for one in found if not (one.is_equal or one.is_rounding)), None)


def _quantities(record: StepRecord) -> dict[str, Any]:
    """The quantities of a record by the names of ORDER: tensors, tables of other values, or None."""
    values, prompts, updates = record.values, record.values["prompts"], record.values["updates"]
    return record.tensors | {
        "examples": {f"prompt {n}": prompt["row"]["id"] for n, prompt in enumerate(prompts)},
        "prompts": _by_prompt(record),
        "audio": {f"{p['row']['id']}, clip {n}": c["features"] for p in prompts for n, c in enumerate(p["clips"])},
        "seeds": {prompt["row"]["id"]: prompt["key"] for prompt in prompts},
        "weights_before": values["weights_before"],
        "texts": {label(record, b): completion["text"] for b, completion in enumerate(values["completions"])},
        "grad_norms": _tensor([norm for update in updates for norm in update["grad_norms"].values()]),
        "grad_norm": _tensor([update["grad_norm"] for update in updates]),
        "learning_rate": _tensor([] if values["learning_rate"] is None else [values["learning_rate"]]),
        "weights_after": values["weights_after"],
    }


def _difference(quantity: str, one: Any, other: Any, record: StepRecord, rounding: float) -> Difference:
    if torch.is_tensor(one):
        return _of_tensors(quantity, one, other, record, rounding)
    return _of_values(quantity, one, other)


def _tensor(numbers: Sequence[float | None]) -> torch.Tensor | None:
    values = [float("nan") if number is None else number for number in numbers]
    return torch.tensor(values, dtype=torch.float64) if values else None


def _by_prompt(record: StepRecord) -> dict[str, list[int]]:
    lengths = record.tensors["prompt_lengths"].tolist()
    ids = [part.tolist() for part in record.tensors["prompt_ids"].split(lengths)]
    return {prompt["row"]["id"]: own for prompt, own in zip(record.values["prompts"], ids, strict=True)}


def label(record: StepRecord, *index: int) -> str:
    """Where a value of row b, token t and update u is: "completion 3 of train-17, token 2"."""
    completion, rest = index[0] % record.values["group_size"], index[1:]
    name = record.values["prompts"][index[0] // record.values["group_size"]]["row"]["id"]
    return ", ".join([f"completion {completion} of {name}", *(f"token {t}" for t in rest[:1])])


def _of_tensors(
    quantity: str, one: torch.Tensor, other: torch.Tensor, record: StepRecord, rounding: float
) -> Difference:
    one, other = _aligned(one.double(), other.double())
    gap = (one - other).abs().nan_to_num(nan=float("inf"))
    gap[(one == other) | (one.isnan() & other.isnan())] = 0.0
    size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    limit = 0.0 if quantity in EXACT else max(rounding * size, FLOOR.get(quantity, 0.0))
    largest = float(gap.max()) if gap.numel() else 0.0
    above = (gap > limit).nonzero()
    index = above[0].tolist() if len(above) else [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    place = label(record, *index) if quantity in record.tensors else _module(quantity, record, index[0])
    first, second = (float(values[tuple(index)]) for values in (one, other))
    return Difference(quantity, gap.numel(), largest, limit, place, first, second)


def _module(quantity: str, record: StepRecord, index: int) -> str:
    """The name of a figure of the updates."""
    modules = [name for update in record.values["updates"] for name in update["grad_norms"]]
    return modules[index] if quantity == "grad_norms" else ""


def _aligned(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors, padded with 0 to the same number of tokens."""
    if one.dim() < 2 or one.shape[1] == other.shape[1]:
        return one, other
    longest = max(one.shape[1], other.shape[1])
    padded = (pad(t, (0, 0) * (t.dim() - 2) + (0, longest - t.shape[1])) for t in (one, other))
    return next(padded), next(padded)


def _of_values(quantity: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """Of two tables of values that are no numbers."""
    names = list(dict.fromkeys([*one, *other]))
    unequal = [name for name in names if one.get(name) != other.get(name)]
    place = unequal[0] if unequal else ""
    largest = float("inf") if unequal else 0.0
    return Difference(quantity, len(names), largest, 0.0, place, one.get(place), other.get(place))
