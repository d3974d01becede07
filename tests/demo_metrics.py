"""The metrics of the demo that the rules of the diagnosis read, as columns of three digits: tests/demo_metrics.json.

python -m tests.demo_metrics runs/mini     # after `make demo`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hark.grpo.instruments.metrics import read_metrics

FILE = Path(__file__).with_suffix(".json")
READ = (
    "step", "reward", "equal_reward_share", "sampler_gap", "kl", "entropy", "stopped_share", "distinct_completions",
    "clip_share", "grad_norm", "seconds/load", "seconds/waiting", "seconds/step",
)  # fmt: skip
PREFIXES = ("reward/", "equal_share/", "variance_share/")


def lines_of(stage: str) -> list[dict[str, Any]]:
    """The lines of a stage of the demo: warm, grpo or sft."""
    stored = json.loads(FILE.read_text())[stage]
    steps = [dict(zip(stored["steps"], values, strict=True)) for values in zip(*stored["steps"].values(), strict=True)]
    return sorted(steps + stored["evaluations"], key=lambda line: line["step"])


def main(directory: Path) -> None:
    stages = {}
    for stage in ("warm", "grpo", "sft"):
        lines = read_metrics(directory / stage)
        steps = [line for line in lines if "event" not in line]
        names = [name for name in steps[0] if name in READ or name.startswith(PREFIXES)]
        stages[stage] = {
            "steps": {name: [_short(step.get(name)) for step in steps] for name in names},
            "evaluations": [line for line in lines if line.get("event") == "evaluation"],
        }
    FILE.write_text(json.dumps(stages, separators=(",", ":")) + "\n")


def _short(value: float | None) -> float | int | None:
    number = None if value is None else float(f"{value:.3g}")
    return int(number) if number is not None and number.is_integer() else number


if __name__ == "__main__":
    main(Path(sys.argv[1]))
