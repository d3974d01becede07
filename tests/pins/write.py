"""Write the pins: one version of each package that Hark and its tests need, with the digests of its files.

    make pins

They hold for Linux, macOS and Windows and for all Pythons of setup.cfg. use.txt has what the commands need and what
draws the pictures, test.txt what the tests need beside it, and cuda.txt what torch with CUDA needs beside it on Linux.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PLACE = Path(__file__).parent
OLDEST = "3.10"  # the first Python of setup.cfg
OF_CUDA = ("cuda-", "nvidia-", "triton")


def main() -> None:
    used = {name_of(block) for block in resolved("plot")}
    blocks: dict[str, list[str]] = {"use": [], "test": [], "cuda": []}
    for block in resolved("plot", "test"):
        name = name_of(block)
        blocks["cuda" if name.startswith(OF_CUDA) else "use" if name in used else "test"].append(block)
    for file, lines in blocks.items():
        (PLACE / f"{file}.txt").write_text("".join(["# Written by `make pins`.\n", *lines]))


def resolved(*extras: str) -> list[str]:
    """The newest versions that setup.cfg with these extras admits: the lines of each package, its digests included."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "setup.cfg", "--quiet", "--universal", "--generate-hashes",
        "--python-version", OLDEST, "--no-python-downloads", "--no-header", "--no-annotate",
    ]  # fmt: skip
    for extra in extras:
        command += ["--extra", extra]
    text = subprocess.run(command, cwd=PLACE.parents[1], check=True, stdout=subprocess.PIPE, text=True).stdout
    return blocks_of(text.splitlines(keepends=True))


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
