"""The examples of docs/data.md and docs/own-data.md are read as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import soundfile
import yaml

from hark.data.clips import Rules, clips_in, inspect
from hark.data.examples import KEYS, OPTIONAL, load_examples
from hark.launch import convert
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import weighted
from tests.clips import waveform

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "data.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_question_of_the_page_is_read_and_its_clips_can_be_used(tmp_path):
    rows = [json.loads(block) for block in blocks(PAGE, "json")]
    (tmp_path / "audio").mkdir()
    for number in (17, 18, 19, 20):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", waveform(20.0, number), 16_000)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, _ = load_examples(tmp_path / "train.jsonl")
    assert [example.id for example in examples] == ["q17", "q18", "q19", "q20"]
    assert [inspect(clip, Rules(16_000, 30.0)).fault for clip in clips_in(examples)] == [""] * 5


def test_the_table_of_keys_has_every_key_that_is_read(tmp_path):
    table = re.search(r"\| key \| holds \|\n(.*?)\n\n", PAGE, re.DOTALL)
    named = [key for line in table[1].splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted((*KEYS, *OPTIONAL))


def test_every_configuration_of_the_page_is_read(tmp_path):
    found = []
    for block in blocks(PAGE, "yaml"):
        sections = {"run": {"directory": "r"}, "model": {"path": "m"}} | yaml.safe_load(block)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(sections))
        found.append(load_config([str(tmp_path / "c.yaml")]).data)
    mixture, banded, hub = found
    assert banded.band == [0.375, 0.75]
    assert weighted(mixture.train) == (["speech.jsonl", "music.jsonl", "sounds.parquet"], [0.7, 0.2, 0.1])
    assert hub.columns["multi_choice"] == "options"


def test_the_tables_of_own_data_are_converted_without_a_bad_row(tmp_path):
    for name in ("dog-17.wav", "street.mp3"):
        soundfile.write(tmp_path / name, waveform(30.0, 0), 16_000)
    found = []
    for text in [block for block in blocks((DOCS / "own-data.md").read_text(), "") if block.startswith("audio,")]:
        (tmp_path / "q.csv").write_text(text)
        convert.main(["csv", f"{tmp_path}/q.csv", f"{tmp_path}/train.jsonl", "--strict", "--force"])
        found += load_examples(tmp_path / "train.jsonl")[0]
    assert [example.answer_text for example in found] == ["a dog", "two", "two", "a bus"]
    assert (
        found[2].accepted == ("two", "2") and found[2].clips[0].end == 25.5 and found[3].choices == ("a car", "a bus")
    )
