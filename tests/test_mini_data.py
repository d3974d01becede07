"""The demo's dataset: balanced without the audio, held out by source, repeatable, and complete without the extras."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.random import default_rng

from hark.data.mini import build as mini
from hark.data.mini import clips, soundfont, synthesis
from hark.data.mini import sound as mini_sound

SIZES = {"train": 240, "validation": 24, "test": 120}
KEYS = {
    "id", "audio_path", "question_text", "multi_choice", "answer", "dataset_name", "task", "category", "source",
}  # fmt: skip


def read(directory: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mini")
    mini.build(directory, **SIZES)
    return directory


@pytest.fixture
def without_extras(monkeypatch):
    """None in sys.modules makes an import fail as if the package were not installed."""
    for package in ("tinysoundfont", "espeakng_loader"):
        monkeypatch.setitem(sys.modules, package, None)
    soundfont.player.cache_clear()
    yield
    soundfont.player.cache_clear()


def assert_complete(directory: Path, sizes: dict[str, int]) -> None:
    for split, size in sizes.items():
        records = read(directory, split)
        assert len(records) == size
        assert len({record["id"] for record in records}) == size
        by_task = Counter(record["task"] for record in records)
        assert set(by_task) == {"sound", "music", "speech"}
        assert max(by_task.values()) - min(by_task.values()) <= mini.CHOICES
        for record in records:
            assert set(record) == KEYS
            assert len(set(record["multi_choice"])) == mini.CHOICES
            assert all(choice == choice.lower() for choice in record["multi_choice"])


def assert_balanced(directory: Path, split: str) -> None:
    prompts, durations = defaultdict(list), defaultdict(list)
    for number, record in enumerate(read(directory, split)):
        prompt = (record["question_text"], *record["multi_choice"])
        prompts[prompt].append(record["answer"])
        info = soundfile.info(directory / record["audio_path"])
        durations[number // mini.CHOICES].append((prompt, info.frames))
    for answers in prompts.values():
        counts = Counter(answers)
        assert [counts[answer] for answer in range(mini.CHOICES)] == [len(answers) // mini.CHOICES] * mini.CHOICES
    for clips_of_set in durations.values():
        assert len(set(clips_of_set)) == 1


def test_every_split_has_its_size_its_keys_and_the_three_tasks_equally(built):
    assert_complete(built, SIZES)


@pytest.mark.parametrize("split", mini.SPLITS)
def test_each_answer_is_right_equally_often_for_each_prompt_and_duration(built, split):
    assert_balanced(built, split)


def test_an_answer_in_a_fixed_place_or_by_its_text_scores_a_quarter(built):
    records = read(built, "test")
    for place in range(mini.CHOICES):
        assert np.mean([record["answer"] == place for record in records]) == 0.25
    longest = [max(range(mini.CHOICES), key=lambda index, r=record: r["multi_choice"][index]) for record in records]
    assert np.mean([record["answer"] == guess for record, guess in zip(records, longest, strict=True)]) == 0.25


def test_no_source_of_the_test_split_is_in_another(built):
    def sources(split: str) -> dict[str, set[str]]:
        found = defaultdict(set)
        for record in read(built, split):
            found[record["category"]].update(record["source"].split("+"))
        return found

    held_out = sources("test")
    for split in ("train", "validation"):
        for category, names in sources(split).items():
            assert not names & held_out[category], category


def test_every_category_is_in_the_training_and_test_splits(built):
    assert {r["category"] for r in read(built, "train")} == {r["category"] for r in read(built, "test")}


def test_clips_are_16_bit_mono_and_audible_and_never_clip(built):
    for record in read(built, "train") + read(built, "test"):
        info = soundfile.info(built / record["audio_path"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        wave, _ = soundfile.read(built / record["audio_path"])
        assert 1.4 < len(wave) / clips.SAMPLE_RATE <= 3.0
        assert 0.4 < np.abs(wave).max() < 0.99, record
        assert wave.std() > 0.005, record
        assert abs(wave.mean()) < 0.02, record
        assert np.abs(wave[[0, -1]]).max() < 0.05, record


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    sizes = {"train": 52, "validation": 0, "test": 12}
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        mini.build(tmp_path / name, seed=seed, **sizes)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "third")


def test_without_the_extras_all_tasks_remain_and_the_missing_are_named(tmp_path, without_extras, capsys):
    sizes = {"train": 60, "validation": 12, "test": 24}
    summary = mini.build(tmp_path, **sizes)
    assert summary["missing"] == ["tinysoundfont", "espeakng-loader"]
    assert "espeakng-loader is not installed" in capsys.readouterr().out
    assert_complete(tmp_path, sizes)
    for split in sizes:
        assert_balanced(tmp_path, split)


def test_a_missing_soundfont_is_named_after_the_package_that_carries_it(monkeypatch):
    pytest.importorskip("tinysoundfont")
    monkeypatch.setattr(soundfont, "FONT", "absent.sf2")
    soundfont.player.cache_clear()
    assert mini.available_skills()[1][:1] == ["pretty_midi"]
    soundfont.player.cache_clear()


def test_the_summary_counts_what_was_written(tmp_path):
    summary = mini.build(tmp_path, train=12, validation=4, test=8)
    assert summary["examples"] == {"train": 12, "validation": 4, "test": 8}
    assert {split: sum(counts.values()) for split, counts in summary["categories"].items()} == summary["examples"]


def test_a_size_that_is_no_multiple_of_four_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train=10: expected a multiple of 4"):
        mini.build(tmp_path, train=10)


def test_shares_keep_the_total_and_the_proportions():
    assert mini.shares(10, [1, 1, 1]) == [4, 3, 3]
    assert mini.shares(9, [2, 1]) == [6, 3]
    assert sum(mini.shares(200, [2, 2, 2, 3])) == 200


def test_onsets_keep_their_distance_and_do_not_tell_the_count():
    rng = default_rng(0)
    for count in (1, 2, 4):
        starts = np.array(clips.onsets([0.2] * count, 2.0, 0.1, rng))
        assert starts[0] >= 0.1 and starts[-1] + 0.2 <= 1.9 + 1e-9
        assert np.all(np.diff(starts) >= 0.3 - 1e-9)
    with pytest.raises(ValueError, match="exceed"):
        clips.onsets([0.5] * 4, 2.0, 0.1, rng)


def test_resampling_keeps_a_tone_in_place_and_in_level():
    time = np.arange(22_050) / 22_050
    tone = np.sin(2 * np.pi * 440 * time) * np.hanning(22_050)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) * np.hanning(16_000)
    # Hann windows of 22,050 and of 16,000 points differ by half a sample at their ends.
    np.testing.assert_allclose(clips.resampled(tone, 22_050), expected, atol=1e-3)


@pytest.mark.parametrize("name", synthesis.EVENTS)
def test_every_event_fills_its_duration_with_finite_sound(name):
    for timbre in (0.0, 0.5, 1.0):
        for seconds in (0.5, 1.7):
            wave = synthesis.EVENTS[name](seconds, timbre, default_rng(1))
            assert len(wave) == clips.samples(seconds)
            assert np.isfinite(wave).all() and wave.std() > 0


def test_vowels_have_their_energy_at_their_formants():
    wave = synthesis.vowel("ee", 1.0, 0.0, default_rng(0))
    power = np.abs(np.fft.rfft(wave)) ** 2  # bin = Hz, for one second
    low, between, second = power[150:450].sum(), power[700:1500].sum(), power[1800:2400].sum()
    assert between < 0.1 * second < low


@pytest.mark.parametrize("animal", [name for split in mini_sound.ANIMALS for name in split])
def test_recordings_are_single_calls_with_credits(animal):
    wave = mini_sound.recording(animal)
    assert 0.1 < len(wave) / clips.SAMPLE_RATE <= 1.5
    assert 0.85 < np.abs(wave).max() <= 0.91
    assert f"{animal}.flac" in (mini_sound.RECORDINGS / "CREDITS.md").read_text(encoding="utf-8")


def test_a_note_does_not_depend_on_what_was_played_before():
    pytest.importorskip("tinysoundfont")
    notes = [(0.0, 0.3, 60), (0.5, 0.3, 67)]
    first = soundfont.play(0, notes, 1.0)
    soundfont.play(48, notes, 1.0)
    np.testing.assert_array_equal(soundfont.play(0, notes, 1.0), first)
