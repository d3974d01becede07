"""What a recorded step may hold. A record may come from anywhere, so its values are checked when it is read.

Readers subscript a record freely: what they use is there, has the kind that a recorder writes, and agrees in its sizes.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

import torch

SUMS = (  # of an update: each rank has its term
    "loss", "kl", "clip_share", "entropy", "sampler_gap", "importance", "importance_capped_share", "sft_loss", "scored",
)  # fmt: skip
NUMBER, TEXTS, COUNTS = float | None, list[str], list[int]
VALUES: dict[str, Any] = {
    "step": int, "since": int | None, "ranks": int, "parts": COUNTS, "reason": str, "group_size": int,
    "reward_names": TEXTS, "stop_ids": COUNTS, "learning_rate": NUMBER, "beta": NUMBER, "config": dict[str, dict],
    "prompts": list[dict], "completions": list[dict], "updates": list[dict], "tokens": dict[str, str],
}  # fmt: skip
PROMPT: dict[str, Any] = {"row": dict, "key": COUNTS, "position": int, "text": str, "clips": list[dict]}
CLIP: dict[str, Any] = {"tokens": int}
MAYBE: dict[str, Any] = {  # of a prompt, a clip or an update, where it is given
    "answers": dict[str, dict], "start": float, "end": NUMBER,
    **dict.fromkeys(("line", "source", "sha256", "features"), str),
    "grad_norm": NUMBER, "grad_norms": dict[str, float | None], **dict.fromkeys(SUMS, NUMBER),
}  # fmt: skip
ROW: dict[str, Any] = {"id": str | int}
MAYBE_OF_A_ROW: dict[str, Any] = {
    "question_text": str, "answer": int | str | list[str] | None, "multi_choice": list[str],
    **dict.fromkeys(("dataset_name", "task", "category"), str),
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {  # of the configuration: what the arithmetic of a step needs
    "reward": {"weights": dict[str, float], "schedule": dict[str, dict[int, float]]},
    "loss": {
        "kind": str, "advantage": str, "bound": str, "kl_in": str, "kl_gradient": str, "clip_low": float,
        "clip_high": float, "ratio_cap": NUMBER, "importance_cap": float, "entropy": float,
    },
}  # fmt: skip
MOST = 1 << 31  # completions of a step

ROWS, TOKENS, UPDATES, LIKELIEST = "B", "BT", "BTU", "BTk"
SHAPES = {  # of the tensors: one letter for each dimension
    **dict.fromkeys(("reward", "advantages", "stopped"), ROWS),
    **dict.fromkeys(("tokens", "mask", "old_logprobs", "ref_logprobs", "scored_logprobs"), TOKENS),
    **dict.fromkeys(("weights", "token_advantages"), TOKENS),
    **dict.fromkeys(("logprobs", "entropy", "ratio", "clipped", "kl", "importance", "loss"), UPDATES),
    **dict.fromkeys(("likeliest_ids", "likeliest_logprobs"), LIKELIEST),
    "rewards": "BK", "prompt_ids": "P", "prompt_lengths": "N",
}  # fmt: skip
IDS = ("tokens", "likeliest_ids", "prompt_ids", "prompt_lengths")
TRUTHS = ("mask", "stopped", "clipped")


def wrong_part(values: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first part of a record that no recorder writes; None if all is right."""
    if not isinstance(values, dict):
        return "the whole"
    return next(_wrong(values, tensors), None)


