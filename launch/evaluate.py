"""Answer a benchmark greedily and report; or score a file of answers that exists.

torchrun --nproc-per-node GPUS launch/evaluate.py CONFIG [section.key=value ...] [--silent] [--shuffled-audio] ...
python launch/evaluate.py --score FILE [--benchmark NAME] [--json OUT]
"""

import argparse
import sys

from hark.data.benchmarks.grading import score_file
from hark.data.benchmarks.rules import BENCHMARKS
from hark.data.errors import DataError


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.score is not None:
        score_file(options.score, benchmark=options.benchmark or "mmau", out=options.json)
        return
    from hark.launch.answering import (
        answer_benchmark,  # brings torch and transformers, which scoring a file must not wait for
    )

    controls = {"silent": options.silent, "audio": options.shuffled_audio, "choices": options.shuffle_choices}
    answer_benchmark(options.words, **controls)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, flags anywhere in it; it leaves with a usage line at a mistake."""
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Answer the questions of data.test greedily, each counted, and judge them by the rule of\n"
        "evaluation.benchmark. Writes evaluation.json and the benchmark's answer file in run.directory.",
        epilog="With --score no model is loaded: the answers are those in FILE, JSON list or JSON lines.",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG [section.key=value ...]", help="as for launch/train.py")
    add = parser.add_argument
    add("--silent", action="store_true", help="ask again with each clip replaced by silence of its length")
    add("--shuffled-audio", action="store_true", help="ask again with each question given another question's clip")
    add("--shuffle-choices", action="store_true", help="ask again with the choices in another order")
    add("--score", metavar="FILE", help="score the predictions in FILE, with their choices and answers")
    add("--benchmark", choices=BENCHMARKS, help="with --score: whose rule judges (mmau)")
    add("--json", metavar="OUT", help="with --score: write the figures and the judgement of each row")
    options = parser.parse_intermixed_args(argv)
    if options.score is None and (options.benchmark or options.json):
        parser.error("--benchmark and --json belong to --score; a CONFIG has evaluation.benchmark and run.directory")
    asks = options.words or options.silent or options.shuffled_audio or options.shuffle_choices
    if options.score is not None and asks:
        parser.error("--score takes no CONFIG and no controls: it loads no model, and cannot ask again")
    return options


if __name__ == "__main__":
    if parse(sys.argv[1:]).score is None:
        from hark.launch.common import run

        run(main)
    else:
        try:
            main(sys.argv[1:])
        except DataError as error:
            sys.exit(f"error: {error}")
