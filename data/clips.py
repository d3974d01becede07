"""What decoding found in the clips of examples, and which examples can therefore be used."""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hark.data.audio import Header, load_waveform, read_header
from hark.data.clip_memory import ClipMemory, State, state_of
from hark.data.errors import AudioError, CutClipError, MissingClipError, SilentClipError, SkippedClipError
from hark.data.examples import BadExample, Example
from hark.data.parallel import in_threads

VERSION = 1  # of what is decoded and refused; a higher number makes the memory forget what earlier versions found
SAVED = 2.0  # seconds between two additions to the memory, so that an interrupted check loses little
# The name of each fault by its error; subclasses come before their base class.
FAULTS: dict[type[AudioError], str] = {
    MissingClipError: "missing",
    SilentClipError: "silent",
    SkippedClipError: "over-long",
    CutClipError: "cut off",
    AudioError: "broken",
}


@dataclass(frozen=True)
class Rules:
    """What is decoded of a clip. crop: a longer clip is cut to `max_seconds`; otherwise it cannot be used."""

    sample_rate: int
    max_seconds: float
    crop: bool = False


@dataclass(frozen=True)
class Clip:
    """The header and the length of one clip, and its fault if it cannot be used."""

    header: Header | None  # None where the file cannot be opened
    seconds: float | None  # of the decoded samples; for a silent or over-long clip, of the header; None if unknown
    fault: str = ""  # one of FAULTS' values, or ""
    reason: str = ""  # the message of its error, without the path

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Clip":
        fields = json.loads(text)
        return Clip(**fields | {"header": fields["header"] and Header(**fields["header"])})


def inspect(path: Path, rules: Rules) -> Clip:
    """Decode a clip, as training would."""
    header = None
    try:
        header = read_header(path)
        waveform = load_waveform(
            path,
            sample_rate=rules.sample_rate,
            max_seconds=rules.max_seconds,
            long_clips="crop" if rules.crop else "skip",
        )
    except AudioError as error:
        fault = next(name for kind, name in FAULTS.items() if isinstance(error, kind))
        seconds = header.seconds if header and fault in ("silent", "over-long") else None
        return Clip(header, seconds, fault, str(error).removeprefix(f"{path}: "))
    return Clip(header, len(waveform) / rules.sample_rate)


def inspect_all(
    paths: Iterable[Path], rules: Rules, *, workers: int, memory: ClipMemory
) -> Iterator[tuple[Path, Clip]]:
    """Each path with its clip, in order; only files that the memory does not know as they are now are decoded."""
    paths = list(paths)
    known = memory.recall(paths)

    def look(path: Path) -> tuple[State | None, Clip]:
        before, text = known.get(path, (None, ""))
        try:
            state = state_of(path, before) if path.is_file() else None
        except OSError:
            state = None
        if state is None:  # decoding says what is wrong with it
            return None, inspect(path, rules)
        same = before and (before.size, before.digest) == (state.size, state.digest)
        return state, Clip.from_json(text) if same else inspect(path, rules)

    new, saved = {}, time.monotonic()
    for path, (state, clip) in zip(paths, in_threads(look, paths, workers=workers), strict=True):
        if state and known.get(path, (None, ""))[0] != state:
            new[path] = state, clip.to_json()
        if new and time.monotonic() - saved > SAVED:
            memory.remember(new)
            new, saved = {}, time.monotonic()
        yield path, clip
    memory.remember(new)


def memory_of(rules: Rules) -> ClipMemory:
    """The user's memory of clips that were decoded by these rules."""
    return ClipMemory(f"{VERSION} {rules.sample_rate} {rules.max_seconds} {'crop' if rules.crop else 'whole'}")


def usable(
    examples: Sequence[Example], clips: dict[Path, Clip], *, long_clips: str, skip_bad: bool
) -> tuple[list[Example], list[BadExample]]:
    """The examples whose clips can be used, with `seconds` filled in, and the others.

    Without `skip_bad`, an unusable clip raises AudioError with the number of such examples and the first five. Clips
    that `long_clips` skips for their length are left out either way. If no example is good, that is an AudioError.
    """
    good, bad, fatal = [], [], []
    for example in examples:
        clip = None if example.audio_path is None else clips[example.audio_path]
        if clip is None or not clip.fault:
            good.append(dataclasses.replace(example, seconds=clip.seconds if clip else None))
            continue
        bad.append(BadExample(example.line, example.id, f"{example.audio_path}: {clip.reason}"))
        if not (skip_bad or clip.fault == "over-long" and long_clips == "skip"):
            fatal.append(bad[-1])
    if fatal or not good:
        named = [f"\n  {one.line}: {one.reason}" for one in (fatal or bad)[:5]]
        hint = "; data.skip_bad=true leaves them out" if fatal else ""
        raise AudioError(f"{len(fatal or bad)} of {len(examples)} clips cannot be used{hint}; first:{''.join(named)}")
    return good, bad
