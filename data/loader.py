"""Prompts of a step, prepared in threads while the step before runs.

Threads, not processes: decoding, resampling, log-mel and tokenising all run in C without the interpreter's lock,
nothing is pickled, and an exception arrives as it was raised.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from hark.data.audio import probe
from hark.data.errors import AudioError, DataError, SkippedClipError
from hark.data.examples import BadExample, Example
from hark.data.order import rank_slice, shuffle_choices, step_indices
from hark.data.prompts import find_template, render

Prompt = TypeVar("Prompt")

CANDIDATES = 4  # clips and texts that are tried for the longest prompt


@dataclasses.dataclass(frozen=True)
class _Slot(Generic[Prompt]):
    """One prompt of a step, and the examples that had to be passed over to get it, by position."""

    example: Example
    prompt: Prompt
    bad: dict[int, BadExample]


class Loader(Generic[Prompt]):
    """Prepares this rank's prompts of any step; the next step is prepared ahead.

    What a step holds is a pure function of the examples, their files, the seed and the step, so a run that is resumed,
    or that runs on another number of ranks, sees the same prompts. An example whose data is bad raises DataError
    naming its line; with `skip_bad`, or when the settings skip long clips, the next good example in file order takes
    its place and `bad` gains it once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prepare: Callable[[str, np.ndarray | None], Prompt],
        *,
        seed: int,
        prompts_per_step: int,
        rank: int,
        world: int,
        template: str,
        shuffle_choices: bool,
        waveform: Callable[[Example], np.ndarray],
        skip_bad: bool,
        workers: int,
        silent_share: float = 0.0,
        on_bad: Callable[[BadExample], None] = lambda bad: None,
    ) -> None:
        """`prepare(text, waveform)` makes a prompt, with None for an example without audio; it may raise DataError.

        silent_share: how many prompts, of 1, have their samples set to zero: what is then learnt is what to do when
        nothing is heard. on_bad: called with each example that is passed over, once.
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
        self._positions(0)  # refuses here what cannot be split over the ranks
        self._bad_positions: set[int] = set()
        self._ahead: dict[int, list[Future[_Slot[Prompt]]]] = {}
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="loader")

    def step(self, step: int) -> list[tuple[Example, Prompt, tuple[int, ...]]]:
        """This rank's examples of a step with their prompts and keys, in order; any step may be asked for."""
        futures = self._ahead.pop(step, None) or self._submit(step)
        self.prepare(step + 1)
        slots = [future.result() for future in futures]
        for slot in slots:
            self._record(slot)
        return [(slot.example, slot.prompt, self.key(step, slot.example)) for slot in slots]

    def prepare(self, step: int) -> None:
        """Begin to prepare a step, instead of any other that is not asked for yet."""
        self._cancel()
        self._ahead = {step: self._submit(step)}

    def key(self, step: int, example: Example) -> tuple[int, ...]:
        """What the draws for an example in a step are a function of: (seed, step, example) as integers."""
        return self._seed, step, _digest(example.id)

    def longest(self) -> tuple[Example, Prompt]:
        """The example with the longest prompt, among those with the longest clips and the longest texts."""
        places = range(len(self.examples))
        by_sound = sorted(places, key=lambda place: -(self.examples[place].seconds or 0.0))[:CANDIDATES]
        by_text = sorted(places, key=lambda place: -len(render(self.examples[place], self._template)))[:CANDIDATES]
        # One that cannot be used gives way to the next, as it would in a step.
        slots = self._threads.map(lambda place: self._slot(place, 0), by_sound + by_text)
        slot = max(slots, key=lambda slot: len(slot.prompt.ids))
        return slot.example, slot.prompt

    def close(self) -> None:
        """Stop preparing; to be called at the end of a run, also by leaving a `with` block."""
        self._cancel()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> "Loader[Prompt]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self, step: int) -> list[int]:
        indices = step_indices(len(self.examples), seed=self._seed, step=step, prompts_per_step=self._prompts_per_step)
        return rank_slice(indices, self._rank, self._world)

    def _submit(self, step: int) -> list[Future[_Slot[Prompt]]]:
        return [self._threads.submit(self._slot, position, step) for position in self._positions(step)]

    def _cancel(self) -> None:
        for futures in self._ahead.values():
            for future in futures:
                future.cancel()
        self._ahead = {}

    def _record(self, slot: _Slot[Prompt]) -> None:
        """Only `step` calls this, so that no thread writes what another reads."""
        for position, bad in slot.bad.items():
            if position not in self._bad_positions:
                self._bad_positions.add(position)
                self.bad.append(bad)
                self._on_bad(bad)

    def _slot(self, start: int, step: int) -> _Slot[Prompt]:
        """The prompt of the first good example at or after `start`, past the end to the beginning."""
        count, bad = len(self.examples), {}
        for offset in range(count):
            position = (start + offset) % count
            if position in self._bad_positions:
                continue
            example = self.examples[position]
            try:
                return _Slot(*self._make(example, step), bad)
            except DataError as error:
                if not (self._skip_bad or isinstance(error, SkippedClipError)):
                    raise type(error)(f"{example.line}: {error}") from error
                bad[position] = BadExample(example.line, example.id, str(error))
        first = next(iter([*bad.values(), *self.bad]))
        raise DataError(f"all {count} examples are bad, one of them {first.line}: {first.reason}")

    def _make(self, example: Example, step: int) -> tuple[Example, Prompt]:
        if self._shuffle_choices:
            example = shuffle_choices(example, seed=self._seed, step=step)
        waveform = None if example.audio_path is None else self._waveform(example)
        if waveform is not None and _digest(f"{self._seed}/{step}/{example.id}") < self._silent_share * 2**64:
            waveform = np.zeros_like(waveform)
        return example, self._prepare(render(example, self._template), waveform)


