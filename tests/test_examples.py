"""data/examples.py: what a line must be, and what the message says where it is not."""

import json
from pathlib import Path

import pytest

from hark.data import json_files
from hark.data.clip import Clip
from hark.data.errors import DataError
from hark.data.examples import load_examples

GOOD = {
    "id": 183, "audio_path": "clips/a.wav", "question_text": "What happened?", "multi_choice": ["Car", "Dog", "Bell"],
    "answer": 1, "dataset_name": "AVQA", "video_id": 341,
}  # fmt: skip


def write(tmp_path, *records):
    path = tmp_path / "train.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_a_line_of_r1_aqa_becomes_an_example_with_the_clip_beside_the_file(tmp_path):
    (example,), bad = load_examples(write(tmp_path, GOOD))
    assert bad == []
    assert (example.id, example.dataset, example.task) == ("183", "AVQA", "")
    assert example.line == f"{tmp_path}/train.jsonl:1", "a path that can be opened"
    assert example.clips == (Clip(tmp_path / "clips" / "a.wav"),)
    assert (example.choices, example.answer, example.answer_text) == (("Car", "Dog", "Bell"), 1, "Dog")


def test_the_audio_root_replaces_the_files_own_directory(tmp_path):
    (example,), _ = load_examples(write(tmp_path, GOOD), audio_root=tmp_path / "elsewhere")
    assert example.clips == (Clip(tmp_path / "elsewhere" / "clips" / "a.wav"),)


def test_a_missing_key_names_the_line_the_key_and_what_a_line_needs(tmp_path):
    bad = {key: value for key, value in GOOD.items() if key != "audio_path"}
    with pytest.raises(DataError) as error:
        load_examples(write(tmp_path, GOOD, bad))
    assert str(error.value) == (
        f'{tmp_path}/train.jsonl:2: "audio_path" is missing; each line needs id, audio_path, question_text, answer'
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, '"answer" is 3, out of range; expected 0 to 2'),
        ({"answer": -1}, '"answer" is -1, out of range'),
        ({"answer": "Dog"}, "\"answer\" is 'Dog'; expected the index"),
        ({"answer": True}, '"answer" is True; expected the index'),
        ({"multi_choice": ["Car"]}, "expected at least 2"),
        ({"multi_choice": "Car"}, "expected a list of texts"),
        ({"multi_choice": ["Car", 2]}, "expected a list of texts"),
        ({"multi_choice": ["Car", "Dog", "car."]}, "repeats 'Car' as 'car.'"),
        ({"multi_choice": ["Car", " "]}, "which is empty"),
        ({"question_text": "  "}, '"question_text" is empty'),
        ({"question_text": 5}, '"question_text" is 5; expected text'),
        ({"audio_path": ""}, '"audio_path" is empty'),
        ({"audio_path": None}, '"audio_path" is missing'),
        ({"id": [1]}, '"id" is [1]'),
        ({"category": 5}, '"category" is 5; expected text'),
        ({"id": "183"}, "\"id\" '183' was used at "),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(tmp_path, change, message):
    with pytest.raises(DataError) as error:
        load_examples(write(tmp_path, GOOD, {**GOOD, "id": 184, **change}))
    assert str(error.value).startswith(f"{tmp_path}/train.jsonl:2: ") and message in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense"])
def test_a_line_that_is_no_json_object_is_an_error(tmp_path, line):
    with pytest.raises(DataError, match="train.jsonl:2: .*JSON"):
        load_examples(write(tmp_path, GOOD, line))


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + "}",
        json.dumps({**GOOD, "id": 7}).replace("[", "[" * 950, 1).replace("]", "]" * 950, 1),
        json.dumps({**GOOD, "id": 7}).replace(": 7", ": " + "[" * 950 + "]" * 950, 1),
    ],
)
def test_what_is_nested_deeply_or_too_long_is_an_error_of_one_short_line(tmp_path, line):
    with pytest.raises(DataError, match="train.jsonl:2: ") as error:
        load_examples(write(tmp_path, GOOD, line))
    assert "\n" not in str(error.value) and len(str(error.value).partition("train.jsonl")[2]) < 300
    examples, bad = load_examples(write(tmp_path, GOOD, line), skip_bad=True)
    assert len(examples) == len(bad) == 1


