"""Which examples a step uses, the order of their choices, the keys of their completions, and which are held out.

All are pure functions of the seed, the step and the examples; the number of ranks only decides which rank has which
prompts of a step.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hark.data.difficulty import easy_to_hard
from hark.data.errors import DataError
from hark.data.examples import Example

Order = Callable[[int], int]  # a prompt of the run, counted from 0 over all steps and ranks -> the index of its example

BLOCK = 1000  # prompts in which the shares of a mixture are exact
TOKENS_PER_SECOND = 25  # of audio in Qwen2-Audio; other families have fewer
LETTERS_PER_TOKEN = 4  # of English text
MIXING = 2**32 - 1  # a seed that no part has, for the order of the parts


@dataclass(frozen=True)
class Curriculum:
    """In which order a run draws its examples.

    order: shuffled, anew in each epoch; file, as the files have them; sorted, from easy to hard; staged, in `stages`
    stages from easy to hard. by: what makes an example hard, `difficulty` or `pass_rate`. total: the number of prompts
    of the run, which stages divide.
    """

    order: str = "shuffled"
    by: str = "difficulty"
    stages: int = 1
    total: int = 1


SHUFFLED = Curriculum()


def order_of(
    examples: Sequence[Example], *, seed: int, weights: Sequence[float] = (), curriculum: Curriculum = SHUFFLED
) -> Order:
    """The order in which a run draws the examples: a function of the seed, the examples and the curriculum alone.

    weights: the share of the prompts from each `part` of the examples; without it, all examples are one part.
    """
    if not weights:
        return _ordered(examples, range(len(examples)), curriculum, seed)
    if curriculum.order == "staged":
        raise ValueError("the stages of a mixture are not defined; expected another order, or no weights")
    parts = parts_of(examples, len(weights))
    orders = [_ordered(examples, part, curriculum, seed, number) for number, part in enumerate(parts)]
    return mixed(orders, weights, seed=seed)


def _ordered(
    examples: Sequence[Example], indices: Sequence[int], curriculum: Curriculum, seed: int, *own: int
) -> Order:
    """The order of some of the examples. own: further seeds, which differ for each part of a mixture."""
    if curriculum.order == "file":
        return in_turn(indices)
    if curriculum.order == "shuffled":
        return shuffled(indices, seed, *own)
    ranked = easy_to_hard(examples, indices, curriculum.by)
    if curriculum.order == "sorted":
        return in_turn(ranked)
    return staged(ranked, seed, stages=curriculum.stages, total=curriculum.total)


def in_turn(indices: Sequence[int]) -> Order:
    """The indices one after another, epoch after epoch."""
    return lambda position: indices[position % len(indices)]


def shuffled(indices: Sequence[int], seed: int, *own: int) -> Order:
    """The indices in epochs, each a permutation of them; a run's steps take consecutive pieces of all epochs.

    An epoch uses every index once, and a step may cross the end of an epoch. own: further seeds.
    """

    def at(position: int) -> int:
        epoch, offset = divmod(position, len(indices))
        return indices[int(_permutation(len(indices), seed, epoch, *own)[offset])]

    return at


def staged(ranked: Sequence[int], seed: int, *, stages: int, total: int) -> Order:
    """From easy to hard: the run and the indices are divided into `stages` equal parts, and part k of the run draws
    from part k of the indices.

    total: the number of prompts of the run. Within a stage the indices are shuffled in epochs. A position beyond the
    end of the run is of the last stage.
    """
    if len(ranked) < stages:
        raise DataError(f"{len(ranked)} examples are fewer than data.stages={stages}; use fewer stages")
    borders = [stage * len(ranked) // stages for stage in range(stages + 1)]
    orders = [shuffled(ranked[low:high], seed, stage) for stage, (low, high) in enumerate(pairwise(borders))]

    def at(position: int) -> int:
        stage = min(position * stages // total, stages - 1)
        return orders[stage](position - -(-stage * total // stages))  # counted from the first position of the stage

    return at


def mixed(orders: Sequence[Order], weights: Sequence[float], *, seed: int) -> Order:
    """Several orders, each with its share of the prompts.

    Of every BLOCK prompts, counted from the first step, exactly round(BLOCK * share) are of each order, in a sequence
    drawn anew for each block.
    """
    in_block = block_counts(weights)
    parts = np.repeat(np.arange(len(orders)), in_block)

    def at(position: int) -> int:
        block, place = divmod(position, BLOCK)
        sequence = parts[_permutation(BLOCK, seed, block, MIXING)]
        part = int(sequence[place])
        return orders[part](block * in_block[part] + int((sequence[:place] == part).sum()))

    return at


@functools.lru_cache(maxsize=16)
def _permutation(count: int, *seeds: int) -> np.ndarray:
    # RandomState, because numpy keeps its stream the same in all versions, and a resumed run needs the same order.
    return np.random.RandomState(seeds).permutation(count)


def parts_of(examples: Sequence[Example], count: int) -> list[Sequence[int]]:
    """The indices of the examples of each of `count` parts; DataError for a part without any."""
    own = [example.part for example in examples]
    parts: list[Sequence[int]] = [[i for i, one in enumerate(own) if one == part] for part in range(count)]
    if not all(parts):
        raise DataError(f"file {parts.index([]) + 1} of {count} has no example to train on; remove it or its weight")
    return parts


def block_counts(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK prompts are from each part: the shares, rounded so that they add up to BLOCK.

    DataError for a part whose share is too small to get a prompt.
    """
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda part: whole[part] - exact[part])
    for part in by_rest[: BLOCK - sum(whole)]:
        whole[part] += 1
    if 0 in whole:
        raise DataError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} give a file less than one prompt of "
            f"{BLOCK}; expected weights that are closer together"
        )
    return whole


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


