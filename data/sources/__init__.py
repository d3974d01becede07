"""Data sets that can be converted to the R1-AQA format, published ones and one's own: one module for each, and SOURCES.

Each module has a function from a row to a Question. To add a data set, add an entry to SOURCES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hark.data.errors import DataError, named
from hark.data.json_files import read_rows
from hark.data.sources import audio_flamingo, audiomcq, avqa, avqa_processed, mmar, mmau, mmsu, own_csv
from hark.data.sources.rows import Question


@dataclass(frozen=True)
class Source:
    """How the rows of a data set are read."""

    dataset: str  # the `dataset_name` of its questions
    question: Callable[[dict], Question]
    benchmark: bool = False  # keep equal choices, unknown answers and missing clips; never change ids
    rows: Callable[[str | Path], Iterator[tuple[str, dict | DataError]]] = read_rows  # the rows of a file
    is_visual: Callable[[dict], bool] | None = None  # whether a row's question is about the picture of a video


SOURCES: dict[str, Source] = {
    "avqa": Source("AVQA", avqa.question, is_visual=avqa.is_visual),
    "avqa_processed": Source("AVQA", avqa_processed.question),
    "audiomcq": Source("AudioMCQ", audiomcq.question),
    "audio_flamingo": Source("AudioFlamingo", audio_flamingo.question),
    "mmau": Source("MMAU", mmau.question, benchmark=True),
    "mmar": Source("MMAR", mmar.question, benchmark=True),
    "mmsu": Source("MMSU", mmsu.question, benchmark=True),
    "csv": Source("own", own_csv.question, rows=own_csv.rows),
}


def find_source(name: str) -> Source:
    """The source of that name; an unknown name is a DataError that suggests the nearest."""
    return named(SOURCES, name, kind="source")
