"""Grading a file of answers: every row of a file counts, and a mistake in it is located."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hark.data.benchmarks.answer_files import BENCHMARKS
from hark.data.benchmarks.grading import grade_file, read_answers
from hark.data.errors import DataError
from hark.launch import grade

ROWS = [
    {"id": "a", "choices": ["Man", "Woman"], "answer": "Man", "model_prediction": "A man.", "task": "sound"},
    {"id": 7, "choices": ["Man", "Woman"], "answer": "Man", "model_output": "woman", "category": ["Reasoning", "Deep"]},
    {"choices": ["3", "30"], "answer": "30", "model_prediction": 30, "modality": "music", "sub-category": "Counting"},
    {"id": "d", "choices": ["rain", "wind"], "answer": "wind", "model_prediction": None, "difficulty": "hard"},
    {"id": "e", "choices": ["rain", "wind"], "answer": "wind", "model_prediction": "wind"},
    {"id": "f", "choices": ["rain", "wind"], "answer": "wind"},
    {"id": "g", "choices": ["rain", "wind"], "answer": None, "model_prediction": "wind"},
]


def graded(path: Path, *words: str) -> dict:
    grade.main([str(path), "--json", str(path.parent / "new" / "out.json"), *words])
    return json.loads((path.parent / "new" / "out.json").read_text())


@pytest.mark.parametrize("lines", [False, True])
def test_every_row_is_counted_and_only_an_unknown_answer_is_not_judged(lines, tmp_path, capsys):
    path = tmp_path / "answers"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n" if lines else json.dumps(ROWS, indent=1))
    result = graded(path)
    correct = [("a", True), (7, False), (3, True), ("d", False), ("e", True), ("f", False), ("g", None)]
    assert [(row["id"], row["correct"]) for row in result["rows"]] == correct
    assert (result["accuracy"], result["right"], result["total"]) == (0.5, 3, 6)
    assert result["missing_predictions"] == 2 and result["benchmark"] == "mmau"
    assert result["accuracy/category/Reasoning, Deep"] == 0 and result["accuracy/task/music"] == 1
    assert result["accuracy/sub_category/Counting"] == 1 and result["accuracy/difficulty/hard"] == 0
    said = capsys.readouterr().out
    assert "2 rows have no prediction" in said and "1 rows have no right answer" in said and "3/6" in said


def test_the_other_rules_read_their_own_files(tmp_path):
    path = tmp_path / "answers.jsonl"
    row = {"id": 1, "choice_a": "wind", "choice_b": "rain", "answer_gt": "rain", "response": "It is B."}
    path.write_text(json.dumps(row))
    assert graded(path, "--benchmark", "mmsu")["accuracy"] == 1
    path.write_text(json.dumps({"choices": ["wind", "rain"], "answer": "rain", "answer_prediction": "the rain"}))
    assert graded(path, "--benchmark", "mmar")["accuracy"] == 1
    assert graded(path, "--benchmark", "strict")["accuracy"] == 0


def test_choices_and_answers_may_be_numbers(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"choices": [3, 30], "answer": 3, "model_prediction": n} for n in (3, 30, "3", 3.5)]))
    assert [row["correct"] for row in graded(path)["rows"]] == [True, False, True, True]


def test_a_file_without_any_answer_is_written_and_says_that_nothing_can_be_graded(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(ROWS[-1:]))
    result = graded(path)
    assert result["accuracy"] is None and result["rows"][0]["correct"] is None
    assert "nothing can be graded" in capsys.readouterr().out


def test_an_answer_outside_the_choices_is_graded_by_its_words_or_wrong_and_is_no_baseline(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"choices": ["rain", "wind"], "answer": "hail", "model_prediction": "hail"}]))
    for name, accuracy in {"mmau": 1, "mmar": 1, "mmsu": 0, "strict": 0}.items():
        result = graded(path, "--benchmark", name)
        assert result["accuracy"] == accuracy and "chance" not in result
        assert "1 rows have an answer that is none of their choices: answers.json[0]" in capsys.readouterr().out


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{", r"f:2: not valid JSON .*one JSON object per line"),
        ("[1", r"f: not valid JSON"),
        ("", r"f: holds no rows; expected a JSON array"),
        ("[]", r"f: holds no rows"),
        (f"[{GOOD}, 3]", r"f\[1\]: is a JSON int; expected an object"),
        (f'{GOOD}\n\n{{"answer": "x"}}', r'f:3: "choices" is missing; the rule needs'),
        ('{"choices": "rain", "answer": "x"}', r"f:1: \"choices\" is 'rain'; expected a list of texts"),
        ('{"choices": ["rain", true], "answer": "x"}', r'f:1: "choices" is .*expected a list of texts'),
        ('{"choices": "x", "answer": "x"}', r'f:1: "choices" is \'x\'; expected'),
        ('{"choices": ["rain", "x"]}', r'f:1: "answer" is missing; expected the text .* or null'),
        (
            '{"choices": ["rain", "x"], "answer": ["x"]}',
            r'f:1: "answer" is a JSON list; expected text, a number or null',
        ),
        (
            f'{GOOD}\n{{"choices": ["x"], "answer": "x", "response": ["x"]}}',
            r'f:2: "response" is a JSON list; expected text',
        ),
        ('{"choices": ["x"], "answer": "x", "response": {"x": "x"}}', r'f:1: "response" is a JSON dict; expected text'),
        ('{"choices": ["x"], "answer": "x", "response": true}', r'f:1: "response" is a JSON bool; expected text'),
        (
            '{"choices": ["x"], "answer": "x", "category": {"x": "x"}}',
            r'f:1: "category" is .*; expected text or a list',
        ),
        (f"{GOOD}\n" + "[" * 100_000, r"f:2: not valid JSON .*recursion"),
        ("[" * 100_000, r"f: not valid JSON .*recursion"),
        (f'{GOOD}\n{{"answer": {"9" * 5000}}}', r"f:2: holds an integer of 5000 digits; expected at most 64 bits"),
        (f'[{{"answer": {"9" * 5000}}}]', r"f\[0\]: holds an integer of 5000 digits; expected at most 64 bits"),
        (
            '{"choices": ' + "[" * 900 + "]" * 900 + ', "answer": "x"}',
            r"f:1: is nested more than 64 deep; expected a flat object",
        ),
    ],
)
def test_what_cannot_be_graded_is_an_error_that_says_where_and_how_to_fix_it(text, message, tmp_path):
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_answers(tmp_path / "f", BENCHMARKS["mmau"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: no such file .*expected a file of JSON or JSON lines"):
        read_answers(tmp_path / "nowhere.json", BENCHMARKS["mmau"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary:1: not valid JSON .*in UTF-8"):
        read_answers(tmp_path / "binary", BENCHMARKS["mmau"])
    (tmp_path / "f").write_text(GOOD)
    with pytest.raises(DataError, match="cannot be written .*choose another path"):
        grade.main([str(tmp_path / "f"), "--json", str(tmp_path / "f" / "out.json")])


def test_grading_loads_no_framework_and_a_mistake_is_one_line(tmp_path):
    script = grade.__file__
    (tmp_path / "f").write_text(GOOD)
    code = (
        "import sys\n"
        "from hark.launch import grade\n"
        f"grade.main([{str(tmp_path / 'f')!r}])\n"
        "print('loaded', sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1/1" in done.stdout and done.stdout.endswith("loaded []\n"), done.stderr
    command = [sys.executable, script, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_list_or_a_dict_is_never_turned_into_text_that_is_right(tmp_path):
    path = tmp_path / "answers.json"
    for prediction in (["wind"], {"answer": "wind"}):
        path.write_text(json.dumps([ROWS[0], {**ROWS[4], "model_prediction": prediction}]))
        with pytest.raises(
            DataError, match=r'answers.json\[1\]: "model_prediction" is a JSON (list|dict); expected text'
        ):
            grade.main([str(path)])


def test_rows_that_the_official_script_does_not_count_are_named_with_both_figures(tmp_path, capsys):
    row = {"choice_a": "wind", "choice_b": "rain", "answer_gt": "rain"}
    predictions = ["B", "A", "rain", "", None, "It is rain", "None"]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row | {"response": prediction}) + "\n" for prediction in predictions))
    result = graded(path, "--benchmark", "mmsu")
    assert (result["right"], result["total"]) == (1, 7)
    assert (result["official_right"], result["official_total"]) == (1, 4)
    assert [row["official"] for row in result["rows"]] == [True, False, None, False, None, None, False]
    said = capsys.readouterr().out
    assert "3 rows are left out by the script of mmsu: answers.jsonl:3, answers.jsonl:5, answers.jsonl:6" in said
    assert "by the official script" in said and "1/4" in said and "1/7" in said


def test_the_official_figure_reads_one_key_per_file_and_ours_the_first_that_a_row_has(tmp_path):
    path = tmp_path / "answers.json"
    row = {"choices": ["dog", "cat"], "answer": "dog"}
    both, one = {"model_output": "dog", "model_prediction": "cat"}, {"model_prediction": "dog"}
    path.write_text(json.dumps([row | both, row | one, row]))
    result = graded(path)
    assert [(row["correct"], row["official"]) for row in result["rows"]] == [(True, True), (True, None), (False, None)]
    path.write_text(json.dumps([row | one, row]))
    assert [row["official"] for row in graded(path)["rows"]] == [True, None]


def test_an_empty_answer_is_an_unknown_one_and_each_benchmark_looks_for_its_own_key_first(tmp_path):
    rows = [
        {"id": 1, "choices": ["dog", "cat"], "answer": "", "model_prediction": "hello"},
        {"id": 2, "choices": ["dog", "cat"], "answer": "dog", "answer_prediction": "dog", "model_prediction": "noise"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, correct in (("mmar", True), ("mmau", False)):
        grade_file(str(tmp_path / "rows.json"), benchmark=name, out=str(tmp_path / "out.json"))
        result = json.loads((tmp_path / "out.json").read_text())
        assert [row["correct"] for row in result["rows"]] == [None, correct]
