"""Write the pins: one version of each package that Hark and its tests need, with the digests of its files.

    make pins

They hold for Linux, macOS and Windows and for all Pythons of setup.cfg. use.txt has what the commands need and what
draws the pictures, test.txt what the tests need beside it, and cuda.txt what torch with CUDA needs beside it on Linux.
Each package of sounds has a file of its own, because the data set can be built without it; its dependencies are not
used.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PLACE = Path(__file__).parent
OLDEST = "3.10"  # the first Python of setup.cfg
OF_CUDA = ("cuda-", "nvidia-", "triton")
# A SoundFont player; a package that contains TimGM6mb.sf2, a SoundFont of 128 instruments; espeak-ng.
SOUNDS = ("tinysoundfont==0.3.7", "pretty-midi==0.2.11.post0", "espeakng-loader==0.2.4")


def main() -> None:
    used = {name_of(block) for block in of_setup("plot")}
    blocks: dict[str, list[str]] = {"use": [], "test": [], "cuda": []}
    for block in of_setup("plot", "test"):
        name = name_of(block)
        blocks["cuda" if name.startswith(OF_CUDA) else "use" if name in used else "test"].append(block)
    for sound in SOUNDS:
        blocks[f"sounds/{name_of(sound)}"] = resolved("--no-deps", "-", requirements=sound)
    for file, lines in blocks.items():
        (PLACE / f"{file}.txt").write_text("".join(["# Written by `make pins`.\n", *lines]))


def of_setup(*extras: str) -> list[str]:
    """What setup.cfg with these extras needs."""
    return resolved("setup.cfg", *(word for extra in extras for word in ("--extra", extra)))


def resolved(*words: str, requirements: str = "") -> list[str]:
    """The newest versions that requirements admit: the lines of each package, its digests included."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", *words, "--quiet", "--universal", "--generate-hashes",
        "--python-version", OLDEST, "--no-python-downloads", "--no-header", "--no-annotate",
    ]  # fmt: skip
    written = subprocess.run(
        command, cwd=PLACE.parents[1], input=requirements, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return blocks_of(written.splitlines(keepends=True))


def blocks_of(lines: Iterable[str]) -> list[str]:
    """A package begins a line; its digests are indented."""
    blocks: list[str] = []
    for line in lines:
        if line.startswith(" "):
            blocks[-1] += line
        elif not line.startswith("#"):
            blocks.append(line)
    return blocks


def name_of(block: str) -> str:
    return block.partition("==")[0]


if __name__ == "__main__":
    main()
