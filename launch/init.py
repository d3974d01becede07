"""Begin a project of your own: a directory with configurations, sample clips and questions, which run as they are.

    python launch/init.py DIR

Writes DIR/sft.yaml (warm start) and DIR/train.yaml (GRPO), DIR/train.jsonl and DIR/test.jsonl with synthetic clips in
DIR/audio, and DIR/README.md with the commands. Paths in them start at the present working directory.
"""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from hark.data.errors import DataError
from hark.data.mini.build import build
from hark.grpo.config import flow
from hark.launch.common.config_file import COMMENT, SECTIONS
from hark.launch.common.entry import run
from hark.shown import say, say_text

# What a first user sets in both files.
SHARED: dict[str, dict[str, Any]] = {
    "data": {
        "train": "train.jsonl",
        "test": "test.jsonl",
        "held_out": 8,
        "template": "answer",
        "max_seconds": 30.0,
        "skip_bad": False,
    },
    "rollout": {"max_new_tokens": 12},
    "evaluation": {"every": 10, "batch": 16},
    "checkpoint": {"every": 10},
}
SFT: dict[str, dict[str, Any]] = {
    "run": {"directory": "warm", "seed": 0, "threads": 1},
    "model": {"path": "model"},
    "optim": {"steps": 20, "prompts_per_step": 8, "micro_batch": 8, "lr": 6e-4, "schedule": "constant"},
}
GRPO: dict[str, dict[str, Any]] = {
    "run": {"directory": "grpo", "seed": 0, "threads": 1},
    "model": {"path": "warm/model"},
    "rollout": {"group_size": 8, "temperature": 1.0},
    "reward": {"weights": {"accuracy": 1.0, "format": 1.0}},
    "loss": {"beta": 0.04},
    "optim": {"steps": 20, "prompts_per_step": 8, "micro_batch": 8, "lr": 3e-4, "schedule": "linear"},
}
PATHS = {("run", "directory"), ("model", "path"), ("data", "train"), ("data", "test")}
FILES = ("sft.yaml", "train.yaml", "train.jsonl", "test.jsonl", "audio", "README.md")
README = """# Your own audio questions

The clips here are synthetic and few: they show that the commands run, and teach a model next to nothing.

    hark new-model --data {d}/train.jsonl --size tiny --out {d}/model
    hark sft {d}/sft.yaml
    hark train {d}/train.yaml
    {evaluate}

For your own questions, replace `train.jsonl` and `test.jsonl` and the clips in `audio/` (wav, flac, ogg or mp3), delete
`model`, `warm` and `grpo`, and set more steps in both files: the demo uses 150 of sft and 300 of train, each of 16
prompts. From a CSV file and its clips in {d}/clips, both are written by

    hark convert csv questions.csv {d}/train.jsonl --audio {d}/clips --test-share 0.2 --force

`hark check-data {d}/train.jsonl` finds bad clips. A line of `train.jsonl` is

    {line}

with `answer` the index of the right choice, from 0, and `audio_path` relative to the file.
"""


def main(argv: list[str]) -> None:
    directory = parse(argv).directory
    there = [name for name in FILES if (directory / name).exists()]
    if there or directory.is_file():
        where = directory / there[0] if there else directory
        raise DataError(f"{where}: exists already; name a new directory, and write your questions there afterwards")
    build(directory, train=48, validation=0, test=16)
    (directory / "validation.jsonl").unlink()
    (directory / "sft.yaml").write_text(configuration("The warm start, by `hark sft`.", SFT, directory), "utf-8")
    (directory / "train.yaml").write_text(configuration("GRPO, by `hark train`.", GRPO, directory), "utf-8")
    (directory / "README.md").write_text(readme(directory), encoding="utf-8")
    say_text(readme(directory).partition("\n\n")[2].partition("\n\nFor your own")[0])
    say("", f"{directory / 'README.md'} says how to put your own clips there.")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new directory")
    return parser.parse_args(argv)


def readme(directory: Path) -> str:
    line = (directory / "train.jsonl").read_text(encoding="utf-8").split("\n")[0]
    kept = ("id", "audio_path", "question_text", "multi_choice", "answer", "dataset_name", "task")
    record = {key: value for key, value in json.loads(line).items() if key in kept}
    evaluate = f"hark evaluate {directory}/grpo --silent"
    return README.format(d=directory, evaluate=evaluate, line=json.dumps(record))


def configuration(title: str, values: dict[str, dict[str, Any]], directory: Path) -> str:
    """A YAML file with the options' own comments, so that they are those of `hark train --help`."""
    lines = [f"# {title} `hark train --help` lists all options.", "# Relative paths start at the working directory."]
    for section, kind in SECTIONS.items():
        options = SHARED.get(section, {}) | values.get(section, {})
        comments = dict(COMMENT.findall(inspect.getsource(kind)))
        lines += [f"{section}:"] if options else []
        for key, value in options.items():
            text = flow((directory / value).as_posix() if (section, key) in PATHS else value)
            lines.append(f"  {key}: {text}  # {comments[key]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
