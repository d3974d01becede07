"""The rewards by name, and the checks of what a configuration says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from hark.data.errors import DataError, named
from hark.data.rewards.artefact import artefact
from hark.data.rewards.choice import accuracy, mmau
from hark.data.rewards.form import format, tags
from hark.data.rewards.group import Reward
from hark.data.rewards.judge import judge
from hark.data.rewards.length import cosine, length_median, soft_overlong
from hark.data.rewards.maths import math
from hark.data.rewards.thinking import consistency
from hark.data.rewards.transcript import cer, hallucination, keywords, rouge_l, wer
from hark.data.rewards.variety import diversity, repetition
from hark.from_file import from_file, is_in_file, short_name

# Some have options that must be given, so that they are no Reward without them.
REWARDS: dict[str, Callable[..., Sequence[float | None]]] = {
    "accuracy": accuracy,
    "format": format,
    "mmau": mmau,
    "math": math,
    "tags": tags,
    "wer": wer,
    "cer": cer,
    "hallucination": hallucination,
    "keywords": keywords,
    "length_median": length_median,
    "cosine": cosine,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "rouge_l": rouge_l,
    "consistency": consistency,
    "judge": judge,
    "diversity": diversity,
    "artefact": artefact,
}
FOREIGN = ("math", "judge", "artefact")  # run code that may not end, so always in a process of their own
SIGNATURE = "a function (group) -> one number or None for each completion of the hark.data.rewards.Group"


def find_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward of that name, or of `path/to/file.py:name`, with its options as keyword arguments.

    DataError for an unknown name, a function that does not take a group, and unknown or missing options.
    """
    reward = from_file(name) if is_in_file(name) else named(REWARDS, name, kind="reward")
    if isinstance(reward, type) or not callable(reward):
        what = "a class" if isinstance(reward, type) else f"of type {type(reward).__name__}"
        raise DataError(f"reward {name!r} is {what}; expected {SIGNATURE}")
    _check_signature(name, reward, options or {})
    return partial(reward, **options) if options else reward


def is_foreign(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a reward runs in a process of its own even without reward.workers: it may not end."""
    return is_in_file(name) or name in FOREIGN or (options or {}).get("by") in FOREIGN


def _check_signature(name: str, reward: Callable, options: Mapping[str, Any]) -> None:
    signature = inspect.signature(reward)
    parameters = list(signature.parameters.values())
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in taken[1:] if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if not taken or set(required) - options.keys():
        raise DataError(f"reward {name!r} has the signature {signature}; expected {SIGNATURE}, and options with names")
    known = [p.name for p in parameters if p is not taken[0] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            named(dict.fromkeys(known, ""), key, kind=f"option of reward {name!r}")
    for value in options.values():
        if isinstance(value, str) and is_in_file(value):
            from_file(value)
    missing = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in options
    ]
    if missing:
        raise DataError(
            f"reward {name!r} needs {', '.join(missing)}; set reward.options: {{{name}: {{{missing[0]}: ...}}}}"
        )


def check_rewards(
    names: Iterable[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    only_if: Mapping[str, str] | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> None:
    """Find every reward; DataError for two of one short name, and for settings of a reward that has no weight."""
    names, options = list(names), options or {}
    for what, others in (("options", options), ("only_if", only_if or {}), ("schedule", schedule or {})):
        for other in [*others, *(others.values() if what == "only_if" else ())]:
            if other not in names:
                raise DataError(f"reward.{what} names {other!r}, which has no weight; add it to reward.weights")
    shown: dict[str, str] = {}
    for name in names:
        find_reward(name, options.get(name))
        other = shown.setdefault(short_name(name), name)
        if other != name:
            raise DataError(f"rewards {other!r} and {name!r} would both be shown as {short_name(name)!r}; rename one")
    for name, other in (only_if or {}).items():
        if name == other or other in (only_if or {}):
            raise DataError(
                f"reward.only_if: {name!r} depends on {other!r}, which must be another, without a condition"
            )
