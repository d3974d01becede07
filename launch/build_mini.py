"""Write the demo's dataset and its small Qwen2-Audio with random weights.

    python launch/build_mini.py DIRECTORY [--tower-from WHISPER]

DIRECTORY/data holds clips and JSONL files, DIRECTORY/model a Hugging Face checkpoint. WHISPER is the directory of a
Whisper checkpoint, such as whisper-tiny, whose encoder becomes the audio tower; without it the tower starts at random.
"""

import argparse
from pathlib import Path

from hark.data.examples import load_examples
from hark.data.mini.build import build
from hark.data.prompts import render, target
from hark.models.mini import build_mini

TEMPLATE = "answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tower-from", type=Path, metavar="WHISPER")
    arguments = parser.parse_args()
    build(arguments.directory / "data")
    examples, _ = load_examples(arguments.directory / "data" / "train.jsonl")
    texts = [text for example in examples for text in (render(example, TEMPLATE), target(example, TEMPLATE))]
    build_mini(arguments.directory / "model", texts, tower_from=arguments.tower_from)


if __name__ == "__main__":
    main()
