"""Write a pretrained model of another program's format as a Hugging Face directory.

    python launch/import_model.py SOURCE --out DIR

SOURCE is the directory of a Whisper of CTranslate2 (as faster-whisper has them), or a GGUF file of llama.cpp with a
language model; the second needs the packages gguf and accelerate. The weights of DIR are in float32, also where those
of SOURCE are quantised.
"""

import argparse
from pathlib import Path

from hark.data.errors import DataError
from hark.launch.common.entry import run
from hark.launch.common.new_directory import check_new
from hark.models.ctranslate2 import import_whisper
from hark.models.gguf import import_gguf, is_gguf
from hark.shown import say


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    source, out = arguments.source, arguments.out
    check_new(out)
    if is_gguf(source):
        parameters = import_gguf(source, out)
    elif (source / "model.bin").exists():
        parameters = import_whisper(source, out)
    else:
        raise DataError(f"{source}: expected a GGUF file, or the directory of a CTranslate2 model, with a model.bin")
    say(f"wrote {out}: {parameters / 1e6:.1f} M parameters")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
