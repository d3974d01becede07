"""Exports beside an inference engine: does vLLM give the greedy answers and the logprobs of our sampler?

    make test-vllm                          in an environment of vLLM's own, which takes 4 GB; Linux, x86-64
    python -m tests.engine PYTHON           PYTHON: the interpreter of such an environment

A small Qwen2-Audio is trained for three steps, once whole and once by adapters, which the export merges. vLLM loads the
exported directories and reads the clips by its own processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import soundfile

from hark.data.chat import messages
from hark.data.examples import load_examples
from hark.data.prompts import render, text_of
from hark.grpo.sampler import sample
from hark.models.audio_policy import AudioPolicy
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from tests.clips import write_questions
from tests.conftest import TEXTS
from tests.ranks import on_ranks
from tests.runs import train_all

TOKENS = 24
LOGPROBS = 1e-4  # both compute in float32, with other kernels; found are differences of 1e-6
TRAINED = {"all weights": [], "adapters, merged": ["lora.rank=4", "lora.alpha=32", "optim.lr=1e-2"]}


def main(engine: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        questions = exported(place)
        failed = False
        print(f"{'export':20}{'questions':>10}{'equal answers':>15}{'largest difference of a logprob':>34}")
        for export in TRAINED:
            asked = ours(place / export / "model", questions)
            theirs = answered(engine, asked, place / export)
            equal = sum(a["tokens"] == b["tokens"] for a, b in zip(asked["rows"], theirs, strict=True))
            pairs = zip(asked["rows"], theirs, strict=True)
            worst = max(
                abs(a - b) for one, other in pairs for a, b in zip(one["logprobs"], other["logprobs"], strict=False)
            )
            print(f"{export:20}{len(theirs):10}{equal:15}{worst:34.1e}")
            failed |= equal < len(theirs) or worst > LOGPROBS
        if failed:
            raise SystemExit("vLLM and the sampler differ")


def exported(place: Path) -> Path:
    """Train and export; returns the questions."""
    build_mini(
        place / "start", TEXTS, family="qwen2_audio", vocabulary=400, hidden=128, layers=2, tower_hidden=128,
        tower_layers=2,
    )  # fmt: skip
    questions, empty = write_questions(place / "questions", 12), place / "empty.yaml"
    empty.write_text("{}\n")
    settings = [
        str(empty), f"model.path={place / 'start'}", f"data.train={questions}", "rollout.group_size=4",
        "rollout.max_new_tokens=6", "optim.prompts_per_step=4", "optim.micro_batch=4", "optim.lr=1e-3",
        "optim.schedule=constant", "optim.steps=3",
    ]  # fmt: skip
    on_ranks(1, train_all, [[*settings, *more, f"run.directory={place / name}"] for name, more in TRAINED.items()])
    return questions


def ours(model: Path, questions: Path) -> dict[str, Any]:
    """What the engine is asked, with our greedy answers and their logprobs."""
    policy = load_policy(model)
    assert isinstance(policy, AudioPolicy)
    rows, prompts = [], []
    for example in load_examples(questions)[0]:
        text, clip = text_of(render(example, "answer")), questions.parent / f"{example.id}.wav"
        prompts.append(policy.prepare(text, soundfile.read(clip, dtype="float32")[0]))
        rows.append({"ids": policy.ids(messages(text, 1)), "clip": str(clip)})
    drawn = sample(policy, prompts, group_size=1, max_new_tokens=TOKENS, temperature=0)
    for row, tokens, logprobs, mask in zip(rows, drawn.tokens, drawn.logprobs, drawn.mask, strict=True):
        row |= {"tokens": tokens[mask].tolist(), "logprobs": logprobs[mask].tolist()}
    settings = {"never": list(policy.suppressed_ids), "stop": list(policy.stop_ids), "tokens": TOKENS}
    return {"model": str(model), "rows": rows} | settings


def answered(engine: str, asked: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    question, answer = place / "asked.json", place / "answered.json"
    question.write_text(json.dumps(asked))
    program = Path(__file__).with_name("engine_answers.py")
    with (place / "engine.txt").open("w") as output:
        command = [engine, str(program), str(question), str(answer)]
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit((place / "engine.txt").read_text()[-4000:])
    return json.loads(answer.read_text())


if __name__ == "__main__":
    main(sys.argv[1])
