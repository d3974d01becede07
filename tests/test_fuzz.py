"""The short form of launch/studies/fuzz.py, and that it notices what it looks for."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil

import pytest

from hark import UserError
from hark.data.worker import LateError, WorkerError
from hark.launch import init
from hark.launch.studies import fuzz, fuzz_attempt, mutations
from hark.launch.studies.fuzz_inputs import TARGETS, NonsenseError

pytestmark = pytest.mark.slow

QUICK = ["questions, JSON", "questions, parquet", "wav", "flac", "ogg", "mp3", "configurations", "model directories"]


@pytest.fixture
def root(tmp_path, qwen2_audio_dir, monkeypatch):
    """A project without a run: the files of runs have tests of their own."""
    init.main([str(tmp_path / "project")])
    shutil.copytree(qwen2_audio_dir, tmp_path / "project" / "model")
    monkeypatch.setattr(fuzz, "make_project", lambda project: None)
    return tmp_path


def test_damaged_files_are_read_or_refused_by_a_sentence(root, capsys):
    fuzz.main(["--inputs", "800", "--root", str(root), "--only", *QUICK, "--page", os.devnull])
    last = capsys.readouterr().out.splitlines()[-1].split(" | ")
    inputs, accepted, refused = (int(cell.replace(",", "")) for cell in last[1:4])
    assert inputs == accepted + refused > 500 and min(accepted, refused) > 100


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (KeyError("x"), "traceback"), (NonsenseError("x"), "nonsense"), (MemoryError(), "memory"),
        (UserError("x"), "refused"),
    ],
)  # fmt: skip
def test_what_reading_raises_is_told_apart_and_the_good_file_is_put_back(root, monkeypatch, raised, kind):
    def read(one):
        assert one.path.read_bytes() != one.good
        raise raised

    target = dataclasses.replace(TARGETS["wav"], read=read)
    monkeypatch.setitem(TARGETS, "wav", target)
    fuzz_attempt.good_files.cache_clear()
    assert fuzz_attempt.attempt("wav", root, 0, 1).kind == kind
    _, files = fuzz_attempt.good_files("wav", root)
    assert all(path.read_bytes() == good for path, good in files.items())
    fuzz_attempt.good_files.cache_clear()


@pytest.mark.parametrize(("error", "kind"), [(LateError("late"), "hang"), (WorkerError("died"), "died")])
def test_a_process_that_hangs_or_dies_is_counted(root, error, kind):
    class Broken:
        def call(self, *arguments, timeout):
            raise error

    assert fuzz.outcome_in(Broken(), "wav", root, 0, 1).kind == kind


def test_an_input_is_known_by_its_number(tmp_path):
    good = b'{"a": [1, {"b": "text"}], "c": null}'

    def changed(number: int) -> bytes:
        path = tmp_path / "a.json"
        mutations.restored(path, good)
        chance = random.Random(number)
        mutations.of_file(path, good, chance)
        return path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 30 else b""

    first = [changed(number) for number in range(300)]
    assert first == [changed(number) for number in range(300)] and len(set(first)) > 200
