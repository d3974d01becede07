"""Answer the questions of a benchmark greedily, grade the answers and report.

    python launch/evaluate.py RUN [--step N | --best] [section.key=value ...] [--silent] [--shuffled-audio] ...
    python launch/evaluate.py CONFIG [section.key=value ...] [--silent] [--shuffled-audio] [--shuffle-choices]
    torchrun --nproc-per-node GPUS launch/evaluate.py ...

RUN is the run.directory of a training run: its trained model is evaluated, with the settings that it was trained with.
CONFIG names a model that was not trained here, as model.path.
"""

import argparse

from hark.launch.common.answering import answer_benchmark, subject_of
from hark.launch.common.entry import run


def main(argv: list[str]) -> None:
    options = parse(argv)
    subject = subject_of(options.words, step=options.step, best=options.best)
    answer_benchmark(subject, silent=options.silent, audio=options.shuffled_audio, choices=options.shuffle_choices)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; flags may be anywhere in it."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description=__doc__,
        epilog="""Writes evaluation.json and the benchmark's answer file to run.directory: RUN, or with --step or --best
a directory inside it. `hark grade` grades an existing file of answers.""",
    )
    parser.add_argument("words", nargs="*", metavar="RUN | CONFIG [section.key=value ...]")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the run's model after step N; the last if left out")
    which.add_argument("--best", action="store_true", help="the run's model with the best validation accuracy")
    add("--silent", action="store_true", help="answer again with each clip replaced by silence of the same length")
    add("--shuffled-audio", action="store_true", help="answer again with the clip of another question")
    add("--shuffle-choices", action="store_true", help="answer again with the choices in another order")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run(main)
