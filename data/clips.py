"""What decoding found in the clips of examples, and which examples can therefore be used."""

import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

from hark.data.audio import waveform_of
from hark.data.clip import Cell, Clip, Held
from hark.data.clip_memory import ClipMemory, State, state_of
from hark.data.decoding import RATES, Attempt, Header, attempt, seconds_of
from hark.data.errors import (
    AudioError,
    CutClipError,
    DataError,
    DecoderError,
    MissingClipError,
    SilentClipError,
    SkippedClipError,
)
from hark.data.examples import BadExample, Example
from hark.data.parallel import in_threads
from hark.data.worker import Worker, WorkerError

VERSION = 2  # of what is decoded and refused; a higher number makes the memory forget what earlier versions found
MOST_SECONDS = 120.0  # to decode one clip, also from within an ogg file of hours, on a busy machine
MEMORY = 1 << 30  # bytes to decode one clip, beyond those of its samples
COPIES = 4  # of the samples, of 4 bytes each, while they are decoded and sent
SAVED = 2.0  # seconds between two additions to the memory, so that an interrupted check loses little
# The name of each fault by its error; subclasses come before their base class.
FAULTS: dict[type[AudioError], str] = {
    MissingClipError: "missing",
    SilentClipError: "silent",
    SkippedClipError: "over-long",
    CutClipError: "cut off",
    DecoderError: "not decodable",
    AudioError: "broken",
}


@dataclass(frozen=True)
class Rules:
    """What is decoded of a clip. crop: a longer clip is cut to `max_seconds`; otherwise it cannot be used."""

    sample_rate: int
    max_seconds: float
    crop: bool = False


@dataclass(frozen=True)
class Finding:
    """The header and the length of one clip, and its fault if it cannot be used."""

    header: Header | None  # None where the file cannot be opened
    seconds: float | None  # of the decoded samples; for a silent or over-long clip, by the header; None if unknown
    fault: str = ""  # one of FAULTS' values, or ""
    reason: str = ""  # the message of its error, without the clip
    digest: str = ""  # of the file's content, which tells whether two cells hold the same; "" where it cannot be read

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(dataclasses.replace(self, digest="")))

    @staticmethod
    def from_json(text: str) -> "Finding":
        fields = json.loads(text)
        return Finding(**fields | {"header": fields["header"] and Header(**fields["header"])})


def inspect(clip: Clip, rules: Rules, attempt: Callable[..., Attempt] = attempt) -> Finding:
    """Decode a clip, as training would. attempt: reads its file, here or in another process."""
    header = None
    try:
        long_clips = "crop" if rules.crop else "skip"
        header, samples = attempt(held(clip), rules.sample_rate, rules.max_seconds, long_clips)
        if isinstance(samples, AudioError):
            raise samples
        waveform = waveform_of(clip, samples, rules.sample_rate)
    except AudioError as error:
        fault = next(name for kind, name in FAULTS.items() if isinstance(error, kind))
        seconds = seconds_of(clip, header) if header and fault in ("silent", "over-long") else None
        return Finding(header, seconds, fault, str(error).removeprefix(f"{clip}: ").removeprefix(f"{clip.source}: "))
    return Finding(header, len(waveform) / rules.sample_rate)


def held(clip: Clip) -> Clip:
    """The clip, with the content of its cell if it is in a table."""
    source = clip.source
    return clip if isinstance(source, Path) else dataclasses.replace(clip, source=Held(str(source), source.read()))


class Decoders:
    """Processes that read the files of clips: what a damaged file does to its decoder ends only such a process."""

    def __init__(self, count: int, rules: Rules):
        size = MEMORY + 4 * COPIES * math.ceil(rules.max_seconds * RATES[1])
        self._gigabytes = size / 2**30
        self._workers: LifoQueue[Worker] = LifoQueue()  # so that few clips start few processes
        for _ in range(count):
            self._workers.put(Worker(attempt.__module__, memory=size))

    def attempt(self, clip: Clip, *rest: Any) -> Attempt:
        """The same in a process; DecoderError if that ends, or takes too much time or memory."""
        worker = self._workers.get()
        try:
            return worker.call(attempt, clip, *rest, timeout=MOST_SECONDS)
        except WorkerError as error:
            failure = str(error)
        except MemoryError:
            failure = f"needed more than {self._gigabytes:.1f} GiB"
        finally:
            self._workers.put(worker)
        raise DecoderError(
            f"{clip}: cannot be decoded: its process {failure}; remove the example or encode the clip again"
        )

    def close(self) -> None:
        """End the processes."""
        while not self._workers.empty():
            self._workers.get().close()


