"""Runs as training leaves them on disk, written without training: metrics, recorded steps, an evaluation, clips."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from hark.grpo.config import to_yaml
from hark.grpo.instruments.record import FORMAT, TENSORS, VALUES, StepRecord, entry_of, write_part
from hark.grpo.loss import policy_loss
from hark.grpo.runtime.manifest import signed, unsigned
from hark.launch.common.config_file import load_config
from tests.clips import WORDS, write_questions

TEXTS = ["<answer>", "rain", "</answer>", "\n", " bell", "<|im_end|>", "dog", "wind"]
GROUP, LENGTH, LIKELIEST = 3, 4, 2
# Each would run, load, hide or turn around something if it entered a page as markup.
HOSTILE = (
    "</script><script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "\u202eright to left",
    "<!-- {{DATA}} &amp; \u2028",
)


def write_run(
    directory: Path,
    *,
    steps: int = 60,
    recorded: tuple[int, ...] = (10, 20),
    questions: int = 3,
    texts: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
) -> Path:
    """A run in `directory`, and its questions beside it. texts: put in place of completions, questions and tokens."""
    file = write_questions(directory.parent / "data", max(questions, 4), name="test")
    config = load_config(["mini", f"run.directory={directory}", f"data.test={file}", f"optim.steps={steps}", *settings])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_metrics(directory, range(1, steps + 1))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for step in recorded:
        write_part(directory, step_record(step, rows[:questions], file.parent, asdict(config), texts))
    write_evaluation(directory, rows, asdict(config), texts)
    return directory


def write_metrics(directory: Path, steps: range) -> None:
    """Add lines to metrics.jsonl, with a validation at every 20th step, and loading that is slow from the 21st on."""
    lines = []
    for step in steps:
        wave = math.sin(step / 9)
        rewards = {"reward": 1 + 0.3 * wave, "reward/accuracy": 0.4 + 0.2 * wave, "reward/format": 0.9}
        others = {"kl": 0.01 * step, "entropy": 2 / step, "seconds/step": 0.5, "seconds/load": 0.3 * (step > 20)}
        lines.append({"step": step, **rewards, **others})
        if step % 20 == 0:
            figures = {"accuracy": 0.4 + step / 2000, "silent_accuracy": 0.25, "questions": 160}
            lines.append({"event": "evaluation", "step": step, **figures})
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def step_record(step: int, rows: list[dict], root: Path, config: dict, texts: tuple[str, ...] = ()) -> StepRecord:
    """A recorded step with two updates, whose losses are those of `policy_loss`."""
    count = len(rows) * GROUP
    generator = torch.Generator().manual_seed(step)
    tokens = torch.tensor([[0, 1 + row % 4, 2, 5] for row in range(count)])
    mask = torch.ones(count, LENGTH, dtype=torch.bool)
    mask[1::GROUP, -1] = False
    old = -torch.rand(count, LENGTH, generator=generator) * mask
    reference = (old - 0.1 * torch.rand(count, LENGTH, generator=generator)) * mask
    rewards = torch.tensor([[float(row % GROUP == 0), 1.0] for row in range(count)])
    advantages = torch.tensor([1.1545, -0.5773, -0.5772]).repeat(len(rows))
    weights = mask / mask.sum(dim=1, keepdim=True) / count
    new = [old, (old + 0.5 * torch.rand(count, LENGTH, generator=generator) - 0.2) * mask]
    limits = {"clip_low": 0.2, "clip_high": 0.2, "beta": config["loss"]["beta"]}
    updates = [policy_loss(one, old, reference, advantages, weights, **limits)[1] for one in new]
    terms = {name: torch.stack([update[name] for update in updates], dim=-1) for name in updates[0]}
    tensors = {
        "tokens": tokens * mask, "mask": mask, "old_logprobs": old, "ref_logprobs": reference, "weights": weights,
        "rewards": rewards, "reward": rewards.sum(dim=1), "advantages": advantages, "stopped": mask[:, -1],
        "logprobs": torch.stack(new, dim=-1), "entropy": torch.full((count, LENGTH, 2), 0.7), **terms,
        "likeliest_ids": torch.tensor([4, 6]).expand(count, LENGTH, LIKELIEST),
        "likeliest_logprobs": torch.tensor([-0.5, -1.5]).expand(count, LENGTH, LIKELIEST),
    }  # fmt: skip
    values = {
        "format": FORMAT, "step": step, "since": 0, "ranks": 1, "parts": [0], "reason": "every", "group_size": GROUP,
        "reward_names": ["accuracy", "format"], "stop_ids": [5], "pad_id": 0, "config": config, "versions": {},
        "learning_rate": 3e-4, "beta": config["loss"]["beta"],
        "prompts": [prompt(n, row, root, texts) for n, row in enumerate(rows)],
        "completions": [completion(row, mask, texts) for row in range(count)],
        "tokens": {str(n): token(n, texts) for n in range(len(TEXTS))},
        "updates": [{"loss": float(one["loss"].sum()), "kl": 0.01, "grad_norm": 0.5} for one in updates],
    }  # fmt: skip
    return StepRecord(values, tensors)


def replace_tensors(part: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write other tensors to a part of a record, with their size and digest."""
    save_file(tensors, part / TENSORS)
    replace_values(part, values_of(part) | {"tensors": entry_of(part / TENSORS)})


