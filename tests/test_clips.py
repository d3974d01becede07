"""data/clips.py and data/clip_memory.py: what decoding found, what is remembered of it, and what can be used."""

from __future__ import annotations

import os
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import soundfile

from hark.data import clips
from hark.data.clip import Clip
from hark.data.clip_memory import ClipMemory, State, default_path
from hark.data.clips import Rules, clips_in, inspect, inspect_all, memory_of, usable
from hark.data.errors import AudioError
from hark.data.examples import Example
from tests.clips import waveform

RULES = Rules(16_000, 2.0)


def on_disk(tmp_path):
    soundfile.write(tmp_path / "good.wav", waveform(1.0, 0), 16_000)
    soundfile.write(tmp_path / "long.wav", waveform(3.0, 0), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    names = ["good.wav", "missing.wav", "long.wav", None, "silent.wav"]
    return [
        Example(
            f"id{i}", (Clip(tmp_path / name),) if name else (), "Which?", ("a", "b"), 0, line=f"train.jsonl:{i + 1}"
        )
        for i, name in enumerate(names)
    ]


def sorted_out(data, *, max_seconds=2.0, long_clips="error", skip_bad=False):
    rules = Rules(16_000, max_seconds, crop=long_clips == "crop")
    found = {clip: inspect(clip, rules) for clip in clips_in(data)}
    return usable(data, found, long_clips=long_clips, skip_bad=skip_bad)


def test_the_check_before_a_run_names_bad_clips_by_their_line(tmp_path):
    with pytest.raises(AudioError) as error:
        sorted_out(on_disk(tmp_path))
    text = str(error.value)
    assert text.startswith("3 of 5 clips cannot be used")
    for part in (
        "train.jsonl:2: ",
        "no such file",
        "train.jsonl:3: ",
        "3.00 s",
        "train.jsonl:5: ",
        "silent.wav: is sil",
    ):
        assert part in text


def test_the_check_leaves_out_what_the_settings_skip(tmp_path):
    data = on_disk(tmp_path)
    good, bad = sorted_out(data, skip_bad=True)
    assert good == [data[0], data[3]] and [one.line[-1] for one in bad] == ["2", "3", "5"]
    assert sorted_out(data, skip_bad=True, long_clips="crop")[0] == [data[0], data[2], data[3]]
    good, bad = sorted_out([data[0], data[2]], long_clips="skip")
    assert good == [data[0]] and [one.id for one in bad] == ["id2"]
    with pytest.raises(AudioError, match="1 of 1 clips"):
        sorted_out(data[1:2], skip_bad=True)


def test_the_check_tells_the_length_of_each_clip_that_is_used(tmp_path):
    data = on_disk(tmp_path)
    kept = [data[0], data[2], data[3]]
    good, _ = sorted_out(kept, max_seconds=4.0)
    assert [example.seconds for example in good] == [1.0, 3.0, None]
    assert good == kept, "a measurement makes no other question of it"
    assert [example.seconds for example in sorted_out(kept, long_clips="crop")[0]] == [1.0, 2.0, None]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded."""
    names: list[str] = []
    monkeypatch.setattr(clips, "inspect", lambda clip, *rest: names.append(clip.source.name) or inspect(clip, *rest))
    return names


def look(paths, path, rules=RULES):
    memory = ClipMemory(repr(rules), path)
    return dict(inspect_all(paths, rules, workers=2, memory=memory)), memory.problem


def test_a_clip_is_decoded_once_until_its_content_or_the_rules_change(tmp_path, decoded):
    found, base = clips_in(on_disk(tmp_path)), tmp_path / "memory"
    first, _ = look(found, base)
    assert [finding.fault for finding in first.values()] == ["", "missing", "over-long", "silent"]
    assert look(found, base) == (first, "") and decoded.count("good.wav") == decoded.count("silent.wav") == 1
    assert decoded.count("missing.wav") == 2, "nothing is known of what is not there"
    decoded.clear()
    os.utime(found[0].source, (1, 1))
    for _ in range(2):
        assert look(found[:1], base)[0] == {found[0]: first[found[0]]} and not decoded, "another time, the same content"
    content = bytearray(found[0].source.read_bytes())
    content[44:] = bytes(len(content) - 44)
    found[0].source.write_bytes(content)
    assert look(found[:1], base)[0][found[0]].fault == "silent", "the same size, another content"
    assert look(found[2:3], base, Rules(16_000, 2.0, crop=True))[0][found[2]].seconds == 2.0
    assert decoded == ["good.wav", "long.wav"]


def test_the_rules_that_the_memory_tells_apart_are_all_on_which_decoding_depends():
    different = [RULES, Rules(8_000, 2.0), Rules(16_000, 3.0), Rules(16_000, 2.0, crop=True)]
    assert len({memory_of(rules)._rules for rules in different}) == 4


def test_a_memory_that_cannot_be_used_stops_nothing_and_says_so(tmp_path, decoded):
    paths = clips_in(on_disk(tmp_path)[:1])
    (tmp_path / "broken").write_text("no database at all, but text that is long enough to be read as one" * 20)
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "strange") as strange:
        strange.execute("CREATE TABLE clips (path TEXT)")
    for name in ("broken", "other", "strange", "broken/below"):
        found, problem = look(paths, tmp_path / name)
        assert found[paths[0]].seconds == 1.0 and problem
    assert decoded == ["good.wav"] * 4


def write_many(path, worker):
    memory = ClipMemory("rules", path)
    for number in range(4):
        memory.remember({f"{path}/{worker}-{number}": (State(1, 2, "3"), str(worker))})
    return memory.problem


def test_several_processes_may_write_at_once(tmp_path):
    path = tmp_path / "memory"
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as processes:
        assert list(processes.map(write_many, [path] * 3, range(3))) == ["", "", ""]
    names = [f"{path}/{worker}-{number}" for worker in range(3) for number in range(4)]
    assert len(ClipMemory("rules", path).recall(names)) == 12


def test_the_memory_is_in_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "hark" / "clips.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "hark" / "clips.sqlite"