def test_a_row_of_megabytes_is_a_bad_one_and_a_line_or_an_array_without_an_end_is_an_error_of_the_file(
    tmp_path, monkeypatch
):
    """A row takes up to thirty times its size in memory: a pair of brackets is a list of 56 bytes."""
    row = {**GOOD, "id": 7, "more": "[]" * (json_files.LARGEST_ROW // 2)}
    examples, bad = load_examples(write(tmp_path, GOOD, row, {**GOOD, "id": 8}), skip_bad=True)
    assert [example.id for example in examples] == ["183", "8"]
    assert [(Path(one.line).name, one.reason) for one in bad] == [
        ("train.jsonl:2", "has more than 8 MB; expected texts and numbers")
    ]
    monkeypatch.setattr(json_files, "LARGEST_VALUE", 2 << 20)
    with pytest.raises(DataError, match="train.jsonl:2: no end of the line in 2 MB; expected JSON lines"):
        load_examples(write(tmp_path, GOOD, row), skip_bad=True)
    (tmp_path / "train.json").write_text(json.dumps([GOOD, row]))
    with pytest.raises(DataError, match="train.json: an array of more than 2 MB; write it as JSON lines"):
        load_examples(tmp_path / "train.json", skip_bad=True)


def test_bytes_that_are_not_utf8_are_an_error_of_their_line(tmp_path):
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="train.jsonl:2: not valid JSON"):
        load_examples(path)


def test_skip_bad_returns_the_bad_lines_beside_the_good_and_counts_blank_lines(tmp_path):
    examples, bad = load_examples(write(tmp_path, GOOD, "", {**GOOD, "id": 7, "answer": 9}, "{"), skip_bad=True)
    assert [Path(example.line).name for example in examples] == ["train.jsonl:1"]
    assert [(Path(one.line).name, one.id) for one in bad] == [("train.jsonl:3", "7"), ("train.jsonl:4", "")]
    assert bad[0].reason.startswith('"answer" is 9')


def test_a_bad_line_does_not_use_up_its_id(tmp_path):
    examples, _ = load_examples(write(tmp_path, {**GOOD, "answer": 9}, GOOD), skip_bad=True)
    assert [Path(example.line).name for example in examples] == ["train.jsonl:2"]


def test_text_only_examples_are_read_only_when_asked_for(tmp_path):
    path = write(tmp_path, {**GOOD, "audio_path": None}, {k: v for k, v in {**GOOD, "id": 1}.items() if k[0] != "a"}
                 | {"answer": 0})  # fmt: skip
    examples, _ = load_examples(path, require_audio=False)
    assert [example.clips for example in examples] == [(), ()]
    with pytest.raises(DataError, match='"audio_path" is missing'):
        load_examples(path)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_no_examples_at_all_is_always_an_error(tmp_path, skip_bad):
    with pytest.raises(DataError, match="the file is empty"):
        load_examples(write(tmp_path), skip_bad=skip_bad)
    with pytest.raises(DataError, match="train.jsonl:1"):
        load_examples(write(tmp_path, "{"), skip_bad=skip_bad)
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        load_examples(tmp_path / "none.jsonl", skip_bad=skip_bad)
    with pytest.raises(DataError, match="is a directory that holds train.jsonl"):
        load_examples(tmp_path, skip_bad=skip_bad)


def test_what_a_question_belongs_to_is_read_and_a_list_is_joined(tmp_path):
    labels = {"task": "speech", "category": ["Läute", "Zahlen"], "sub_category": "x", "difficulty": "hard"}
    (example,), _ = load_examples(write(tmp_path, {**GOOD, **labels}))
    assert (example.task, example.category, example.sub_category) == ("speech", "Läute, Zahlen", "x")
    assert example.difficulty == "hard"
    with pytest.raises(DataError, match="\"sub_category\" is \\['x', 1\\]; expected text or a list of texts"):
        load_examples(write(tmp_path, {**GOOD, "sub_category": ["x", 1]}))


@pytest.mark.parametrize("change", [{"multi_choice": ["Car", "Dog", "car."]}, {"answer": None}])
def test_a_benchmarks_questions_are_taken_as_they_are(tmp_path, change):
    path = write(tmp_path, {**GOOD, **change})
    (example,), bad = load_examples(path, benchmark=True)
    assert bad == [] and list(example.choices) == {**GOOD, **change}["multi_choice"]
    assert example.answer == {**GOOD, **change}["answer"]
    with pytest.raises(DataError, match="train.jsonl:1"):
        load_examples(path)


def test_a_benchmark_may_leave_the_answer_out_but_not_give_one_out_of_range(tmp_path):
    path = write(tmp_path, {key: value for key, value in GOOD.items() if key != "answer"})
    (example,), _ = load_examples(path, benchmark=True)
    with pytest.raises(DataError, match="train.jsonl:1: has no answer"):
        example.answer_text  # noqa: B018
    with pytest.raises(DataError, match="out of range"):
        load_examples(write(tmp_path, {**GOOD, "answer": 3}), benchmark=True)