def inspect_all(
    clips: Iterable[Clip], rules: Rules, *, workers: int, memory: ClipMemory
) -> Iterator[tuple[Clip, Finding]]:
    """Each clip with what was found, in order; only clips that the memory does not know as they are now are decoded.

    They are decoded by `workers` processes.
    """
    clips = list(clips)
    known = memory.recall(clip.key for clip in clips)
    states, decoders = _States(), Decoders(workers, rules)

    def look(clip: Clip) -> tuple[State | None, Finding]:
        before, text = known.get(clip.key, (None, ""))
        try:
            state = states.of(clip.source, before)
        except (OSError, DataError):  # decoding says what is wrong with it
            return None, inspect(clip, rules, decoders.attempt)
        same = before and before.digest == state.digest
        finding = Finding.from_json(text) if same else inspect(clip, rules, decoders.attempt)
        return state, dataclasses.replace(finding, digest=state.digest)

    new, saved = {}, time.monotonic()
    with closing(decoders):
        for clip, (state, finding) in zip(clips, in_threads(look, clips, workers=workers), strict=True):
            # A process may also have failed for want of time or memory on a busy machine: that is tried again.
            if state and finding.fault != FAULTS[DecoderError] and known.get(clip.key, (None, ""))[0] != state:
                new[clip.key] = state, finding.to_json()
            if new and time.monotonic() - saved > SAVED:
                memory.remember(new)
                new, saved = {}, time.monotonic()
            yield clip, finding
    memory.remember(new)


class Unchanged:
    """Compares clips with what they were when they were checked. A file is read again only if its time has changed."""

    def __init__(self) -> None:
        self._known: dict[Path | Cell, State] = {}

    def check(self, clip: Clip, digest: str) -> None:
        """AudioError if the content of the clip has not this digest; "" is that of a clip that was not checked."""
        if not digest or isinstance(clip.source, Path) and not clip.source.is_file():
            return  # decoding says what is wrong with a file that vanished
        try:
            state = self._known[clip.source] = state_of(clip.source, self._known.get(clip.source))
        except OSError as error:
            raise AudioError(f"{clip}: cannot be read ({error.strerror or error}); expected a clip") from error
        if state.digest != digest:
            raise AudioError(f"{clip}: has changed since it was checked at the start of the run; start the run again")


class _States:
    """The state of each file, which is read once for all of its windows."""

    def __init__(self) -> None:
        self._locks: defaultdict[Path | Cell, Lock] = defaultdict(Lock)
        self._known: dict[Path | Cell, State] = {}

    def of(self, source: Path | Cell, before: State | None) -> State:
        if isinstance(source, Path) and not source.is_file():
            raise DataError(f"{source}: no such file")
        with self._locks[source]:
            if source not in self._known:
                self._known[source] = state_of(source, before)
            return self._known[source]


def memory_of(rules: Rules) -> ClipMemory:
    """The user's memory of clips that were decoded by these rules."""
    return ClipMemory(f"{VERSION} {rules.sample_rate} {rules.max_seconds} {'crop' if rules.crop else 'whole'}")


def clips_in(examples: Iterable[Example]) -> list[Clip]:
    """The clips of the examples, each once, in order."""
    return list(dict.fromkeys(clip for example in examples for clip in example.clips))


def usable(
    examples: Sequence[Example],
    found: Mapping[Clip, Finding],
    *,
    long_clips: str,
    skip_bad: bool,
    left_out: Collection[str] | None = None,
) -> tuple[list[Example], list[BadExample]]:
    """The examples whose clips can be used, with `seconds` filled in, and the others.

    Without `skip_bad`, an unusable clip raises AudioError with the number of such examples and the first five. Clips
    that `long_clips` skips for their length are left out either way. If no example is good, that is an AudioError.

    left_out: the ids of the examples that a resumed run left out when it began. These are left out again, no
    others, so that the order of the examples stays the same: one that is bad only now keeps its place, with a fault.
    """
    good, bad, fatal = [], [], []
    before = None if left_out is None else set(left_out)
    for example in examples:
        findings = {clip: found[clip] for clip in example.clips}
        fault = next((clip for clip, finding in findings.items() if finding.fault), None)
        reason = "" if fault is None else f"{fault}: {findings[fault].reason}"
        is_left_out = fault is not None if before is None else example.id in before
        if is_left_out:
            bad.append(BadExample(example.line, example.id, reason or "was left out when the run began"))
        else:
            lengths = [findings[clip].seconds or 0.0 for clip in example.clips]
            digests = tuple(findings[clip].digest for clip in example.clips)
            seconds = sum(lengths) if lengths else None
            good.append(dataclasses.replace(example, seconds=seconds, digests=digests, fault=reason))
        if fault and not (skip_bad or findings[fault].fault == "over-long" and long_clips == "skip"):
            fatal.append(BadExample(example.line, example.id, reason))
    if fatal or not good:
        named = [f"\n  {one.line}: {one.reason}" for one in (fatal or bad)[:5]]
        hint = "; data.skip_bad=true leaves them out" if fatal else ""
        raise AudioError(f"{len(fatal or bad)} of {len(examples)} clips cannot be used{hint}; first:{''.join(named)}")
    return good, bad