def expected_tokens(seconds: float, letters: int) -> float:
    """Tokens of a prompt, estimated before it is prepared: the same for all families, as only proportions matter.

    The completions are left out. Their lengths are not known, so each prompt would get the same, and `dealt` gives the
    same result with a constant added to all lengths.
    """
    return TOKENS_PER_SECOND * seconds + letters / LETTERS_PER_TOKEN


def dealt(lengths: Sequence[float], world: int) -> list[list[int]]:
    """For each rank the indices of its prompts, ascending: equally many, of nearly equal sums of `lengths`.

    Longest processing time first (LPT), in rounds: from the longest to the shortest, each `world` prompts in a row go
    to different ranks, the longest of them to the rank with the smallest sum so far. Equal lengths are taken by their
    index, equal sums by their rank. The rounds give the k-th longest prompts of all ranks similar lengths, because the
    ranks compute their k-th micro-batches at the same time. ValueError if the ranks cannot have equally many.
    """
    if len(lengths) % world:
        raise ValueError(
            f"{len(lengths)} prompts per step cannot be split over {world} ranks; expected a multiple of {world}"
        )
    descending = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # a stable sort
    ranks: list[list[int]] = [[] for _ in range(world)]
    sums = [0.0] * world
    for first in range(0, len(lengths), world):
        free = sorted(range(world), key=lambda rank: sums[rank])
        for rank, index in zip(free, descending[first : first + world], strict=True):
            ranks[rank].append(index)
            sums[rank] += lengths[index]
    return [sorted(own) for own in ranks]


def shuffle_choices(example: Example, *, seed: int, step: int) -> Example:
    """The example with its choices permuted and `answer` adapted: a pure function of (seed, step, id).

    An unknown answer stays None. An open question stays as it is.
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
    All windows of a file are one clip, and so are all clips that a question has. Which clips are held out depends only
    on the seed and on their paths relative to their common directory, not on the order of the file and not on where the
    data is stored; for clips in tables, on their content. Raises DataError if nothing is left to train on.
    """
    if count < 0:
        raise ValueError(f"count={count}; expected at least 0")
    names = _groups(_clip_names(examples))
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


def _clip_names(examples: Sequence[Example]) -> list[list[str]]:
    """The names of each example's clips; the example's own name where it has none."""
    sources = [clip.source for example in examples for clip in example.clips]
    directories = {os.path.dirname(os.path.abspath(source)) for source in sources if isinstance(source, Path)}
    root = os.path.commonpath(directories) if directories else ""

    def named(example: Example) -> list[str]:
        digests = example.digests or [""] * len(example.clips)
        pairs = zip(example.clips, digests, strict=True)
        return [
            f"clip/{os.path.relpath(os.path.abspath(clip.source), root)}"
            if isinstance(clip.source, Path)
            else f"content/{digest or clip.source.key}"
            for clip, digest in pairs
        ]

    return [named(example) or [f"id/{example.id}"] for example in examples]


def _groups(names: Sequence[Sequence[str]]) -> list[str]:
    """One name for each example: the same for all that are connected by common clips."""
    first: dict[str, str] = {}  # a name -> another of its group, or itself

    def find(name: str) -> str:
        while first.setdefault(name, name) != name:
            name = first[name]
        return name

    for own in names:
        low, *others = sorted(map(find, own))
        first.update(dict.fromkeys(others, low))
    return [find(own[0]) for own in names]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
