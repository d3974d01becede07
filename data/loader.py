"""Prepares the prompts of a step in threads while the step before it runs.

Threads and not processes: decoding, resampling, log-mel and tokenising run in C code that releases the interpreter's
lock. Nothing is pickled, and an exception arrives as it was raised.
"""

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from hark.data.clip import Clip
from hark.data.clips import Unchanged
from hark.data.errors import DataError, SkippedClipError
from hark.data.examples import BadExample, Example
from hark.data.order import (
    SHUFFLED,
    Curriculum,
    completion_key,
    dealt,
    digest,
    expected_tokens,
    occurrences,
    order_of,
    parts_of,
    shuffle_choices,
)
from hark.data.parallel import in_threads
from hark.data.prompts import find_template, render, text_of
from hark.threads import helper_threads


class _Tokens(Protocol):
    @property
    def ids(self) -> Sized: ...


Prompt = TypeVar("Prompt", bound=_Tokens)
Key = tuple[int, ...]
Draw = tuple[int, int, int]  # a step, the first position of the step, and a position of the run's order

CANDIDATES = 4  # longest clips, and longest texts, that are prepared to find the longest prompt


@dataclasses.dataclass(frozen=True)
class _Slot(Generic[Prompt]):
    """One prompt of a step, and the bad examples that it replaces, by their index."""

    example: Example
    prompt: Prompt
    key: Key
    bad: dict[int, BadExample]


