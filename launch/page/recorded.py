"""A recorded step as a part of the page: its questions, the completions of each, and every number of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hark.data.described import asked, example_of
from hark.data.examples import is_right
from hark.grpo.instruments.record import StepRecord
from hark.launch.page.numbers import rounded
from hark.launch.page.sounds import Sounds, clip_of

OF_TOKENS = ("weights", "old_logprobs", "ref_logprobs")  # (B, T)
OF_UPDATES = ("logprobs", "ratio", "clipped", "kl", "entropy", "loss")  # (B, T, U)
SHOWN_SECTIONS = ("loss", "reward")  # of the configuration: the arithmetic needs them


def step_part(record: StepRecord, sounds: Sounds, *, base: Path, groups: int) -> dict[str, Any]:
    """`groups` questions of a step, those with answers under the controls first; `base` as in `clip_of`."""
    values = record.values
    chosen = sorted(range(len(values["prompts"])), key=lambda n: not values["prompts"][n].get("answers"))
    shown = [_group(record, n, sounds, base) for n in chosen[:groups]]
    kept = (
        "step", "reason", "ranks", "parts", "group_size", "reward_names", "learning_rate", "beta", "updates",
        "versions",
    )  # fmt: skip
    return {
        **{name: values.get(name) for name in kept},
        "config": {name: values.get("config", {}).get(name, {}) for name in SHOWN_SECTIONS},
        "questions": len(values["prompts"]),
        "groups": shown,
        "texts": _texts(values.get("tokens", {}), shown),
    }


def _group(record: StepRecord, n: int, sounds: Sounds, base: Path) -> dict[str, Any]:
    prompt, size = record.values["prompts"][n], record.values["group_size"]
    rows = range(n * size, min((n + 1) * size, len(record.values["completions"])))
    return {
        **asked(prompt["row"]),
        "line": prompt.get("line", ""),
        "prompt": prompt.get("text", ""),
        "key": prompt.get("key", []),
        "clips": _clips(prompt, sounds, base),
        "answers": {name: _answer(prompt, answer) for name, answer in prompt.get("answers", {}).items()},
        "completions": [_completion(record, row) for row in rows],
    }


def _answer(prompt: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {"text": answer["text"], "right": is_right(example_of(prompt), answer["text"])}


def _clips(holder: dict[str, Any], sounds: Sounds, base: Path) -> list[dict[str, Any]]:
    clips = [clip for clip in holder.get("clips", []) if clip.get("source")]
    return [sounds.add(clip_of(clip, base), base) | {"tokens": clip.get("tokens")} for clip in clips]


def _completion(record: StepRecord, row: int) -> dict[str, Any]:
    """A completion; what the step did not come to compute is left out."""
    tensors = record.tensors
    length = int(tensors["mask"][row].sum()) if "mask" in tensors else 0
    result = dict(record.values["completions"][row])
    if "tokens" in tensors:
        result["tokens"] = tensors["tokens"][row, :length].tolist()
    for name, key in (("reward", "reward"), ("rewards", "rewards"), ("advantages", "advantage")):
        if name in tensors:
            result[key] = rounded(tensors[name][row].tolist())
    result |= {name: rounded(tensors[name][row, :length].tolist()) for name in OF_TOKENS if name in tensors}
    result |= {name: _by_update(tensors[name][row, :length]) for name in OF_UPDATES if name in tensors}
    if "likeliest_ids" in tensors:
        ids, logprobs = (tensors[f"likeliest_{name}"][row, :length].tolist() for name in ("ids", "logprobs"))
        result["likeliest"] = {"ids": ids, "logprobs": rounded(logprobs, digits=4)}
    return result


def _by_update(values: torch.Tensor) -> list[list[float]]:
    """(T, U) as U lists of T."""
    return rounded(values.transpose(0, 1).tolist())


def _texts(texts: dict[str, str], groups: list[dict[str, Any]]) -> dict[str, str]:
    """The texts of the tokens that the groups use."""
    used: set[int] = set()
    for completion in (completion for group in groups for completion in group["completions"]):
        used.update(completion.get("tokens", []))
        for ids in completion.get("likeliest", {}).get("ids", []):
            used.update(ids)
    return {str(id): texts[str(id)] for id in sorted(used) if str(id) in texts}
