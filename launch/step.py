"""Print a recorded step: its questions and completions, or the arithmetic of one completion's loss.

    python launch/step.py RUN STEP                                    all groups, the best and the worst of each
    python launch/step.py RUN STEP --question ID                      all completions of one question
    python launch/step.py RUN STEP --question ID --completion 3 --show loss
    python launch/step.py RUN STEP --show likeliest                   the likeliest tokens at each place

RUN is the run.directory of a training run with record.every above 0. Without --question, the first question whose
completions differ in their rewards is shown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hark.data.described import asked
from hark.from_file import is_in_file
from hark.grpo.advantage import EPSILON
from hark.grpo.config import ConfigError
from hark.grpo.instruments.console import excerpt
from hark.grpo.instruments.record import RecordError, StepRecord, read_step
from hark.grpo.rewards import weights_at
from hark.launch.common.entry import run
from hark.shown import say

WIDTH = 60  # characters of a text in a table


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    record = read_step(arguments.run, arguments.step)
    if arguments.show is None and arguments.question is None:
        lines = overview(record)
    else:
        prompt = find_prompt(record, arguments.question)
        row = prompt * record.values["group_size"] + find_completion(record, arguments.completion)
        lines = {None: group, "loss": arithmetic, "likeliest": likeliest}[arguments.show](record, row)
    for line in lines:
        say(line)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("step", type=int, metavar="STEP")
    parser.add_argument("--question", metavar="ID", help="the id of a question of the step")
    parser.add_argument("--completion", type=int, default=0, metavar="G", help="its number in the group, from 0")
    parser.add_argument("--show", choices=("loss", "likeliest"), help="the arithmetic of the loss, or likeliest tokens")
    return parser.parse_args(argv)


def find_prompt(record: StepRecord, name: str | None) -> int:
    """The index of a question, or of the first whose advantages are not all 0."""
    names = [prompt["row"]["id"] for prompt in record.values["prompts"]]
    if name is None:
        size = record.values["group_size"]
        uneven = record.tensors["advantages"].unflatten(0, (-1, size)).ne(0).any(dim=1) if _is_judged(record) else []
        return next((n for n, differs in enumerate(uneven) if differs), 0)
    if name not in names:
        raise ConfigError(f"--question {name}: step {record.step} has {', '.join(names)}")
    return names.index(name)


def find_completion(record: StepRecord, number: int) -> int:
    size = record.values["group_size"]
    if not 0 <= number < size:
        raise ConfigError(f"--completion {number}: expected 0 to {size - 1}, the completions of a group")
    return number


def overview(record: StepRecord) -> Iterator[str]:
    """Two lines for each question: its best and its worst completion."""
    values, size = record.values, record.values["group_size"]
    yield f"step {record.step}, {values['reason']}; {len(values['prompts'])} questions, {size} completions each"
    for update in values["updates"]:
        yield "  " + ", ".join(f"{name} {number:.6g}" for name, number in update.items() if isinstance(number, float))
    for n, prompt in enumerate(values["prompts"]):
        yield question(prompt)
        rows = list(range(n * size, (n + 1) * size))
        if _is_judged(record):
            rows.sort(key=lambda b: -float(record.tensors["reward"][b]))
        yield from (completion(record, b) for b in dict.fromkeys((rows[0], rows[-1])))


def group(record: StepRecord, row: int) -> Iterator[str]:
    """All completions of the question of a row, and its answers under the controls."""
    size = record.values["group_size"]
    prompt = record.values["prompts"][row // size]
    yield question(prompt)
    yield f"  {excerpt(prompt['text'], 4 * WIDTH)}"
    yield from (f"  clip {clip.get('source', '')}, {clip['tokens']} tokens" for clip in prompt["clips"])
    yield from (completion(record, b) for b in range(row // size * size, (row // size + 1) * size))
    for name, answer in prompt.get("answers", {}).items():
        yield f"  {name:18}{excerpt(answer['text'], WIDTH)}"


def question(prompt: dict) -> str:
    said = asked(prompt["row"])
    return f"{said['id']}: {excerpt(said['question'], 2 * WIDTH)} [{excerpt(', '.join(said['accepted']), WIDTH)}]"


def completion(record: StepRecord, row: int) -> str:
    text = excerpt(record.values["completions"][row]["text"], WIDTH) or "(empty)"
    number = row % record.values["group_size"]
    if not _is_judged(record):
        return f"  {number:3}  {text}"
    reward, advantage = (float(record.tensors[name][row]) for name in ("reward", "advantages"))
    return f"  {number:3}  advantage {advantage:+8.4f}  reward {reward:8.4f}  {text}"


def arithmetic(record: StepRecord, row: int) -> Iterator[str]:
    """How the loss of a completion comes about: its reward, its advantage, and each token's contribution."""
    if "loss" not in record.tensors or not _is_judged(record):
        raise RecordError(f"step {record.step} has no loss of GRPO: it is of `hark sft`, or an error ended it before")
    yield question(record.values["prompts"][row // record.values["group_size"]])
    yield completion(record, row)
    yield from _advantage(record, row)
    for number in range(record.tensors["loss"].shape[-1]):
        yield from _contributions(record, row, number)


def _advantage(record: StepRecord, row: int) -> Iterator[str]:
    config, tensors, size = record.values["config"], record.tensors, record.values["group_size"]
    weights, columns = config["reward"]["weights"], tensors["rewards"][row].tolist()
    schedule = {  # JSON has text for the steps
        name: {int(step): weight for step, weight in points.items()}
        for name, points in config["reward"]["schedule"].items()
    }
    now = weights_at(weights, schedule, record.step - 1)
    parts = [
        f"{weight:g} * {value:g} ({name})"
        for name, weight, value in zip(weights, now, columns, strict=True)
        if not math.isnan(value)
    ]
    rewards = tensors["reward"].unflatten(0, (-1, size))[row // size]
    reward, mean, deviation = float(tensors["reward"][row]), float(rewards.mean()), float(rewards.std())
    yield f"  reward    = {' + '.join(parts)} = {reward:g}"
    kind, advantage = config["loss"]["advantage"], float(tensors["advantages"][row])
    penalised = " less their KL" if config["loss"]["kl_in"] == "reward" else ""
    if kind not in ("std", "none") or penalised:
        yield f"  advantage = {kind} of the rewards{penalised} = {advantage:+.6f}"
        return
    below = f" / ({deviation:.6f} + {EPSILON})" if kind == "std" else ""
    yield f"  advantage = ({reward:g} - {mean:.6f}){below} = {advantage:+.6f}"


def _contributions(record: StepRecord, row: int, update: int) -> Iterator[str]:
    """A line for each token: loss = weight * (-S + beta * kl - c * entropy), with the S that the bound says."""
    tensors, loss = record.tensors, record.values["config"]["loss"]
    low, high, beta = 1 - loss["clip_low"], 1 + loss["clip_high"], beta_in_loss(record)
    scored = "scored_logprobs" if "scored_logprobs" in tensors else "old_logprobs"
    yield f"  update {update + 1}: {formula(loss, beta)}"
    heading = ("logprob", "old", "ratio", "clip", "S", "reference", "kl", "weight", "loss")
    yield f"  {'token':18}" + "".join(f"{name:>12}" for name in heading)
    total = 0.0
    for t in range(int(tensors["mask"][row].sum())):
        new, ratio, part = (float(tensors[name][row, t, update]) for name in ("logprobs", "ratio", "loss"))
        old, weight = (float(tensors[name][row, t]) for name in (scored, "weights"))
        clipped = min(max(ratio, low), high)
        reference = float(tensors["ref_logprobs"][row, t]) if "ref_logprobs" in tensors else float("nan")
        kl = float(tensors["kl"][row, t, update]) if "kl" in tensors else 0.0
        kl *= math.exp(new - old) if loss["kl_gradient"] == "ratio" else 1.0
        bonus = loss["entropy"] * float(tensors["entropy"][row, t, update])
        surrogate = beta * kl - bonus - part / weight if weight else 0.0
        text = excerpt(repr(record.values["tokens"][str(int(tensors["tokens"][row, t]))])[1:-1], 17)
        numbers = (new, old, ratio, clipped, surrogate, reference, kl, weight)
        yield f"  {text:18}" + "".join(f"{number:12.6f}" for number in numbers) + f"{part:12.3e}"
        total += part
    yield f"  {'sum of the completion':18}{'':{12 * 9 - 15}}{total:12.3e}"


def formula(loss: dict[str, Any], beta: float) -> str:
    """How the loss of a token comes about, by the settings of `loss`."""
    low, high = 1 - loss["clip_low"], 1 + loss["clip_high"]
    cap = "" if loss["ratio_cap"] is None else f", at least {loss['ratio_cap']:g} * A where A < 0"
    surrogate = {
        "clip": f"min(ratio * A, clip(ratio, {low:g}, {high:g}) * A){cap}",
        "cispo": f"clip(ratio, {low:g}, {high:g}) * A * logprob",
        "sapo": "4 / tau * sigmoid(tau * (ratio - 1)) * A",
        "none": "ratio * A",
        "reinforce": "A * logprob",
    }
    bonus = f" - {loss['entropy']:g} * entropy" if loss["entropy"] else ""
    importance = "importance * " if loss["importance_cap"] else ""
    own = f"minus that of {loss['kind']}" if is_in_file(loss["kind"]) else surrogate.get(loss["bound"], loss["bound"])
    return f"loss = weight * (-S + {beta:g} * kl{bonus}), S = {importance}{own}"


def beta_in_loss(record: StepRecord) -> float:
    """The weight of the KL in the loss of a recorded step."""
    return record.values["beta"] if record.values["config"]["loss"]["kl_in"] == "loss" else 0.0


def likeliest(record: StepRecord, row: int) -> Iterator[str]:
    """At each place the likeliest tokens with their probabilities; the drawn one is marked."""
    if "likeliest_ids" not in record.tensors:
        raise RecordError(f"step {record.step} has no likeliest tokens; train with record.likeliest above 0")
    yield question(record.values["prompts"][row // record.values["group_size"]])
    yield completion(record, row)
    texts = record.values["tokens"]
    for t in range(int(record.tensors["mask"][row].sum())):
        drawn = int(record.tensors["tokens"][row, t])
        ids, shares = (record.tensors[f"likeliest_{name}"][row, t].tolist() for name in ("ids", "logprobs"))
        found = [f"{'*' if i == drawn else ''}{texts[str(i)]!r}" for i in ids]
        listed = [f"{text} {100 * math.exp(share):.1f}" for text, share in zip(found, shares, strict=True)]
        yield f"  {t:3}  {texts[str(drawn)]!r:20}  " + "  ".join(excerpt(one, WIDTH) for one in listed)


def _is_judged(record: StepRecord) -> bool:
    return {"reward", "advantages"} <= record.tensors.keys()


if __name__ == "__main__":
    run(main)
