"""The figures of a file of questions: lengths and formats of its decoded clips, faults, answers and baselines."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from hark.data.audio import Header, load_waveform, read_header
from hark.data.benchmarks.baselines import baseline_figures
from hark.data.errors import AudioError, MissingClipError, SilentClipError, SkippedClipError
from hark.data.examples import BadExample, Example
from hark.data.parallel import in_threads

SAMPLE_RATE = 16_000  # Hz, of all supported models
LENGTHS = (1, 2, 5, 10, 20, 30, 60, 120, 300)  # seconds, upper ends of the histogram's bins
# The name of each fault by its error; subclasses come before their base class.
FAULTS: dict[type[AudioError], str] = {
    MissingClipError: "missing",
    SilentClipError: "silent",
    SkippedClipError: "over-long",
    AudioError: "broken",
}


@dataclass(frozen=True)
class Clip:
    """The header and the length of one clip, and its fault if it cannot be used."""

    header: Header | None  # None where the file cannot be opened
    seconds: float | None  # of the decoded samples; for a silent or over-long clip, of the header; None if unknown
    fault: str = ""  # one of FAULTS' values, or ""
    reason: str = ""


def inspect(example: Example, *, max_seconds: float) -> Clip:
    """Decode the clip of an example, as training would."""
    header, path = None, example.audio_path
    assert path is not None
    try:
        header = read_header(path)
        waveform = load_waveform(path, sample_rate=SAMPLE_RATE, max_seconds=max_seconds, long_clips="skip")
    except AudioError as error:
        fault = next(name for kind, name in FAULTS.items() if isinstance(error, kind))
        seconds = header.seconds if header and fault in ("silent", "over-long") else None
        return Clip(header, seconds, fault, str(error))
    return Clip(header, len(waveform) / SAMPLE_RATE)


def inspect_all(examples: Sequence[Example], *, max_seconds: float, workers: int) -> list[Clip]:
    """The clip of each example, in order; a clip that several questions share is decoded once."""
    first = {example.audio_path: example for example in reversed(examples)}
    clips = in_threads(lambda example: inspect(example, max_seconds=max_seconds), first.values(), workers=workers)
    found = dict(zip(first, clips, strict=True))
    return [found[example.audio_path] for example in examples]


def survey(examples: Sequence[Example], bad: Sequence[BadExample], clips: Sequence[Clip]) -> dict:
    """All figures of a file as plain values for JSON; a clip that several questions share is counted once."""
    unique = list({example.audio_path: clip for example, clip in zip(examples, clips, strict=True)}.values())
    known = [example.answer for example in examples if example.answer is not None]
    return {
        "questions": len(examples),
        "clips": len(unique),
        "datasets": _counted(example.dataset for example in examples),
        "tasks": _counted(example.task for example in examples),
        **_lengths([clip.seconds for clip in unique if clip.seconds is not None]),
        "sample_rates": _counted(clip.header.sample_rate for clip in unique if clip.header),
        "channels": _counted(clip.header.channels for clip in unique if clip.header),
        "choices": _counted((len(example.choices) for example in examples), ordered=True),
        "answers": _counted((answer + 1 for answer in known), ordered=True),
        "unanswered": len(examples) - len(known),
        **baseline_figures(examples),
        "faults": {"bad line": [line.record() for line in bad], **_faults(examples, clips)},
    }


def _lengths(seconds: list[float]) -> dict:
    if not seconds:
        return {"seconds": None, "lengths": {}}
    figures = {"min": min(seconds), "median": median(seconds), "mean": fmean(seconds), "max": max(seconds)}
    bins = Counter(next((end for end in LENGTHS if length <= end), None) for length in seconds)
    named = {f"up to {end} s": bins[end] for end in LENGTHS if bins[end]}
    longer = {f"over {LENGTHS[-1]} s": bins[None]} if bins[None] else {}
    return {"seconds": figures | {"total": sum(seconds)}, "lengths": named | longer}


def _faults(examples: Sequence[Example], clips: Sequence[Clip]) -> dict[str, list[dict]]:
    """The questions whose clips cannot be used, by fault."""
    faults: dict[str, list[dict]] = {name: [] for name in FAULTS.values()}
    for example, clip in zip(examples, clips, strict=True):
        if clip.fault:
            faults[clip.fault].append(BadExample(example.line, example.id, clip.reason).record())
    return faults


def _counted(values: Iterable[Hashable], *, ordered: bool = False) -> dict[str, int]:
    """How often each value occurs, the most frequent first, or in the order of the values."""
    counts = Counter(values)
    pairs = sorted(counts.items()) if ordered else counts.most_common()
    return {str(key): count for key, count in pairs}
