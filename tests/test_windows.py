"""A window of a clip: which samples it has, what is decoded for it, and what is remembered of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from hark.data import clip_memory, clips
from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.clip_memory import ClipMemory
from hark.data.clips import Rules, clips_in, inspect, inspect_all, usable
from hark.data.errors import AudioError, DataError, SkippedClipError
from hark.data.examples import load_examples
from tests.clips import waveform

RATE = 16_000
WINDOWS = ((0, 1), (1.234, 2.5), (2.5, None), (2.9, 3), (0.7, 3.04))
FORMATS = ("wav", "flac", "ogg", "mp3")


def load(clip, max_seconds=30.0, **options):
    return load_waveform(clip, sample_rate=RATE, max_seconds=max_seconds, **options)


def save(path, seconds=3.0, rate=RATE):
    noise = 0.1 * np.random.default_rng(0).normal(size=(round(seconds * rate), 2))
    soundfile.write(path, noise.astype(np.float32), rate)
    return path


@pytest.mark.parametrize("rate", [16_000, 44_100, 22_050, 8_000])
@pytest.mark.parametrize("name", FORMATS)
def test_a_window_is_exactly_that_part_of_the_whole_waveform(tmp_path, name, rate):
    path = save(tmp_path / f"a.{name}", rate=rate)
    whole = load(path)
    for start, end in WINDOWS:
        expected = whole[round(start * RATE) : None if end is None else round(end * RATE)]
        # A filter over another number of samples adds them in another order: 1e-6 is rounding at an amplitude of 0.4.
        np.testing.assert_allclose(load(Clip(path, start, end)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_window_is_decoded_where_the_format_can_be_sought(tmp_path, name, monkeypatch):
    path, decoded = save(tmp_path / f"a.{name}", seconds=30.0, rate=44_100), []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, out: decoded.append(len(out)) or read(file, out=out))
    load(Clip(path, 20.0, 21.0))
    # Ogg files are decoded from their beginning, because libsndfile seeks wrongly in them.
    assert sum(decoded) / 44_100 == pytest.approx(21.05 if name == "ogg" else 1.1, abs=0.01)


@pytest.mark.parametrize(("start", "end"), [(3, None), (4, 5), (2, 3.06), (0, 9), (3.5, 3.6)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_window_outside_of_its_clip_is_an_error_with_its_length(tmp_path, name, start, end):
    clip = Clip(save(tmp_path / f"a.{name}"), start, end)
    with pytest.raises(AudioError) as error:
        load(clip)
    assert str(error.value) == f"{clip}: is not within the clip, which is 3.00 s long; correct start and end"
    assert f"a.{name} ({start} s to " in str(error.value)


def test_the_longest_clip_is_a_limit_of_the_window_and_not_of_the_file(tmp_path):
    path = save(tmp_path / "a.wav", seconds=10.0)
    assert len(load(Clip(path, 4, 6), max_seconds=2)) == 2 * RATE
    with pytest.raises(AudioError, match=r"a.wav \(4 s to 7 s\): is 3.00 s long; expected at most 2 s"):
        load(Clip(path, 4, 7), max_seconds=2)
    with pytest.raises(SkippedClipError, match=r"a.wav \(4 s to the end\): is 6.00 s long"):
        load(Clip(path, 4), max_seconds=2, long_clips="skip")
    whole = load(path)
    for end in (7, None):
        assert np.array_equal(load(Clip(path, 4, end), 2, long_clips="crop"), whole[4 * RATE : 6 * RATE])


def test_silence_is_that_of_the_window(tmp_path):
    samples = np.concatenate([np.zeros(RATE), waveform(1.0, 0)])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    assert load(Clip(tmp_path / "a.wav", 1, 2)).any()
    with pytest.raises(AudioError, match=r"\(0 s to 0.9 s\): is silent"):
        load(Clip(tmp_path / "a.wav", 0, 0.9))


ROW = {"id": 1, "audio_path": "a.wav", "question_text": "Which?", "multi_choice": ["a", "b"], "answer": 0}


def rows(tmp_path, *changes):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({**ROW, "id": n, **change}) + "\n" for n, change in enumerate(changes)))
    return path


def test_a_bad_window_is_named_with_its_row_before_a_run(tmp_path):
    save(tmp_path / "a.wav")
    examples, _ = load_examples(rows(tmp_path, {"end": 1}, {"start": 2, "end": 5.5}))
    found = {clip: inspect(clip, Rules(RATE, 30.0)) for clip in clips_in(examples)}
    with pytest.raises(AudioError, match=r"train.jsonl:2: .*a.wav \(2 s to 5.5 s\): is not within .* 3.00 s long"):
        usable(examples, found, long_clips="error", skip_bad=False)
    good, bad = usable(examples, found, long_clips="error", skip_bad=True)
    assert [example.seconds for example in good] == [1.0] and len(bad) == 1


def test_each_window_is_decoded_once_and_a_file_is_read_once_for_all_of_its_windows(tmp_path, monkeypatch):
    path, decoded, read = save(tmp_path / "a.wav"), [], []
    monkeypatch.setattr(clips, "inspect", lambda clip, *rest: decoded.append(str(clip)) or inspect(clip, *rest))
    digest = clip_memory._digest
    monkeypatch.setattr(clip_memory, "_digest", lambda path: read.append(path) or digest(path))
    rules = Rules(RATE, 30.0)
    windows = [Clip(path), Clip(path, 0, 1), Clip(path, 1, 2), Clip(path, 1)]

    def look(windows):
        return dict(inspect_all(windows, rules, workers=2, memory=ClipMemory("rules", tmp_path / "memory")))

    assert [finding.seconds for finding in look(windows).values()] == [3.0, 1.0, 1.0, 2.0]
    assert len(decoded) == 4 and len(read) == 1
    assert look([*windows, Clip(path, 1, 2.5)])[windows[1]].seconds == 1.0
    assert decoded[4:] == [str(Clip(path, 1, 2.5))], "only the new window is decoded"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": -1}, '"start" is -1; expected seconds, 0 or more'),
        ({"end": "3"}, "\"end\" is '3'; expected seconds"),
        ({"end": True}, '"end" is True; expected seconds'),
        ({"start": 2, "end": 2}, '"end" is 2 and "start" is 2; expected an end after the start'),
        ({"start": [1]}, r'"start" is \[1\]; expected seconds'),
        ({"audio_path": None, "audio_paths": ["a", "b"], "start": 1}, '"start" is 1; expected a list of 2'),
        ({"audio_path": None, "audio_paths": ["a", "b"], "end": [1]}, r'"end" is \[1\]; expected a list of 2'),
    ],
)
def test_a_window_that_is_none_is_an_error_of_its_row(tmp_path, change, message):
    with pytest.raises(DataError, match=f"train.jsonl:2: {message}"):
        load_examples(rows(tmp_path, {}, change))


def test_each_of_several_clips_may_have_its_own_window(tmp_path):
    change = {"audio_path": None, "audio_paths": ["a.wav", "a.wav"], "start": [1, None], "end": [None, 2.5]}
    ((example,), _) = load_examples(rows(tmp_path, change))
    path = tmp_path / "a.wav"
    assert example.clips == (Clip(path, 1.0), Clip(path, 0.0, 2.5))
