"""Which examples a step sees: a pure function of the seed and the step, whatever the number of ranks."""

import functools
from collections.abc import Sequence

import numpy as np


def step_indices(count: int, *, seed: int, step: int, prompts_per_step: int) -> list[int]:
    """Positions in the dataset of all prompts of a step, over all ranks.

    Steps are consecutive slices of the epochs' permutations laid end to end, so each epoch shows every example once,
    and a step that crosses an epoch's end goes on in the next.
    """
    if count < 1 or prompts_per_step < 1 or step < 0:
        raise ValueError(
            f"count={count}, prompts_per_step={prompts_per_step}, step={step}; expected at least 1, 1 and 0"
        )
    first = step * prompts_per_step
    places = (divmod(place, count) for place in range(first, first + prompts_per_step))
    return [int(_permutation(count, seed, epoch)[offset]) for epoch, offset in places]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises its stream for all versions, and a resumed run must find the same order.
    return np.random.RandomState([seed, epoch]).permutation(count)


def rank_slice(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a step's indices that a rank takes: contiguous and of equal length."""
    if len(indices) % world:
        raise ValueError(
            f"{len(indices)} prompts per step cannot be split over {world} ranks; expected a multiple of {world}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}; expected 0 to {world - 1}")
    size = len(indices) // world
    return list(indices[rank * size : (rank + 1) * size])
