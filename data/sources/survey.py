"""The figures of a file of questions: lengths and formats of its decoded clips, faults, answers and baselines."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean, median

from hark.data.benchmarks.baselines import baseline_figures
from hark.data.clip import Clip
from hark.data.clips import FAULTS, Finding, clips_in
from hark.data.examples import BadExample, Example

LENGTHS = (1, 2, 5, 10, 20, 30, 60, 120, 300)  # seconds, upper ends of the histogram's bins


def survey(examples: Sequence[Example], bad: Sequence[BadExample], found: Mapping[Clip, Finding]) -> dict:
    """All figures of a file as plain values for JSON; a clip that several questions share is counted once.

    found: what decoding found in each clip of the examples.
    """
    unique = [found[clip] for clip in clips_in(examples)]
    known = [example.answer for example in examples if example.answer is not None]
    return {
        "questions": len(examples),
        "clips": len(unique),
        "datasets": _counted(example.dataset for example in examples),
        "tasks": _counted(example.task for example in examples),
        **_lengths([clip.seconds for clip in unique if clip.seconds is not None]),
        "sample_rates": _counted(clip.header.sample_rate for clip in unique if clip.header),
        "channels": _counted(clip.header.channels for clip in unique if clip.header),
        "choices": _counted((len(example.choices) for example in examples if example.choices), ordered=True),
        "open": sum(not example.choices for example in examples),
        "answers": _counted((answer + 1 for answer in known), ordered=True),
        "unanswered": sum(not example.has_answer for example in examples),
        "extra": _counted(key for example in examples for key in example.extra),
        **baseline_figures(examples),
        "faults": {"bad line": [line.record() for line in bad], **_faults(examples, found)},
    }


def _lengths(seconds: list[float]) -> dict:
    if not seconds:
        return {"seconds": None, "lengths": {}}
    figures = {"min": min(seconds), "median": median(seconds), "mean": fmean(seconds), "max": max(seconds)}
    bins = Counter(next((end for end in LENGTHS if length <= end), None) for length in seconds)
    named = {f"up to {end} s": bins[end] for end in LENGTHS if bins[end]}
    longer = {f"over {LENGTHS[-1]} s": bins[None]} if bins[None] else {}
    return {"seconds": figures | {"total": sum(seconds)}, "lengths": named | longer}


def _faults(examples: Sequence[Example], found: Mapping[Clip, Finding]) -> dict[str, list[dict]]:
    """The questions whose clips cannot be used, by fault."""
    faults: dict[str, list[dict]] = {name: [] for name in FAULTS.values()}
    for example in examples:
        for clip in example.clips:
            if found[clip].fault:
                bad = BadExample(example.line, example.id, f"{clip}: {found[clip].reason}")
                faults[found[clip].fault].append(bad.record())
    return faults


def _counted(values: Iterable[Hashable], *, ordered: bool = False) -> dict[str, int]:
    """How often each value occurs, the most frequent first, or in the order of the values."""
    counts = Counter(values)
    pairs = sorted(counts.items()) if ordered else counts.most_common()
    return {str(key): count for key, count in pairs}
