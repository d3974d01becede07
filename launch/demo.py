"""Run the whole demo: build data and model, warm start, GRPO, supervised fine-tuning, evaluation, a table, a page.

    python launch/demo.py [--family qwen2_5_omni]

It runs other programs of launch/ and prints each command first, so that you can run it again by hand. It deletes
runs/mini and writes all results there; runs/mini/summary.json holds the figures, runs/mini/report.html the page. The
small model is a Qwen2-Audio, or of another family of docs/families.md.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from hark.grpo.config import Config
from hark.grpo.instruments.metrics import read_metrics
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import run
from hark.launch.common.torchrun import environment, torchrun
from hark.models.mini_families import FAMILIES
from hark.shown import say, say_text

ROOT = Path("runs/mini")
LAUNCH = Path(__file__).parent
GRPO_CONFIG, SFT_CONFIG = LAUNCH / "configs" / "mini.yaml", LAUNCH / "configs" / "mini_sft.yaml"
TASKS = ("sound", "music", "speech")
STAGES = ("warm", "grpo", "sft")  # the runs


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    started = time.monotonic()
    grpo = load_config([str(GRPO_CONFIG)])
    shutil.rmtree(ROOT, ignore_errors=True)
    start(ROOT, arguments.family)
    on_two_ranks("train.py", GRPO_CONFIG)
    on_two_ranks("sft.py", SFT_CONFIG, f"model.path={ROOT}/warm/model", f"run.directory={ROOT}/sft", *as_long_as(grpo))
    for name in STAGES:
        on_two_ranks("evaluate.py", ROOT / name, f"data.test={grpo.data.test}", "--silent", "--shuffled-audio")
    summary = summarise(grpo, seconds=time.monotonic() - started)
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say_text(table(summary))
    if find_spec("matplotlib") is not None:
        show(sys.executable, LAUNCH / "studies" / "pictures.py", "curves", ROOT, ROOT / "curves.svg")
    say_text(next_commands())
    show(sys.executable, LAUNCH / "report.py", *(ROOT / name for name in STAGES), "--out", ROOT / "report.html")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_audio", help="of the small model (%(default)s)")
    return parser.parse_args(argv)


def start(root: Path, family: str) -> None:
    """Build data and model under a directory, and the model's warm start."""
    show(sys.executable, LAUNCH / "build_mini.py", root, "--family", family)
    moved = () if root == ROOT else (f"model.path={root}/model", f"run.directory={root}/warm")
    on_two_ranks("sft.py", SFT_CONFIG, *moved, *data_under(root))


def data_under(root: Path) -> tuple[str, ...]:
    """Overrides that name the data under a directory, where that is not the demo's."""
    names = ("train", "validation")
    return () if root == ROOT else tuple(f"data.{name}={root}/data/{name}.jsonl" for name in names)


def on_two_ranks(script: str, *words: str | Path) -> None:
    """Run a launch script on two processes."""
    show(*torchrun(2), LAUNCH / script, *words)


def show(*command: str | Path) -> None:
    """Print a command and run it; if it fails, exit with its status."""
    words = [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in command]
    say("", " ".join(["$", "python", *words[1:]]))
    result = subprocess.run(words, env=environment())
    if result.returncode:
        sys.exit(result.returncode)


def as_long_as(grpo: Config) -> tuple[str, ...]:
    """Overrides that give supervised fine-tuning GRPO's number of examples and its schedule."""
    sft = load_config([str(SFT_CONFIG)])
    steps = grpo.optim.steps * grpo.optim.prompts_per_step // sft.optim.prompts_per_step
    return f"optim.steps={steps}", f"optim.schedule={grpo.optim.schedule}", "evaluation.every=0"


def summarise(grpo: Config, *, seconds: float) -> dict:
    """The figures of the demo, read from the files that its commands wrote."""
    before, after, sft = (json.loads((ROOT / name / "evaluation.json").read_text()) for name in STAGES)
    lines = read_metrics(ROOT / "grpo")
    return {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "sft_accuracy": sft["accuracy"],
        "silent_accuracy": after["silent_accuracy"],
        "chance": after["chance"],
        **{f"accuracy_before/{task}": before[f"accuracy/task/{task}"] for task in TASKS},
        **{f"accuracy_after/{task}": after[f"accuracy/task/{task}"] for task in TASKS},
        **{f"sft_accuracy/{task}": sft[f"accuracy/task/{task}"] for task in TASKS},
        "test_questions": len(after["rows"]),
        "training_examples": grpo.optim.steps * grpo.optim.prompts_per_step,
        "sampler_gap": max(line["sampler_gap"] for line in lines if "sampler_gap" in line),
        "steps": grpo.optim.steps,
        "seconds": round(seconds, 1),
    }


def table(summary: dict) -> str:
    """The main figures, as the table that the demo prints."""
    columns = ("", *[f"/{task}" for task in TASKS])
    rows = [("warm start", "accuracy_before"), ("after GRPO", "accuracy_after"), ("after SFT instead", "sft_accuracy")]
    lines = [f"\n{'test accuracy, %':<20}{'all':>8}" + "".join(f"{task:>8}" for task in TASKS)]
    for label, key in rows:
        lines.append(f"{label:<20}" + "".join(f"{100 * summary[key + column]:8.1f}" for column in columns))
    lines.append(f"{'GRPO, sound removed':<20}{100 * summary['silent_accuracy']:8.1f}")
    lines.append(f"{'chance':<20}{100 * summary['chance']:8.1f}")
    lines.append(
        f"\n{summary['test_questions']} held-out questions; {summary['training_examples']} training examples in "
        f"{summary['steps']} GRPO steps, as many for SFT; {summary['seconds']:.0f} s in all. "
        f"Largest sampler gap: {summary['sampler_gap']:.1e}."
    )
    return "\n".join(lines)


def next_commands() -> str:
    """Three commands to try with what the demo wrote."""
    data = ROOT / "data"
    row = json.loads((data / "test.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    ask = [
        "hark",
        "ask",
        ROOT / "grpo",
        data / row["audio_path"],
        row["question_text"],
        "--choices",
        *row["multi_choice"],
    ]
    commands = (
        ("ask the trained model about a clip; --silent asks without sound too", shlex.join(map(str, ask))),
        ("does it depend on the order of the choices?", f"hark evaluate {ROOT}/grpo --shuffle-choices"),
        ("begin with your own data", "hark init mine"),
    )
    return "\n".join(["\nTry next:", *(f"\n  {command}\n      {what}" for what, command in commands)])


if __name__ == "__main__":
    run(main)