class Loader(Generic[Prompt]):
    """Prepares this rank's prompts of any step; the next step is prepared ahead.

    The prompts of a step are a pure function of the examples, their files, the seed and the step: a resumed run, or a
    run on another number of ranks, gets the same prompts. A bad example raises DataError with its line. With
    `skip_bad`, or where the settings skip long clips, the next good example in file order replaces it, and `bad` lists
    it once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prepare: Callable[..., Prompt],
        *,
        seed: int,
        prompts_per_step: int,
        rank: int,
        world: int,
        template: str,
        shuffle_choices: bool,
        waveform: Callable[[Clip], np.ndarray],
        skip_bad: bool,
        workers: int,
        weights: Sequence[float] = (),
        curriculum: Curriculum = SHUFFLED,
        silent_share: float = 0.0,
        on_bad: Callable[[BadExample], None] = lambda bad: None,
    ) -> None:
        """`prepare(chat, *waveforms)` makes a prompt and may raise DataError; there is no waveform without audio.

        weights: the share of the prompts from each `part` of the examples; without it, every example is drawn equally
        often. curriculum: the order of the examples. silent_share: share of the prompts, 0 to 1, whose waveforms are
        set to zero; which ones is a pure function of (seed, step, example). on_bad: called once with each example that
        is skipped.
        """
        if not examples:
            raise DataError("no examples; expected at least one")
        find_template(template)
        self.examples = examples
        self.bad: list[BadExample] = []
        self._prepare, self._waveform = prepare, waveform
        self._seed, self._prompts_per_step, self._rank, self._world = seed, prompts_per_step, rank, world
        self._template, self._shuffle_choices, self._skip_bad = template, shuffle_choices, skip_bad
        self._silent_share, self._on_bad = silent_share, on_bad
        self._unchanged = Unchanged()
        self._weights = weights
        self._parts = parts_of(examples, len(weights)) if weights else [range(len(examples))]
        self._order = order_of(examples, seed=seed, weights=weights, curriculum=curriculum)
        self._positions(0)  # raises now if the prompts cannot be split over the ranks
        self._bad_indices: set[int] = set()
        self._ahead: dict[Draw, Future[_Slot[Prompt]]] = {}
        self._threads = helper_threads(workers, "loader")

    def step(self, step: int) -> list[tuple[Example, Prompt, Key]]:
        """This rank's (example, prompt, key) of a step, in order; steps may be asked for in any order.

        key: seeds the completions of this prompt (`order.completion_key`); it differs for all prompts of a step.
        """
        first, positions = self._positions(step)
        futures = self._submit(step, positions, first)
        self.prepare(step + 1)
        return self._results(futures)

    def at(self, step: int, positions: Sequence[int], *, since: int) -> list[tuple[Example, Prompt, Key]]:
        """The same for prompts at any positions of the run's order, drawn by a step that begins at position `since`.

        An example that the step has drawn before, at or after `since`, gets another key.
        """
        return self._results(self._submit(step, positions, since))

    def prepare(self, step: int) -> None:
        """Start to prepare a step, and cancel every other step that was started."""
        first, positions = self._positions(step)
        self.prepare_at(step, positions, since=first)

    def prepare_at(self, step: int, positions: Sequence[int], *, since: int) -> None:
        """Start to prepare what `at` is asked for next, and cancel all else that was started."""
        self._cancel()
        self._ahead = self._submit(step, positions, since)

    def share(self, positions: Sequence[int]) -> list[int]:
        """This rank's of some positions of the run's order, in their order; all ranks get equally many.

        See `order.dealt`. The lengths are those of the examples that are drawn there, not of what replaces a bad one:
        which ones are bad, a rank only knows of its own.
        """
        indices = [self._order(position) for position in positions]
        lengths = [expected_tokens(self.examples[index].seconds or 0.0, self._text_length(index)) for index in indices]
        return [positions[index] for index in dealt(lengths, self._world)[self._rank]]

    def longest(self) -> tuple[Example, Prompt]:
        """The example with the longest prompt, among those with the longest clips and those with the longest texts."""
        indices = range(len(self.examples))
        by_sound = sorted(indices, key=lambda index: -(self.examples[index].seconds or 0.0))[:CANDIDATES]
        by_text = sorted(indices, key=lambda index: -self._text_length(index))[:CANDIDATES]
        # A bad candidate is replaced as it would be in a step.
        slots = self._threads.map(lambda index: self._slot(index, 0, step=0), by_sound + by_text)
        slot = max(slots, key=lambda slot: len(slot.prompt.ids))
        return slot.example, slot.prompt

    def close(self) -> None:
        """Let the threads end, each after what it is preparing, without waiting: a disk that hangs may hold them.

        Call this at the end of a run, or use the loader in a `with` block.
        """
        self._cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Loader[Prompt]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text_length(self, index: int) -> int:
        return len(text_of(render(self.examples[index], self._template)))

    def _positions(self, step: int) -> tuple[int, list[int]]:
        """The first position of a step in the run's order, and the positions of this rank's prompts."""
        first = step * self._prompts_per_step
        return first, self.share(range(first, first + self._prompts_per_step))

    def _submit(self, step: int, positions: Sequence[int], since: int) -> dict[Draw, Future[_Slot[Prompt]]]:
        """The prompts at these positions: those that were started, and the others, which are started now."""
        indices = [self._order(position) for position in range(since, max(positions, default=since) + 1)]
        counts = occurrences(indices)
        futures = {}
        for position in positions:
            place, draw = position - since, (step, since, position)
            started = self._ahead.pop(draw, None)
            futures[draw] = started or self._threads.submit(self._slot, indices[place], counts[place], step=step)
        return futures

    def _results(self, futures: dict[Draw, Future[_Slot[Prompt]]]) -> list[tuple[Example, Prompt, Key]]:
        slots = [future.result() for future in futures.values()]
        for slot in slots:
            self._record(slot)
        return [(slot.example, slot.prompt, slot.key) for slot in slots]

    def _cancel(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead = {}

    def _record(self, slot: _Slot[Prompt]) -> None:
        """Add a slot's bad examples to the list. Called for results only, so that the threads never write to it."""
        for index, bad in slot.bad.items():
            if index not in self._bad_indices:
                self._bad_indices.add(index)
                self.bad.append(bad)
                self._on_bad(bad)

    def _slot(self, drawn: int, occurrence: int, *, step: int) -> _Slot[Prompt]:
        """The prompt of the first good example of the part at or after the index `drawn`; the search wraps round."""
        part = self._parts[self.examples[drawn].part if self._weights else 0]
        start = bisect_left(part, drawn)
        bad: dict[int, BadExample] = {}
        for offset in range(len(part)):
            index = part[(start + offset) % len(part)]
            if index in self._bad_indices:
                continue
            example = self.examples[index]
            replaced = None if index == drawn else self.examples[drawn].id
            key = completion_key(self._seed, step, example.id, occurrence=occurrence, replaced=replaced)
            try:
                return _Slot(*self._make(example, step), key, bad)
            except DataError as error:
                bad[index] = _skipped(example, error, self._skip_bad)
        first = next(iter([*bad.values(), *self.bad]))
        raise DataError(f"all {len(part)} examples are bad, one of them {first.line}: {first.reason}")

    def _make(self, example: Example, step: int) -> tuple[Example, Prompt]:
        if self._shuffle_choices:
            example = shuffle_choices(example, seed=self._seed, step=step)
        _check_unchanged(example, self._unchanged)
        waveforms = [self._waveform(clip) for clip in example.clips]
        if digest(f"{self._seed}/{step}/{example.id}") < self._silent_share * 2**64:
            waveforms = [np.zeros_like(waveform) for waveform in waveforms]
        return example, self._prepare(render(example, self._template), *waveforms)


