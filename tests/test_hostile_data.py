"""data/: a hostile or damaged file of questions or clip is an error of one sentence, or a counted skip."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from functools import partial

import numpy as np
import pytest
import soundfile

from hark.data.audio import load_waveform
from hark.data.errors import AudioError, CutClipError, DataError
from hark.data.examples import BadExample, load_examples
from hark.data.loader import BadLog
from hark.launch import check_data, new_model
from hark.launch.common.config_file import config_of
from hark.launch.common.prompt_lengths import planned_examples
from hark.launch.page.evaluated import _questions
from tests.clips import grown_by, waveform

GOOD = {"id": "good", "audio_path": "a.wav", "question_text": "Which?", "multi_choice": ["a", "b"], "answer": 0}


def write(tmp_path, *rows):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(GOOD), *(row if isinstance(row, str) else json.dumps(GOOD | row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(path):
    return load_waveform(path, sample_rate=16_000, max_seconds=30.0, long_clips="crop")


def wav(path, *, channels=1, rate=16_000, samples=None, promised=None):
    """A wav file of 16 bits with any header."""
    sound = waveform(2.0, 0) if samples is None else samples
    content = (sound * 32767).astype("<i2").tobytes()
    length = len(content) if promised is None else promised
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16)
    head = b"RIFF" + struct.pack("<I", length + 36 & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + form
    path.write_bytes(head + b"data" + struct.pack("<I", length) + content)
    return path


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["\u2028", "\u0085", "\r", "\n", "\ud800"])
def test_no_character_of_an_id_breaks_the_list_of_bad_examples(tmp_path, letter):
    bad = BadExample("train.jsonl:1", f"x{letter}y", f"why{letter}")
    log = BadLog(tmp_path / "bad.jsonl")
    log.add(bad)
    BadLog(log.path).add(bad)
    (line,) = log.path.read_bytes().split(b"\n")[:-1]
    assert json.loads(line) == bad.record(), "once, and as it was"


def test_a_line_of_the_list_that_a_crash_cut_short_spoils_no_other(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"file": "train.jsonl:1", "i')
    bad = BadExample("train.jsonl:2", "x", "why")
    BadLog(tmp_path / "bad.jsonl").add(bad)
    BadLog(tmp_path / "bad.jsonl").add(bad)
    assert json.loads((tmp_path / "bad.jsonl").read_bytes().split(b"\n")[1]) == bad.record()
    assert (tmp_path / "bad.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "line", [b"[" * 200_000, b'{"file": [1], "id": "x"}', b'{"file": "a", "id": {}}', b"[1]", b"\xff"]
)
def test_a_line_of_the_list_that_no_run_writes_is_ignored(tmp_path, line):
    bad = BadExample("train.jsonl:2", "x", "why")
    (tmp_path / "bad.jsonl").write_bytes(line + b"\n")
    BadLog(tmp_path / "bad.jsonl").add(bad)
    assert (tmp_path / "bad.jsonl").read_bytes() == line + b"\n" + bad.json_line().encode()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 2, "question_text": "a\ud800"}, "half of a surrogate pair"),
        ({"id": 2, "own\udc00": 1}, "half of a surrogate pair"),
        ({"id": 2, "own": 10**25}, "an integer of 26 digits"),
        ('{"id": 2, "own": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ('{"id": 2, "own": ' + "[" * 200 + "]" * 200 + "}", "nested more than 64 deep"),
        ('{"id": 2, "own": ' + "[" * 99_999 + "]" * 99_999 + "}", "not valid JSON"),
        ('{"id": 2, "id": 3}', "repeats the key 'id'"),
        ('{"id": 2, "own": [{"a": 1, "a": 2}]}', "repeats the key 'a'"),
        ({"id": 2, "start": 1e300}, "seconds; expected a time within the clip"),
        ({"id": 2, "audio_path": "a\0.wav"}, "holds a character of code 0"),
    ],
)
def test_a_row_that_no_program_can_hold_is_an_error_of_that_row_alone(tmp_path, row, message):
    path = write(tmp_path, row)
    with pytest.raises(DataError, match=message) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:2: ")
    good, bad = load_examples(path, skip_bad=True)
    assert [example.id for example in good] == ["good"] and [one.line for one in bad] == [f"{path}:2"]


def test_in_an_array_too_only_the_row_with_a_repeated_key_or_a_huge_number_is_bad(tmp_path):
    path = tmp_path / "train.json"
    rows = [json.dumps(GOOD), '{"id": 2, "id": 3}', '{"id": 4, "own": ' + "9" * 5000 + "}"]
    path.write_text(f"[{','.join(rows)}]")
    good, bad = load_examples(path, skip_bad=True)
    assert len(good) == 1 and len(bad) == 2


def test_a_repeated_key_among_many_is_found_in_one_pass(tmp_path):
    keys = [f"k{n}" for n in range(40_000)]
    path = write(tmp_path, "{" + ", ".join(f'"{key}": 0' for key in [*keys, keys[-1]]) + "}")
    started = time.monotonic()
    with pytest.raises(DataError, match="repeats the key 'k39999'"):
        load_examples(path)
    assert time.monotonic() - started < 20, "a tenth of a second; a pass for each key would take minutes"


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_a_pipe_in_place_of_a_file_of_questions_is_an_error_and_no_wait(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe, a socket or a device"):
        load_examples(tmp_path / name)


def test_a_damaged_parquet_file_is_an_error_of_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [GOOD | {"id": str(n), "question_text": f"Which of {n * 7919}?"} for n in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet")
    whole, choose = (tmp_path / "whole.parquet").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(choose.choice([1, 4, 40])):
            content[choose.randrange(len(content))] = choose.randrange(256)
        (tmp_path / "a.parquet").write_bytes(content[: choose.choice([len(content), choose.randrange(len(content))])])
        try:
            load_examples(tmp_path / "a.parquet", skip_bad=True)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


# Clips ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"rate": 10**9}, "has a sample rate of 1000000000 Hz; expected 1000 to 768000 Hz"),
        ({"rate": 1}, "has a sample rate of 1 Hz"),
        ({"channels": 1023}, "has 1023 channels; expected at most 64"),
        ({"channels": 65_535}, "cannot be decoded|channels; expected at most 64"),
        ({"channels": 0}, "cannot be decoded"),
        ({"promised": 4_000_000_000 // 2}, "is cut off"),
    ],
)
def test_a_header_that_no_clip_has_is_refused_before_it_costs_memory(tmp_path, header, message):
    path = wav(tmp_path / "a.wav", **header)
    with pytest.raises(AudioError, match=message):
        load(path)


def test_memory_follows_what_is_in_a_file_and_not_what_its_header_claims(tmp_path):
    path = wav(tmp_path / "a.wav", channels=64, rate=768_000, promised=2**32 - 1)

    def work():
        with pytest.raises(AudioError):
            load(path)
            raise AudioError("decoded")

    assert grown_by(work) < 200 * 2**20, "30 s of 64 channels at 768 kHz are 5.5 GiB"


@pytest.mark.parametrize("peak", [17.0, 32_767.0, 1e38])
def test_samples_far_outside_of_full_scale_are_an_error(tmp_path, peak):
    sound = waveform(1.0, 0)
    soundfile.write(tmp_path / "a.wav", np.float64(sound) / np.abs(sound).max() * peak, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="has a peak of"):
        load(tmp_path / "a.wav")


def test_a_float_file_a_little_over_full_scale_is_kept(tmp_path):
    sound = waveform(1.0, 0)
    soundfile.write(tmp_path / "a.wav", sound / np.abs(sound).max() * 4, 16_000, subtype="FLOAT")
    assert np.abs(load(tmp_path / "a.wav")).max() == pytest.approx(4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("wav", {"subtype": "PCM_U8"}),
        ("wav", {"subtype": "PCM_16"}),
        ("wav", {"subtype": "PCM_24"}),
        ("wav", {"subtype": "FLOAT"}),
        ("wav", {"format": "WAVEX"}),
        ("wav", {"format": "RF64"}),
        ("flac", {}),
        ("ogg", {}),
        ("mp3", {}),
    ],
)
def test_wherever_a_file_is_cut_it_is_an_error(tmp_path, kind, options):
    path, choose = tmp_path / f"a.{kind}", random.Random(1)
    soundfile.write(path, waveform(1.0, 0), 16_000, **options)
    load(path)
    whole = path.read_bytes()
    for size in [*range(1, 64), *(len(whole) - n for n in range(1, 70)), *choose.sample(range(64, len(whole)), 60)]:
        path.write_bytes(whole[:size])
        with pytest.raises(AudioError):
            load(path)


def test_an_mp3_file_that_does_not_tell_its_length_is_cut_off_if_its_last_frame_is(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, waveform(1.0, 0), 16_000, bitrate_mode="CONSTANT")
    whole = path.read_bytes()
    assert (marked := whole.find(b"Info")) > 0 or (marked := whole.find(b"Xing")) > 0
    whole = whole[:marked] + b"none" + whole[marked + 4 :]
    path.write_bytes(whole + b"TAG" + b" " * 125)
    load(path)
    for lost in (1, 10, 50):
        path.write_bytes(whole[:-lost])
        with pytest.raises(CutClipError, match="its last frame"):
            load(path)


@pytest.mark.parametrize("tag", [b"", b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)], ids=["plain", "tagged"])
def test_a_whole_flac_file_that_holds_the_sync_bits_of_mp3_by_chance_is_not_cut_off(tmp_path, tag):
    noise = np.random.default_rng(3)
    for _ in range(60):  # of which three hold what looks like a cut frame of mp3
        samples = 0.1 * noise.standard_normal(int(16_000 * noise.uniform(0.05, 0.2)))
        soundfile.write(tmp_path / "a.flac", samples, 16_000)
        whole = tag + (tmp_path / "a.flac").read_bytes()
        (tmp_path / "b.flac").write_bytes(whole)
        assert len(load(tmp_path / "b.flac")) == len(samples)
        (tmp_path / "b.flac").write_bytes(whole[:-1])
        with pytest.raises(AudioError):
            load(tmp_path / "b.flac")


def test_a_format_that_is_not_documented_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.aiff", waveform(1.0, 0), 16_000)
    with pytest.raises(AudioError, match="is in the format AIFF; expected wav, flac, ogg or mp3"):
        load(tmp_path / "a.aiff")


def test_a_pipe_in_place_of_a_clip_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="no regular file"):
        load(tmp_path / "a.wav")


# Places --------------------------------------------------------------------------------------------------------------


def load_inside(tmp_path, audio_path, **options):
    (tmp_path / "data").mkdir(exist_ok=True)
    path = write(tmp_path / "data", {"id": 2, "audio_path": str(audio_path)})
    return load_examples(path, allow_outside=False, **options)


def test_a_path_that_leaves_the_directory_of_the_clips_is_an_error_of_its_row(tmp_path):
    wav(tmp_path / "secret.wav")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.wav").symlink_to(tmp_path / "secret.wav")
    (tmp_path / "data" / "folder").symlink_to(tmp_path)
    for place in ("../secret.wav", tmp_path / "secret.wav", "link.wav", "folder/secret.wav", "/dev/zero", "a/../../b"):
        with pytest.raises(DataError, match=r"train.jsonl:2: the clip .* is outside of .*data.allow_outside=true"):
            load_inside(tmp_path, place)
        assert len(load_inside(tmp_path, place, skip_bad=True)[1]) == 1
        path = write(tmp_path / "data", {"id": 2, "audio_path": str(place)})
        assert len(load_examples(path, allow_outside=True)[0]) == 2


def test_absolute_paths_and_dots_within_the_directory_are_kept(tmp_path):
    for place in (tmp_path / "data" / "a.wav", "b/../a.wav"):
        assert len(load_inside(tmp_path, place)[0]) == 2


def test_every_command_that_reads_questions_refuses_clips_outside_of_their_directory(tmp_path, capsys):
    wav(tmp_path / "secret.wav")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    path.write_text(json.dumps(GOOD | {"audio_path": "../secret.wav"}) + "\n")
    model = ["--data", str(path), "--size", "tiny", "--out"]
    for command in (partial(check_data.main, [str(path)]), partial(new_model.main, [*model, str(tmp_path / "m")])):
        with pytest.raises(DataError, match="is outside of .*--allow-outside"):
            command()
    check_data.main([str(path), "--allow-outside"])
    new_model.main([*model, str(tmp_path / "m"), "--allow-outside"])
    for allowed in (False, True):
        config = config_of([f"data.train={path}", f"data.allow_outside={allowed}", "model.path=m", "run.directory=r"])
        _, problem = _questions({"test": str(path), "allow_outside": allowed}, tmp_path)
        if allowed:
            assert len(planned_examples(config)[1]) == 1 and not problem
        else:
            with pytest.raises(DataError, match="is outside of"):
                planned_examples(config)
            assert "is outside of" in problem
