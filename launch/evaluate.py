"""Answer the questions of a benchmark greedily, grade the answers and report.

torchrun --nproc-per-node GPUS launch/evaluate.py CONFIG [section.key=value ...] [--silent] [--shuffled-audio] ...
"""

import argparse

from hark.launch.common.answering import answer_benchmark
from hark.launch.common.entry import run


def main(argv: list[str]) -> None:
    options = parse(argv)
    controls = {"silent": options.silent, "audio": options.shuffled_audio, "choices": options.shuffle_choices}
    answer_benchmark(options.words, **controls)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; flags may be anywhere in it."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Answer the questions of data.test greedily and grade them by the rule of evaluation.benchmark.\n"
        "Writes evaluation.json and the benchmark's answer file in run.directory.",
        epilog="launch/grade.py grades an existing file of answers.",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG [section.key=value ...]", help="as for launch/train.py")
    add = parser.add_argument
    add("--silent", action="store_true", help="answer again with each clip replaced by silence of the same length")
    add("--shuffled-audio", action="store_true", help="answer again with the clip of another question")
    add("--shuffle-choices", action="store_true", help="answer again with the choices in another order")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run(main)