def _check_unchanged(example: Example, unchanged: Unchanged) -> None:
    """AudioError if a clip has changed since it was checked, or had become bad before that but since the run began."""
    if example.fault:
        raise SkippedClipError(example.fault)  # the check has found that the settings skip it
    for clip, known in zip(example.clips, example.digests, strict=False):  # no digests: they were not checked
        unchanged.check(clip, known)


def _skipped(example: Example, error: DataError, skip_bad: bool) -> BadExample:
    """The record of an example that is left out; raises the error, with its line, where the settings do not skip it."""
    if not (skip_bad or isinstance(error, SkippedClipError)):
        raise type(error)(f"{example.line}: {error}") from error
    return BadExample(example.line, example.id, str(error))


def evaluation_batches(
    examples: Sequence[Example],
    prepare: Callable[..., Prompt],
    *,
    template: str,
    waveform: Callable[[Clip], np.ndarray],
    batch: int,
    workers: int,
    skip_bad: bool = False,
    on_bad: Callable[[BadExample], None] = lambda bad: None,
) -> Iterator[list[tuple[Example, Prompt]]]:
    """(example, prompt) pairs in file order, `batch` at a time; the next batch is prepared ahead.

    A bad example raises DataError with its line. With `skip_bad`, or where the settings skip long clips, it is left out
    and passed to `on_bad`; its batch is smaller then.
    """
    unchanged = Unchanged()

    def make(example: Example) -> tuple[Example, Prompt] | BadExample:
        try:
            _check_unchanged(example, unchanged)
            return example, prepare(render(example, template), *map(waveform, example.clips))
        except DataError as error:
            return _skipped(example, error, skip_bad)

    results = in_threads(make, examples, workers=workers, ahead=batch)
    while made := list(islice(results, batch)):
        for bad in (result for result in made if isinstance(result, BadExample)):
            on_bad(bad)
        good = [result for result in made if not isinstance(result, BadExample)]
        if good:
            yield good


class BadLog:
    """Writes skipped examples to a JSON-lines file: file ("train.jsonl:17"), id and reason. Each is written at once.

    An existing file is appended to, so neither a crash nor a resumed run loses or repeats a line. A rank does not
    read what other ranks add during the run: if two ranks skip the same example, it is listed twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Not splitlines, which also divides at characters that a text of JSON may hold, such as U+2028.
        *lines, torn = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        self._end = "\n" if torn else ""  # ends a line that a crash cut short, so that no other is joined to it
        self._seen = {key for key in map(_listed, lines) if key is not None}

    def add(self, bad: BadExample) -> None:
        """Write one example, unless it is listed already."""
        if (bad.line, bad.id) in self._seen:
            return
        self._seen.add((bad.line, bad.id))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A half of a surrogate pair, which UTF-8 cannot hold, becomes its escape in JSON.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(self._end + bad.json_line())
        self._end = ""


def _listed(line: bytes) -> tuple[str, str] | None:
    """File and id of a line of the log; None for one that a crash cut short, or that this log did not write."""
    try:
        record = json.loads(line)
        found = record["file"], record["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if all(isinstance(text, str) for text in found) else None
