"""Write the demo's data set and its small model with random weights.

    python launch/build_mini.py DIRECTORY [--family FAMILY] [--tower-from WHISPER]

The clips and JSONL files go to DIRECTORY/data, and a Hugging Face checkpoint to DIRECTORY/model. WHISPER is the
directory of a Whisper checkpoint, such as whisper-tiny; its encoder becomes the audio tower. Without it the tower has
random weights.
"""

import argparse
from pathlib import Path

from hark.data.examples import load_examples
from hark.data.mini.build import build
from hark.data.prompts import texts_of
from hark.launch.common.entry import run
from hark.models.mini import build_mini
from hark.models.mini_families import FAMILIES

TEMPLATE = "answer"


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    build(arguments.directory / "data")
    examples, _ = load_examples(arguments.directory / "data" / "train.jsonl")
    texts, model = texts_of(examples, TEMPLATE), arguments.directory / "model"
    build_mini(model, texts, family=arguments.family, tower_from=arguments.tower_from)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_audio", help="of the model (%(default)s)")
    parser.add_argument("--tower-from", type=Path, metavar="WHISPER")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
