"""Train, shard, export and time a small model of every audio family, and print the table of docs/families.md.

    python launch/studies/families.py [FAMILY ...] [--table docs/families.md]

Each family's model has random weights and the sizes of `hark new-model --size tiny`. Every run is six steps of
supervised fine-tuning on the same questions about noise; the table has the losses of the first and the last. The speed,
at --size small, is that of one GRPO update of a group of 8 with 32 tokens about a clip of 30 s, relative to
transformers' own `generate`, forward and backward with the prompt repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from safetensors.torch import load_file

from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.instruments.shape import shape_of
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch import sft
from hark.launch.common.contract import check, native_step
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.common.torchrun import environment, torchrun
from hark.models.loading import build_from_config, load_policy, read_config
from hark.models.mini import SIZES, build_mini
from hark.models.mini_families import FAMILIES
from hark.models.policy import Policy

MARKERS = Markers.of("launch/studies/families.py")
HEADING = (
    "family", "contract", "all", "no-tower", "projector", "LoRA",
    "2 ranks - 1", "export - transformers", "plan", "speed",
)  # fmt: skip
KINDS = {
    "all": [],
    "no-tower": ["model.train=no-tower"],
    "projector": ["model.train=projector"],
    "LoRA": ["lora.rank=4", "lora.alpha=8"],
}
QUESTION, WORDS = "Which word was it?", ("one", "two", "red", "blue")
GROUP, TOKENS, SECONDS = 8, 32, 30.0


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        data = write_questions(Path(place))
        rows = []
        for name in arguments.families or FAMILIES:
            rows.append([name, *figures(name, Path(place) / name, data)])
            print("  ".join(f"{title} {cell}" for title, cell in zip(HEADING, rows[-1], strict=True)), flush=True)
    machine = f"One thread; {best_matmul_rate() / 1e9:.3g} G multiply-adds per second in the best product of matrices"
    text = f"{table(HEADING, rows)}\n\n{machine}; torch {torch.__version__}, transformers {transformers.__version__}."
    print(text)
    if arguments.table:
        arguments.table.write_text(MARKERS.filled(arguments.table.read_text(), text))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all if left out")
    parser.add_argument("--table", type=Path, metavar="FILE", help="replace the table in this page")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"unknown {', '.join(sorted(unknown))}; expected some of {', '.join(FAMILIES)}")
    return arguments


def write_questions(directory: Path, count: int = 16) -> Path:
    """Questions about noise: what can be learnt is the form of an answer."""
    rows, generator = [], np.random.default_rng(0)
    for n in range(count):
        noise = 0.1 * generator.standard_normal(8000 + 400 * n)
        soundfile.write(directory / f"{n}.wav", noise, 16_000)
        rows.append(
            {"id": n, "audio_path": f"{n}.wav", "question_text": QUESTION, "multi_choice": list(WORDS), "answer": n % 4}
        )
    path = directory / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def figures(name: str, directory: Path, data: Path) -> list[str]:
    """The cells of one family's row."""
    model = directory / "model"
    build_mini(model, [QUESTION, *WORDS, "<answer>"], family=name, **SIZES["tiny"])
    policy = load_policy(model)
    findings = list(check(policy, _native(policy, model)))
    cells = [f"{sum(finding.holds for finding in findings)} of {len(findings)}"]
    for kind, settings in KINDS.items():
        losses = trained(model, data, directory / kind, settings)
        cells.append(f"{losses[0]:.2f} to {losses[-1]:.2f}")
    cells.append(f"{two_ranks(model, data, directory):.0e}")
    exported = load_policy(directory / "all" / "model")
    native = _native(exported, directory / "all" / "model")
    row = next(f for f in check(exported, native, gradients=False) if f.name.startswith("a row"))
    cells.append(f"{row.difference:.0e}")
    planned = shape_of(build_from_config(read_config(model)), targets=("all-linear",)).parameters
    cells.append("exact" if planned == sum(p.numel() for p in policy.parameters()) else f"{planned} parameters")
    build_mini(directory / "small", [QUESTION, *WORDS, "<answer>"], family=name, **SIZES["small"])
    return [*cells, f"{speed(load_policy(directory / 'small')):.1f} x"]


def _native(policy: Policy, directory: Path) -> Any:
    """transformers' own model of a policy, with the weights of a directory."""
    return type(policy.model).from_pretrained(directory, dtype=torch.float32, use_safetensors=True).eval()


def settings_of(model: Path, data: Path, directory: Path) -> list[str]:
    words = ["mini_sft", f"model.path={model}", f"data.train={data}", f"run.directory={directory}", "data.test=null"]
    words += [
        "data.validation=null",
        "evaluation.every=0",
        "optim.steps=6",
        "optim.prompts_per_step=8",
        "optim.lr=3e-3",
    ]
    return [*words, "optim.warmup_steps=0", "checkpoint.every=0", "data.silent_share=0"]


def trained(model: Path, data: Path, directory: Path, settings: Sequence[str]) -> list[float]:
    """The losses of a run in this process."""
    with redirect_stdout(io.StringIO()):
        sft.main([*settings_of(model, data, directory), *settings])
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def two_ranks(model: Path, data: Path, directory: Path) -> float:
    """The difference between the weights that one process and two end with, the largest of 999 in 1,000.

    AdamW divides a gradient by its own size, so where that is rounding alone, as for an expert without tokens, weights
    take steps of the learning rate either way.
    """
    words = settings_of(model, data, directory / "ranks")
    script = Path(sft.__file__)
    subprocess.run([*torchrun(2), str(script), *words], check=True, env=environment(), capture_output=True)
    a, b = (load_file(directory / run / "model" / "model.safetensors") for run in ("all", "ranks"))
    differences = [torch.where(a[name] == b[name], 0.0, (a[name] - b[name]).abs()).flatten() for name in a]
    return float(np.quantile(torch.cat(differences).numpy(), 0.999))  # where: some buffers are infinite


def speed(policy: Policy, repeat: int = 3) -> float:
    """Time of transformers' own procedure divided by that of a group in one row; medians of turns."""
    sound = 0.1 * np.random.default_rng(0).standard_normal(round(SECONDS * 16_000)).astype(np.float32)
    prompt, inputs = policy.prepare(QUESTION, sound), policy.native_inputs(QUESTION, sound)
    native = _native(policy, policy.directory)

    def own() -> None:
        rollout = sample(
            policy, [prompt], group_size=GROUP, max_new_tokens=TOKENS, temperature=1.0, keys=[(0,)], stop=False
        )
        logprobs, _ = score(policy, [prompt], rollout.tokens, rollout.mask, group_size=GROUP)
        logprobs.sum().backward()

    turns = [(seconds(own), seconds(lambda: native_step(policy, native, inputs, GROUP, TOKENS))) for _ in range(repeat)]
    ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
    return theirs / ours


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
