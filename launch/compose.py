"""Compose an audio language model of a pretrained Whisper encoder and a pretrained language model.

    python launch/compose.py --audio WHISPER --text MODEL --out DIR [--seconds 30] [--layers N]

WHISPER is the Hugging Face directory of a Whisper, such as whisper-tiny.en, and MODEL that of an instruction-tuned
language model, such as SmolLM2-135M-Instruct. DIR becomes the checkpoint of a Qwen2-Audio, to name in model.path. Its
projector, which leads from the encoder to the language model, is new: it is to be trained first, then the rest.
"""

import argparse
from pathlib import Path

from hark.launch.common.entry import run
from hark.launch.common.new_directory import check_new
from hark.models.compose import Composed, compose
from hark.shown import say_text


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    out = arguments.out
    check_new(out)
    sizes = {"seconds": arguments.seconds, "layers": arguments.layers}
    composed = compose(arguments.audio, arguments.text, out, **sizes, seed=arguments.seed)
    say_text(report(composed, out))
    say_text(next_commands(out))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--audio", type=Path, required=True, metavar="WHISPER")
    add("--text", type=Path, required=True, metavar="MODEL")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    add("--seconds", type=int, default=30, help="the longest clip; vLLM needs 30 (30)")
    add("--layers", type=int, metavar="N", help="keep the first N layers of MODEL alone (all)")
    add("--seed", type=int, default=0, help="of the projector's random weights (0)")
    return parser.parse_args(argv)


def report(composed: Composed, out: Path) -> str:
    whole = composed.tower + composed.projector + composed.decoder
    tokens = ", ".join(f"{name} was {old}" for name, old in composed.tokens.items())
    return "\n".join(
        [
            f"wrote {out}: {whole / 1e6:.1f} M parameters",
            f"  audio tower       {composed.tower / 1e6:.1f} M",
            f"  new projector     {composed.projector / 1e6:.1f} M",
            f"  decoder and head  {composed.decoder / 1e6:.1f} M, of the type {composed.family}",
            f"  tokens for audio  {tokens or 'those of the language model'}",
        ]
    )


def next_commands(out: Path) -> str:
    return "\n".join(
        [
            "next, train the projector alone on right answers, then all but the tower:",
            f"  hark sft compose_projector model.path={out} data.train=FILE",
            "  hark sft compose_decoder data.train=FILE",
        ]
    )


if __name__ == "__main__":
    run(main)
