"""Which examples a step uses, the order of their choices, the keys of their completions, and which are held out.

All are pure functions of the seed, the step and the examples; the number of ranks does not matter.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from hark.data.errors import DataError
from hark.data.examples import Example

T = TypeVar("T")


def step_indices(count: int, *, seed: int, step: int, prompts_per_step: int) -> list[int]:
    """Indices of the examples of a step, over all ranks, in order.

    Each epoch is a permutation of the `count` examples. The epochs are concatenated, and step s is the s-th slice of
    `prompts_per_step` indices: an epoch uses every example once, and a step may cross the end of an epoch.
    """
    if count < 1 or prompts_per_step < 1 or step < 0:
        raise ValueError(
            f"count={count}, prompts_per_step={prompts_per_step}, step={step}; expected at least 1, 1 and 0"
        )
    first = step * prompts_per_step
    positions = (divmod(position, count) for position in range(first, first + prompts_per_step))
    return [int(_permutation(count, seed, epoch)[offset]) for epoch, offset in positions]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy keeps its stream the same in all versions, and a resumed run needs the same order.
    return np.random.RandomState([seed, epoch]).permutation(count)


def occurrences(indices: Sequence[int]) -> list[int]:
    """For each index, how often it was in the list before: 0 the first time, then 1, 2, ...

    A step holds an index more than once if the data set is smaller than the step or if the step crosses an epoch's end.
    """
    counts: Counter[int] = Counter()
    result = []
    for index in indices:
        result.append(counts[index])
        counts[index] += 1
    return result


def completion_key(
    seed: int, step: int, identity: str, *, occurrence: int = 0, replaced: str | None = None
) -> tuple[int, ...]:
    """The integers that seed the random numbers of one prompt's completions; they differ for all prompts of a step.

    (seed, step, digest(identity)) for the first occurrence of an example in a step, (seed, step, digest(identity),
    occurrence) for a later one. An example that replaces a skipped one, whose id is `replaced`, has (seed, step,
    digest(identity), occurrence, digest(replaced)), where the occurrence is that of the skipped example.

    The sampler draws (G, max_new_tokens) uniform numbers per key, row by row from one stream: completion g uses the
    numbers from g * max_new_tokens on. Another G leaves the numbers of the completions that both sizes have unchanged.
    Another max_new_tokens leaves those of completion 0 unchanged, up to the shorter limit; all other completions get
    other numbers.
    """
    key = (seed, step, digest(identity))
    if replaced is not None:
        return *key, occurrence, digest(replaced)
    return (*key, occurrence) if occurrence else key


def digest(text: str) -> int:
    """A 64-bit hash of a text that is the same in every process and on every platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def rank_slice(draws: Sequence[T], rank: int, world: int) -> list[T]:
    """The part of a step's draws that a rank takes: contiguous, and of equal length on all ranks."""
    if len(draws) % world:
        raise ValueError(
            f"{len(draws)} prompts per step cannot be split over {world} ranks; expected a multiple of {world}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}; expected 0 to {world - 1}")
    size = len(draws) // world
    return list(draws[rank * size : (rank + 1) * size])


def shuffle_choices(example: Example, *, seed: int, step: int) -> Example:
    """The example with its choices permuted and `answer` adapted: a pure function of (seed, step, id).

    An unknown answer stays None.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{step}/{index}/{example.id}".encode()).digest()

    order = sorted(range(len(example.choices)), key=rank)
    choices = tuple(example.choices[index] for index in order)
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, choices=choices, answer=answer)


def hold_out(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out at least `count` examples for validation: (training, held out), each in file order.

    Whole clips are held out, so that no clip is in both parts; an example without audio counts as a clip of its own.
    Which clips are held out depends only on the seed and on their paths relative to their common directory, not on the
    order of the file and not on where the data is stored. Raises DataError if nothing is left to train on.
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
            f"{len(set(names))}: nothing would be left to train on; hold out fewer, or use a validation file of its own"
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
