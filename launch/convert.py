"""Convert a published data set, or your own CSV file, to the R1-AQA format.

    python launch/convert.py SOURCE INPUT OUTPUT.jsonl [--audio DIRECTORY] [--test-share 0.2] [--strict] [--force]

SOURCE is avqa, avqa_processed, audiomcq, audio_flamingo, mmau, mmar or mmsu; data/sources/SOURCE.py describes INPUT.
SOURCE csv is your own file with the columns audio, question, choices (as dog|car|rain, or columns choice_1, choice_2,
...; none for open questions), answer (text, letter or number from 1) and, if you like, start, end, id and task;
data/sources/own_csv.py has the details.
Rows that cannot be converted are counted, and listed in OUTPUT.bad.jsonl with row and reason.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hark.data.errors import DataError
from hark.data.examples import parse_example
from hark.data.order import hold_out
from hark.data.sources import SOURCES, find_source
from hark.data.sources.conversion import Conversion, convert, write, write_bad
from hark.launch.common.entry import run
from hark.shown import LONGEST_NAME, say, shown

SHOWN = 5  # missing clips named on the console


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    source, output = find_source(arguments.source), arguments.output
    if arguments.drop_view and source.is_visual is None:
        raise DataError(
            f"--drop-view: {arguments.source} does not say which questions are about the picture; only avqa does"
        )
    if output.exists() and not arguments.force:
        raise DataError(f"{output}: exists already; name another file, or overwrite it with --force")
    if output.exists() and output.samefile(arguments.input):
        raise DataError(f"{output}: is the input; name another file")
    test = test_part(output, arguments.test_share, force=arguments.force, benchmark=source.benchmark)
    audio = arguments.audio or arguments.input.parent
    result = convert(source, arguments.input, audio=audio, root=output.parent, drop_visual=arguments.drop_view)
    listed = output.with_suffix(".bad.jsonl")
    write_bad(result, listed)
    report(result, listed)
    if not result.records:
        first = f", first {result.bad[0].line}: {result.bad[0].reason}" if result.bad else ""
        raise DataError(f"{arguments.input}: no row could be converted; is it a file of {arguments.source}?{first}")
    if arguments.strict and result.bad:
        raise DataError(f"{len(result.bad)} rows cannot be converted, and --strict was given; {output} was not written")
    parts = {output: result.records}
    if test is not None:
        parts = dict(zip((output, test), split(result.records, arguments.test_share, output.parent), strict=True))
    for path, records in parts.items():
        write(replace(result, records=records), path, benchmark=source.benchmark)
        say(f"wrote {path}: {len(records)} questions")
    if not audio.resolve().is_relative_to(output.parent.resolve()):
        say(f"the clips are outside of {output.parent}; to read them there, set data.audio_root={audio}")
    left = output.with_name("test.jsonl")
    if left.exists() and left not in parts:
        say(f"{left} is as it was before; --test-share 0.2 would write it from a part of these questions")


def test_part(output: Path, share: float | None, *, force: bool, benchmark: bool) -> Path | None:
    """Where the questions for testing are written, if there shall be some."""
    if share is None:
        return None
    if not 0 < share < 1:
        raise DataError(f"--test-share must be between 0 and 1, not {share:g}")
    if benchmark:
        raise DataError("--test-share: a benchmark is not split; all of its questions are for testing")
    test = output.with_name("test.jsonl")
    if test == output or test.exists() and not force:
        raise DataError(
            f"{test}: --test-share writes this file; it must be another than OUTPUT and new, or give --force"
        )
    return test


def split(records: list[dict], share: float, root: Path) -> tuple[list[dict], list[dict]]:
    """The questions to train on and those to test on, by whole clips."""
    examples = [parse_example(record, root=root, line=record["id"]) for record in records]
    count = max(round(share * len(records)), 1)
    tested = {example.id for example in hold_out(examples, count, seed=0)[1]}
    return [r for r in records if r["id"] not in tested], [r for r in records if r["id"] in tested]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument("input", type=Path, metavar="INPUT", help="JSON or JSON lines; a CSV file for csv")
    parser.add_argument("output", type=Path, metavar="OUTPUT.jsonl")
    parser.add_argument("--audio", type=Path, metavar="DIRECTORY", help="directory of the clips (INPUT's directory)")
    parser.add_argument("--drop-view", action="store_true", help="leave out questions about picture or colour (avqa)")
    parser.add_argument(
        "--test-share",
        type=float,
        metavar="SHARE",
        help="write this share of the questions, by whole clips, to test.jsonl",
    )
    parser.add_argument("--strict", action="store_true", help="fail if a row cannot be converted")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT")
    return parser.parse_args(argv)


def report(result: Conversion, listed: Path) -> None:
    say(f"{result.read:8} rows read")
    say(f"{len(result.records):8} questions")
    if result.visual:
        say(f"{result.visual:8} about the picture or a colour, dropped")
    for kind, count in result.kinds.most_common():
        say(f"{count:8} left out: {kind}")
    if result.missing:
        first = ", ".join(shown(name, LONGEST_NAME) for name in list(result.missing)[:SHOWN])
        say(f"{len(result.missing):8} clips are missing, first {first}")
    if result.renamed:
        say(f"{result.renamed:8} repeated ids have a number added, as in id#2")
    if opened := sum(not record["multi_choice"] for record in result.records):
        say(f"{opened:8} of the questions are open: they have no choices")
    unanswered = sum(record["answer"] is None for record in result.records)
    if unanswered:
        say(f"{unanswered:8} of the questions have no known answer")
    if result.bad:
        say(f"rows that were left out are listed in {listed}")


if __name__ == "__main__":
    run(main)
