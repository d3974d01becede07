"""Which examples a step sees, and which none may see: pure functions of the seed, whatever the number of ranks."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hark.data.errors import DataError
from hark.data.examples import Example


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


def shuffle_choices(example: Example, *, seed: int, step: int) -> Example:
    """The example with its choices permuted and its answer index moved along: a pure function of (seed, step, id).

    An answer that is not known stays so.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{step}/{index}/{example.id}".encode()).digest()

    order = sorted(range(len(example.choices)), key=rank)
    choices = tuple(example.choices[index] for index in order)
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, choices=choices, answer=answer)


def hold_out(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off at least `count` examples to validate on: (training, held out), each in file order.

    Whole clips at a time: all questions about a clip fall on the same side, and one without audio is a clip of its
    own. Which clips are held out depends on the seed and their names beneath their common directory alone, not on the
    order of the file or on where the data lies. Raises DataError if nothing is left to train on.
    """
    if count < 0:
        raise ValueError(f"count={count}; expected at least 0")
    names = _clip_names(examples)
    held, clips = 0, set()
    for name, questions in sorted(Counter(names).items(), key=lambda item: _rank(seed, item[0])):
        if held >= count:
            break
        clips.add(name)
        held += questions
    training = [example for example, name in zip(examples, names, strict=True) if name not in clips]
    if held < count or not training:
        raise DataError(
            f"{count} of {len(examples)} examples cannot be held out by whole clips, of which there are "
            f"{len(set(names))}: nothing would be left to train on; hold out fewer, or name a file of their own"
        )
    return training, [example for example, name in zip(examples, names, strict=True) if name in clips]


def _clip_names(examples: Sequence[Example]) -> list[str]:
    paths = [example.audio_path and os.path.abspath(example.audio_path) for example in examples]
    directories = {os.path.dirname(path) for path in paths if path}
    root = os.path.commonpath(directories) if directories else ""
    return [
        f"clip/{os.path.relpath(path, root)}" if path else f"id/{example.id}"
        for example, path in zip(examples, paths, strict=True)
    ]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
