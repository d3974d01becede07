"""launch/check_data.py: every line and clip is accounted for, and what cannot be used fails the check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hark.data import clips
from hark.data.errors import DataError
from hark.launch import check_data
from tests.clips import HOSTILE, write_questions

LONG = ("a choice much longer than any other", "rain", "a bell", "wind")


def noise(seconds, rate, channels=1):
    return np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 0.1


def write(directory: Path, count: int = 8, **changes) -> Path:
    """Questions as tests/clips.py makes them, the first four about clips of different kinds."""
    path = write_questions(directory, count, **changes)
    soundfile.write(directory / "train-0.wav", noise(0.5, 16_000), 16_000)
    soundfile.write(directory / "train-1.wav", noise(1.5, 44_100, channels=2), 44_100)
    soundfile.write(directory / "train-2.wav", noise(2.5, 8_000), 8_000)
    return path


def check(path: Path, *options: str) -> dict:
    """The figures of a file, whether or not all of it can be used."""
    out = path.parent / "figures.json"
    try:
        check_data.main([str(path), "--json", str(out), "--workers", "2", *options])
    except DataError:
        pass
    return json.loads(out.read_text(encoding="utf-8"))


def test_lengths_rates_and_channels_are_those_of_the_decoded_clips(tmp_path):
    path = write(tmp_path, 4, line4={"audio_path": "train-2.wav"})
    figures = check(path)
    assert (figures["questions"], figures["clips"]) == (4, 3), "a clip that two questions share counts once"
    expected = {"min": 0.5, "median": 1.5, "mean": 1.5, "max": 2.5, "total": 4.5}
    assert figures["seconds"] == pytest.approx(expected, abs=1e-3)
    assert figures["lengths"] == {"up to 1 s": 1, "up to 2 s": 1, "up to 5 s": 1}
    assert figures["sample_rates"] == {"16000": 1, "44100": 1, "8000": 1}
    assert figures["channels"] == {"1": 2, "2": 1}
    assert not any(figures["faults"].values())


def test_a_shared_clip_is_decoded_once(tmp_path, monkeypatch):
    decoded, look = [], clips.inspect
    monkeypatch.setattr(clips, "inspect", lambda clip, *rest: decoded.append(clip.source.name) or look(clip, *rest))
    path = write(tmp_path, 4, line4={"audio_path": "train-2.wav"})
    figures = check(path)
    assert sorted(decoded) == ["train-0.wav", "train-1.wav", "train-2.wav"]
    assert check(path) == figures and len(decoded) == 3, "and its figures are remembered"


def test_answers_are_counted_by_place_with_what_guessing_scores(tmp_path):
    # The answers of the eight questions are at places 0 1 2 3 0 1 2 3; "a bell" is the longest choice, at place 1.
    figures = check(
        write(
            tmp_path,
            line1={"multi_choice": list(LONG)},
            line8={"multi_choice": ["rain", "wind", "dog"], "answer": 0, "task": "music"},
        )
    )
    assert figures["choices"] == {"3": 1, "4": 7}
    assert figures["answers"] == {"1": 3, "2": 2, "3": 2, "4": 1}
    assert (figures["always_first_accuracy"], figures["longest_choice_accuracy"]) == (3 / 8, 4 / 8)
    assert figures["chance"] == pytest.approx((7 / 4 + 1 / 3) / 8)
    assert figures["tasks"] == {"sound": 7, "music": 1} and figures["datasets"] == {"test": 8}


def spoil(directory: Path) -> None:
    (directory / "train-3.wav").unlink()
    (directory / "train-4.wav").write_bytes(b"no sound")
    soundfile.write(directory / "train-5.wav", np.zeros(8000), 16_000)
    soundfile.write(directory / "train-6.wav", noise(4.0, 16_000), 16_000)
    whole = (directory / "train-2.wav").read_bytes()
    (directory / "train-2.wav").write_bytes(whole[: len(whole) // 2])


def test_each_fault_is_listed_with_its_line_and_fails_the_check(tmp_path, capsys):
    path = write(tmp_path, 9, line8={"answer": 7}, line9={"audio_path": "train-3.wav"})
    spoil(tmp_path)
    with pytest.raises(DataError, match="7 of 9 questions cannot be used"):
        check_data.main([str(path), "--max-seconds", "3"])
    said = capsys.readouterr().out
    figures = check(path, "--max-seconds", "3")
    places = {name: [Path(fault["file"]).name for fault in faults] for name, faults in figures["faults"].items()}
    assert places == {
        "bad line": ["train.jsonl:8"], "missing": ["train.jsonl:4", "train.jsonl:9"], "silent": ["train.jsonl:6"],
        "over-long": ["train.jsonl:7"], "cut off": ["train.jsonl:3"], "not decodable": [], "broken": ["train.jsonl:5"],
    }  # fmt: skip
    for reason in (
        "train.jsonl:4: ",
        "no such file",
        "is silent",
        "is cut off",
        "is 4.00 s long",
        "cannot be decoded",
        "out of range",
    ):
        assert reason in said
    assert figures["seconds"]["max"] == pytest.approx(4.0), "an over-long clip's length is part of what the file holds"
    assert not check(path)["faults"]["over-long"], "30 s by default"


def test_only_the_first_of_many_faults_are_shown_and_all_are_in_the_json(tmp_path, capsys):
    path = write(tmp_path, 9, **{f"line{n}": {"audio_path": "gone.wav"} for n in range(2, 10)})
    assert len(check(path)["faults"]["missing"]) == 8
    said = capsys.readouterr().out
    assert said.count("no such file") == 5 and "and 3 more" in said


def test_a_benchmark_without_answers_is_checked_all_the_same(tmp_path, capsys):
    path = write(tmp_path, 4, line1={"answer": None}, line2={"multi_choice": ["Man", "man"]})
    assert len(check(path)["faults"]["bad line"]) == 2
    figures = check(path, "--benchmark")
    assert not any(figures["faults"].values()) and figures["unanswered"] == 1
    assert figures["answers"] == {"2": 1, "3": 1, "4": 1} and figures["always_first_accuracy"] == 0
    figures = check(write(tmp_path, 4, **{f"line{n}": {"answer": None} for n in range(1, 5)}), "--benchmark")
    assert figures["answers"] == {} and not {"always_first_accuracy", "chance"} & figures.keys()


def test_the_command_says_what_it_found_and_exits_by_it(tmp_path):
    path = write(tmp_path)

    def run() -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, check_data.__file__, str(path), "--workers", "1"]
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    good = run()
    assert good.returncode == 0 and "all questions can be used" in good.stdout, good.stderr
    spoil(tmp_path)
    bad = run()
    assert (
        bad.returncode == 1
        and bad.stderr == f"error: {path}: 4 of 8 questions cannot be used; data.skip_bad=true leaves them out\n"
    )


def test_names_in_the_data_cannot_steer_the_terminal_and_are_cut(tmp_path, capsys):
    path = write(
        tmp_path,
        line1={"dataset_name": HOSTILE, "task": HOSTILE},
        line2={"audio_path": HOSTILE + ".wav"},
        line3={"id": HOSTILE, "answer": 9},
        line4={HOSTILE: 1},
    )
    check(path)
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) > 10 and all(line.isprintable() and len(line) < 1000 for line in lines)
    assert sum(r"\x1b[2J" in line for line in lines) >= 4