def _digest(text: str) -> int:
    """A stable hash of 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def evaluation_batches(
    examples: Sequence[Example],
    prepare: Callable[[str, np.ndarray | None], Prompt],
    *,
    template: str,
    waveform: Callable[[Example], np.ndarray],
    batch: int,
    workers: int,
    skip_bad: bool = False,
    on_bad: Callable[[BadExample], None] = lambda bad: None,
) -> Iterator[list[tuple[Example, Prompt]]]:
    """Examples in order with their prompts, `batch` at a time; the next batch is prepared ahead.

    Raises DataError naming the line of an example that cannot be used; with `skip_bad`, or when the settings skip long
    clips, it is left out and given to `on_bad` instead.
    """

    def make(example: Example) -> tuple[Example, Prompt] | BadExample:
        try:
            sound = None if example.audio_path is None else waveform(example)
            return example, prepare(render(example, template), sound)
        except DataError as error:
            if not (skip_bad or isinstance(error, SkippedClipError)):
                raise type(error)(f"{example.line}: {error}") from error
            return BadExample(example.line, example.id, str(error))

    with ThreadPoolExecutor(workers, thread_name_prefix="evaluation") as threads:
        ahead: list[Future[tuple[Example, Prompt] | BadExample]] = []
        for first in range(0, len(examples) + batch, batch):
            ready, ahead = ahead, [threads.submit(make, example) for example in examples[first : first + batch]]
            results = [future.result() for future in ready]
            for bad in (result for result in results if isinstance(result, BadExample)):
                on_bad(bad)
            good = [result for result in results if not isinstance(result, BadExample)]
            if good:
                yield good


def check_audio(
    examples: Sequence[Example], *, max_seconds: float, long_clips: str, skip_bad: bool, workers: int
) -> tuple[list[Example], list[BadExample]]:
    """Probe every clip's header before a run starts; gives the examples that passed and those that did not.

    The former know the `seconds` of their clips then.

    Without `skip_bad`, raises AudioError with the number of bad clips and the first of them; clips that the settings
    skip for their length are left out either way. No good example at all is always an error.
    """

    def checked(example: Example) -> Example | AudioError:
        if example.audio_path is None:
            return example
        try:
            seconds = probe(example.audio_path, max_seconds=max_seconds, long_clips=long_clips)
        except AudioError as error:
            return error
        return dataclasses.replace(example, seconds=seconds)

    with ThreadPoolExecutor(workers) as threads:
        results = list(threads.map(checked, examples))
    good = [result for result in results if isinstance(result, Example)]
    bad = [pair for pair in zip(examples, results, strict=True) if isinstance(pair[1], AudioError)]
    fatal = [pair for pair in bad if not (skip_bad or isinstance(pair[1], SkippedClipError))]
    if fatal or not good:
        named = [f"\n  {example.line}: {error}" for example, error in (fatal or bad)[:5]]
        raise AudioError(f"{len(fatal or bad)} of {len(examples)} clips cannot be used, first:{''.join(named)}")
    return good, [BadExample(example.line, example.id, str(error)) for example, error in bad]


class BadLog:
    """Skipped examples as JSON lines with the keys file ("train.jsonl:17"), id and reason, each written at once.

    A file that is there is continued, so neither a crash nor a resumed run loses or repeats a line. Ranks do not see
    what the others add while they run: two that meet the same bad example each write it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self._seen = {(record["file"], record["id"]) for record in map(json.loads, lines)}

    def add(self, bad: BadExample) -> None:
        """Write one example, unless it stands there already."""
        if (bad.line, bad.id) in self._seen:
            return
        self._seen.add((bad.line, bad.id))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(bad.json_line())
