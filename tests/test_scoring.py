"""Grading a file of answers: every row of a file counts, and a mistake in it is located."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hark.data.benchmarks.grading import read_predictions, score_file
from hark.data.errors import DataError
from hark.launch import evaluate

ROWS = [
    {"id": "a", "choices": ["Man", "Woman"], "answer": "Man", "model_prediction": "A man.", "task": "sound"},
    {"id": 7, "choices": ["Man", "Woman"], "answer": "Man", "model_output": "woman", "category": ["Reasoning", "Deep"]},
    {"choices": ["3", "30"], "answer": "30", "model_prediction": 30, "modality": "music", "sub-category": "Counting"},
    {"id": "d", "choices": ["rain", "wind"], "answer": "wind", "model_prediction": None, "difficulty": "hard"},
    {"id": "e", "choices": ["rain", "wind"], "answer": "wind", "model_prediction": ["wind"]},
    {"id": "f", "choices": ["rain", "wind"], "answer": "wind"},
    {"id": "g", "choices": ["rain", "wind"], "answer": None, "model_prediction": "wind"},
]


def score(path: Path, *words: str) -> dict:
    evaluate.main(["--score", str(path), "--json", str(path.parent / "new" / "out.json"), *words])
    return json.loads((path.parent / "new" / "out.json").read_text())


@pytest.mark.parametrize("lines", [False, True])
def test_every_row_is_counted_and_only_an_unknown_answer_is_not_judged(lines, tmp_path, capsys):
    path = tmp_path / "answers"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n" if lines else json.dumps(ROWS, indent=1))
    result = score(path)
    correct = [("a", True), (7, False), (3, True), ("d", False), ("e", True), ("f", False), ("g", None)]
    assert [(row["id"], row["correct"]) for row in result["rows"]] == correct
    assert (result["accuracy"], result["right"], result["total"]) == (0.5, 3, 6)
    assert result["missing_predictions"] == 1 and result["benchmark"] == "mmau"
    assert result["accuracy/category/Reasoning, Deep"] == 0 and result["accuracy/task/music"] == 1
    assert result["accuracy/sub_category/Counting"] == 1 and result["accuracy/difficulty/hard"] == 0
    said = capsys.readouterr().out
    assert "1 rows have no prediction" in said and "1 rows have no right answer" in said and "3/6" in said


def test_the_other_rules_read_their_own_files(tmp_path):
    path = tmp_path / "answers.jsonl"
    row = {"id": 1, "choice_a": "wind", "choice_b": "rain", "answer_gt": "rain", "response": "It is B."}
    path.write_text(json.dumps(row))
    assert score(path, "--benchmark", "mmsu")["accuracy"] == 1
    path.write_text(json.dumps({"choices": ["wind", "rain"], "answer": "rain", "answer_prediction": "the rain"}))
    assert score(path, "--benchmark", "mmar")["accuracy"] == 1
    assert score(path, "--benchmark", "strict")["accuracy"] == 0


def test_choices_and_answers_may_be_numbers(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"choices": [3, 30], "answer": 3, "model_prediction": n} for n in (3, 30, "3", 3.5)]))
    assert [row["correct"] for row in score(path)["rows"]] == [True, False, True, True]


def test_a_file_without_any_answer_is_written_and_says_that_nothing_can_be_scored(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(ROWS[-1:]))
    result = score(path)
    assert result["accuracy"] is None and result["rows"][0]["correct"] is None
    assert "nothing can be scored" in capsys.readouterr().out


def test_an_answer_outside_the_choices_is_judged_by_its_words_and_is_no_baseline(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"choices": ["rain", "wind"], "answer": "hail", "model_prediction": "hail"}]))
    result = score(path)
    assert result["accuracy"] == 1 and "chance" not in result


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{", r"f:2: not valid JSON .*one JSON object per line"),
        ("[1", r"f: not valid JSON"),
        ("", r"f: holds no rows; expected a JSON list"),
        ("[]", r"f: holds no rows"),
        (f"[{GOOD}, 3]", r"f, row 2: is a JSON int; each row is an object"),
        (f'{GOOD}\n\n{{"answer": "x"}}', r'f:3: "choices" is missing; the rule needs'),
        ('{"choices": "rain", "answer": "x"}', r"f:1: \"choices\" is 'rain'; expected a list of texts"),
        ('{"choices": ["rain", true], "answer": "x"}', r'f:1: "choices" is .*expected a list of texts'),
        ('{"choices": [], "answer": "x"}', r'f:1: "choices" is \[\]; expected'),
        ('{"choices": ["rain", "x"]}', r'f:1: "answer" is missing; expected the text .* or null'),
        ('{"choices": ["rain", "x"], "answer": ["x"]}', r"f:1: \"answer\" is \['x'\]; expected the text"),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_says_where_and_how_to_fix_it(text, message, tmp_path):
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "f")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: cannot be read .*expected a file of predictions"):
        read_predictions(tmp_path / "nowhere.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary: is not UTF-8 text"):
        read_predictions(tmp_path / "binary")
    (tmp_path / "f").write_text(GOOD)
    with pytest.raises(DataError, match="cannot be written .*choose another place"):
        evaluate.main(["--score", str(tmp_path / "f"), "--json", str(tmp_path / "f" / "out.json")])
    with pytest.raises(DataError, match=r"f:1: .*'hail' is none of the choices"):
        (tmp_path / "f").write_text('{"choices": ["rain"], "answer": "hail", "response": "x"}')
        evaluate.main(["--score", str(tmp_path / "f"), "--benchmark", "mmsu"])


def test_scoring_loads_no_framework_and_a_mistake_is_one_line(tmp_path):
    script = evaluate.__file__
    (tmp_path / "f").write_text(GOOD)
    code = (
        f"import sys, runpy; sys.argv = ['evaluate.py', '--score', {str(tmp_path / 'f')!r}]\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
        "print('loaded', sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1/1" in done.stdout and done.stdout.endswith("loaded []\n"), done.stderr
    command = [sys.executable, script, "--score", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_empty_answer_is_an_unknown_one_and_each_benchmark_looks_for_its_own_key_first(tmp_path):
    rows = [
        {"id": 1, "choices": ["dog", "cat"], "answer": "", "model_prediction": "hello"},
        {"id": 2, "choices": ["dog", "cat"], "answer": "dog", "answer_prediction": "dog", "model_prediction": "noise"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, correct in (("mmar", True), ("mmau", False)):
        score_file(str(tmp_path / "rows.json"), benchmark=name, out=str(tmp_path / "out.json"))
        result = json.loads((tmp_path / "out.json").read_text())
        assert [row["correct"] for row in result["rows"]] == [None, correct]