def values_of(part: Path) -> dict:
    """The values of a part of a record."""
    return unsigned((part / VALUES).read_bytes(), VALUES)


def replace_values(part: Path, values: dict) -> None:
    """Write other values to a part of a record, with their digest."""
    (part / VALUES).write_bytes(signed(values))


def prompt(n: int, row: dict, root: Path, texts: tuple[str, ...]) -> dict:
    """A prompt of a recorded step, with its answers under the controls."""
    asked = row | {"question_text": " ".join([row["question_text"], *texts])}
    answers = {"greedy": {"text": WORDS[row["answer"]]}, "silent": {"text": "silence"}}
    clips = [{"source": str(root / row["audio_path"]), "start": 0.0, "end": None, "tokens": 8}]
    line = {
        "row": asked,
        "line": "test.jsonl:1",
        "key": [0, 1, 2],
        "position": n,
        "text": f"user: {asked['question_text']}",
    }
    return line | {"clips": clips, "answers": answers}


def completion(row: int, mask: torch.Tensor, texts: tuple[str, ...]) -> dict:
    text = texts[row % len(texts)] if texts else "<answer>rain</answer>"
    return {"text": text, "stopped": bool(mask[row, -1])}


def token(n: int, texts: tuple[str, ...]) -> str:
    return texts[n % len(texts)] if texts else TEXTS[n]


def write_evaluation(directory: Path, rows: list[dict], config: dict, texts: tuple[str, ...] = ()) -> None:
    """evaluation.json with every second question right, and both controls."""
    answered = []
    for n, row in enumerate(rows):
        wrong = {"prediction": "nothing", "correct": False, "stopped": True, "choice": None}
        own = {"prediction": texts[n % len(texts)] if texts else row["multi_choice"][n % 2], "correct": n % 2 == 0}
        line = {"id": row["id"], "task": "sound", "category": "", "stopped": True, "confidence": 0.9 - 0.2 * n}
        answered.append(line | own | {"silent": wrong, "shuffled_audio": wrong})
    half = {"right": 2, "total": 4, "accuracy": 0.5, "interval": [0.15, 0.85]}
    figures = {"accuracy": 0.5, "accuracy_interval": [0.15, 0.85], "chance": 0.25, "groups": {"task": {"sound": half}}}
    controls = {"silent_accuracy": 0.0, "shuffled_audio_accuracy": 0.0}
    evaluation = figures | controls | {"step": 60, "benchmark": "strict", "config": config, "rows": answered}
    (directory / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
