"""One's own clips in a folder and a CSV file: `hark convert csv`."""

from __future__ import annotations

import json

import pytest
from soundfile import write

from hark.data.errors import DataError
from hark.data.examples import load_examples
from hark.launch import convert
from tests.clips import waveform


def run(tmp_path, text: str, *options: str) -> list[dict]:
    for n in range(1, 11):
        path = tmp_path / "clips" / f"c{n}.wav"
        path.parent.mkdir(exist_ok=True)
        write(path, waveform(0.3, n), 16_000)
    (tmp_path / "q.csv").write_text(text, encoding="utf-8-sig")
    words = [str(tmp_path / "q.csv"), str(tmp_path / "train.jsonl"), "--audio", str(tmp_path / "clips")]
    convert.main(["csv", *words, *options])
    return [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("answer", ["rain", "B", "b", "2", "Rain."])
@pytest.mark.parametrize("form", ["bar", "columns", "semicolon"])
def test_every_way_to_write_choices_and_answer_gives_the_same_question(answer, form, tmp_path):
    text = {
        "bar": f'audio,question,choices,answer\nc1.wav,"Which, then?",dog | rain|car,{answer}\n',
        "columns": "file,question_text,choice_1,choice_2,choice_3,choice_4,answer\n"
        f'c1,"Which, then?",dog,rain,car,,{answer}\n',
        "semicolon": f"Path; Question; choices; answer\nc1.wav; Which, then?; dog|rain|car; {answer}\n",
    }[form]
    assert run(tmp_path, text) == [
        {
            "id": "c1", "audio_path": "clips/c1.wav", "question_text": "Which, then?",
            "multi_choice": ["dog", "rain", "car"], "answer": 1, "dataset_name": "own",
        }
    ]  # fmt: skip


def test_a_number_that_is_a_choice_is_that_choice_and_not_its_place(tmp_path):
    assert run(tmp_path, "audio,question,choices,answer\nc1,How many?,3|2|1,1\n")[0]["answer"] == 2


def test_a_row_without_choices_is_an_open_question_and_a_window_is_kept(tmp_path, capsys):
    text = "audio,question,choices,answer,start,end,system\nc1,How many?,,two|2,0.05,0.2,Count.\nc2,Say it.,,,,,\n"
    first, second = run(tmp_path, text)
    assert first["answer"] == ["two", "2"] and (first["start"], first["end"]) == (0.05, 0.2)
    assert first["system"] == "Count." and second["answer"] is None and "start" not in second
    said = capsys.readouterr().out
    assert "2 of the questions are open" in said and "1 of the questions have no known answer" in said
    with pytest.raises(DataError, match="no row could be converted.*\"end\" is 'soon'; expected seconds"):
        run(tmp_path, "audio,question,answer,end\nc1,How many?,two,soon\n", "--force")
    assert [one.accepted for one in load_examples(tmp_path / "train.jsonl")[0]] == [("two", "2"), ()]


def test_a_bad_row_is_listed_with_its_line_and_the_others_are_written(tmp_path, capsys):
    rows = ["c1,Which?,dog|car,dog", "c2,Which?,dog|car,cat", "none,Which?,dog|car,1", "c3,Which?,dog", "c4,,dog|car,1"]
    assert len(run(tmp_path, "\n".join(["audio,question,choices,answer", *rows]))) == 1
    bad = [json.loads(line) for line in (tmp_path / "train.bad.jsonl").read_text().splitlines()]
    assert [row["file"] for row in bad] == ["q.csv:3", "q.csv:4", "q.csv:5", "q.csv:6"]
    assert "'cat' is none of the choices" in bad[0]["reason"] and "no such clip" in bad[1]["reason"]
    assert "has not 4 cells" in bad[2]["reason"] and '"question" or "question_text" is missing' in bad[3]["reason"]


@pytest.mark.parametrize(
    ("heading", "message"),
    [
        ("audio,choices,answer", "no column question; the first line names audio, choices, answer"),
        ("clip,question,answer", "no column audio; the first line names clip, question, answer"),
        ("audio,question,choices,answer,answer", "names a column twice"),
    ],
)
def test_a_wrong_first_line_is_one_sentence(heading, message, tmp_path):
    with pytest.raises(DataError, match=message):
        run(tmp_path, heading + "\nc1,a,b,c,d\n")


def test_the_test_part_shares_no_clip_with_the_training_part(tmp_path):
    rows = [f"c{n},Question {k}?,dog|car,1" for n in range(1, 11) for k in range(3)]
    train = run(tmp_path, "\n".join(["audio,question,choices,answer", *rows]), "--test-share", "0.2")
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert (len(train), len(test)) == (24, 6)
    assert not {row["audio_path"] for row in train} & {row["audio_path"] for row in test}
    assert len(load_examples(tmp_path / "test.jsonl")[0]) == 6


def test_a_test_part_overwrites_nothing(tmp_path):
    (tmp_path / "test.jsonl").write_text("mine")
    with pytest.raises(DataError, match="--test-share writes this file"):
        run(tmp_path, "audio,question,choices,answer\nc1,a,b|c,1\n", "--test-share", "0.5")
    assert (tmp_path / "test.jsonl").read_text() == "mine" and not (tmp_path / "train.jsonl").exists()


def test_questions_for_testing_that_stay_as_they_were_are_named(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text("{}")
    run(tmp_path, "audio,question,choices,answer\nc1.wav,?,a|b,a\n")
    assert f"{tmp_path}/test.jsonl is as it was before; --test-share 0.2 would write it" in capsys.readouterr().out


def test_a_file_without_a_usable_row_names_the_first_reason(tmp_path):
    with pytest.raises(DataError, match=r"no row could be converted.*first q.csv:2: .*none.wav"):
        run(tmp_path, "audio,question,choices,answer\nnone.wav,?,a|b,a\n")


def test_clips_outside_of_the_directory_of_the_questions_are_said(tmp_path, capsys):
    path = tmp_path / "clips" / "a.wav"
    path.parent.mkdir()
    write(path, waveform(1.0, 0), 16_000)
    (tmp_path / "q.csv").write_text("audio,question,choices,answer\na.wav,Which?,a|b,a\n")
    for place, said in (("here.jsonl", False), ("mine/there.jsonl", True)):
        (tmp_path / "mine").mkdir(exist_ok=True)
        convert.main(["csv", str(tmp_path / "q.csv"), str(tmp_path / place), "--audio", str(path.parent)])
        assert (f"set data.audio_root={path.parent}" in capsys.readouterr().out) == said