def _wrong(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What is wrong, so that each check may rely on those before it."""
    yield from _others(values, VALUES, "")
    for name, kinds in SECTIONS.items():
        yield from _others(values["config"].get(name, {}), kinds, f"config.{name}.")
    for n, prompt in enumerate(values["prompts"]):
        yield from _wrong_prompt(prompt, f"prompts[{n}]")
    for n, completion in enumerate(values["completions"]):
        yield from _others(completion, {"text": str, "stopped": bool | None}, f"completions[{n}].")
    for n, update in enumerate(values["updates"]):
        yield from _given(update, f"updates[{n}].")
    yield from _wrong_sizes(values)
    yield from _wrong_tensors(values, tensors)


def _wrong_prompt(prompt: dict[str, Any], where: str) -> Iterator[str]:
    yield from _others(prompt, PROMPT, f"{where}.")
    yield from _given(prompt, f"{where}.")
    if "answers" in prompt and "line" not in prompt:
        yield f"{where}.line"
    yield from _others(prompt["row"], ROW, f"{where}.row.")
    yield from _given(prompt["row"], f"{where}.row.", MAYBE_OF_A_ROW)
    for n, clip in enumerate(prompt["clips"]):
        yield from _others(clip, CLIP, f"{where}.clips[{n}].")
        yield from _given(clip, f"{where}.clips[{n}].")
    for name, answer in prompt.get("answers", {}).items():
        yield from _others(answer, {"text": str}, f"{where}.answers.{name}.")


def _wrong_sizes(values: dict[str, Any]) -> Iterator[str]:
    rows, size = len(values["completions"]), values["group_size"]
    if not 0 < size < MOST or rows not in (0, size * len(values["prompts"])):  # 0: it ended before the rollout
        yield "group_size"
    if values["step"] < 1 or values["ranks"] < 1 or min(values["parts"], default=0) < 0:
        yield "step, ranks or parts"
    if len(values["config"]["reward"]["weights"]) < len(values["reward_names"]):
        yield "reward_names"


def _wrong_tensors(values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    lengths = {"B": len(values["completions"]), "N": len(values["prompts"]), "K": len(values["reward_names"])}
    for name, tensor in tensors.items():
        letters = SHAPES.get(name, "")
        if len(letters) != tensor.dim() or not _has_kind(name, tensor):
            yield f"the tensor {name}"
        if any(lengths.setdefault(letter, size) != size for letter, size in zip(letters, tensor.shape, strict=True)):
            yield f"the size of the tensor {name}"
    for pair in (("tokens", "mask"), ("prompt_ids", "prompt_lengths")):
        if len(tensors.keys() & pair) == 1:
            yield f"the tensor {pair[1]}"
    if int(tensors["prompt_lengths"].sum() if "prompt_lengths" in tensors else 0) != lengths.get("P", 0):
        yield "the tensor prompt_lengths"
    if "advantages" in tensors and values["beta"] is None:
        yield "beta"
    used = [tensors[name].flatten().long() for name in IDS[:2] if name in tensors]
    if used and not {str(id) for id in torch.cat(used).unique().tolist()} <= values["tokens"].keys():
        yield "tokens"


def _has_kind(name: str, tensor: torch.Tensor) -> bool:
    if name in IDS:
        return tensor.dtype in (torch.int64, torch.int32) and bool((tensor >= 0).all())
    return tensor.dtype is torch.bool if name in TRUTHS else tensor.is_floating_point()


def _others(values: dict[str, Any], kinds: Mapping[str, Any], where: str) -> Iterator[str]:
    """The values that are not of their kinds, or that are not there."""
    yield from (f"{where}{name}" for name, kind in kinds.items() if name not in values or not _is(values[name], kind))


def _given(values: dict[str, Any], where: str, kinds: Mapping[str, Any] = MAYBE) -> Iterator[str]:
    yield from _others(values, {name: kind for name, kind in kinds.items() if name in values}, where)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON may be written for a value of this type. Numbers are finite, a truth value is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_key(key, inner[0]) and _is(one, inner[1]) for key, one in value.items()
        )
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if kind in (None, type(None)) else kind is Any or type(value) is kind


def _is_key(key: str, kind: Callable[[str], Any]) -> bool:
    """Keys of JSON are texts, also those that are numbers."""
    return kind is not int or key.isdecimal() and len(key) < 10
