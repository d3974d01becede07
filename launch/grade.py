"""Grade the predictions in a file by a benchmark's rule. No model is loaded.

    python launch/grade.py FILE [--benchmark NAME] [--json OUT]

FILE is a JSON array or JSON lines; each row has choices, answer and a prediction, as in the benchmarks' own files.
"""

import argparse

from hark.data.benchmarks.answer_files import BENCHMARKS
from hark.data.benchmarks.grading import grade_file
from hark.launch.common.entry import run


def main(argv: list[str]) -> None:
    options = parse(argv)
    grade_file(options.file, benchmark=options.benchmark, out=options.json)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="mmau", help="benchmark whose rule is used (mmau)")
    parser.add_argument("--json", metavar="OUT", help="write the figures and the grade of each row to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
