"""launch/convert.py: what is written, what is listed instead, and what is never overwritten."""

import json

import pytest
import soundfile

from hark.data.errors import DataError
from hark.data.examples import load_examples
from hark.data.sources.conversion import Conversion, write
from hark.launch import convert
from tests.clips import HOSTILE
from tests.test_sources import AUDIOMCQ, AVQA, AVQA_PROCESSED, FLAMINGO, MMAR, MMAU, MMSU

RECORDS = {
    "avqa": (AVQA, {
        "id": "183", "audio_path": "clips/-HG3Omg_89c_30.wav", "question_text": "What happened in the audio?",
        "multi_choice": AVQA["multi_choice"], "answer": 1, "dataset_name": "AVQA", "category": "Happening",
        "sub_category": "View"}),
    "avqa_processed": (AVQA_PROCESSED, {
        "id": "-HG3Omg_89c_000030", "audio_path": "clips/-HG3Omg_89c_000030.wav",
        "question_text": "How many animals are there in the audio?", "multi_choice": ["3", "One", "4", "2"],
        "answer": 1, "dataset_name": "AVQA"}),
    "audiomcq": (AUDIOMCQ, {
        "id": "7", "audio_path": "clips/AudioCaps/7.wav", "question_text": "How does the water move?",
        "multi_choice": AUDIOMCQ["choices"], "answer": 1, "dataset_name": "AudioMCQ", "task": "sound",
        "category": "AudioCaps", "sub_category": "strong"}),
    "mmau": (MMAU, {
        "id": "3fe64f3d", "audio_path": "clips/test-mini-audios/3fe64f3d.wav", "question_text": "Who speaks?",
        "multi_choice": MMAU["choices"], "answer": 0, "dataset_name": "MMAU", "task": "sound", "category": "Reasoning",
        "sub_category": "Acoustic Source Inference", "difficulty": "medium"}),
    "mmar": (MMAR, {
        "id": MMAR["id"], "audio_path": f"clips/audio/{MMAR['id']}.wav", "question_text": "他说了什么？",
        "multi_choice": ["你好", "再见"], "answer": 1, "dataset_name": "MMAR", "task": "mix-sound-speech",
        "category": "Semantic Layer", "sub_category": "Content Analysis"}),
    "mmsu": (MMSU, {
        "id": "a-1", "audio_path": "clips/audio/a-1.wav", "question_text": "How many syllables?",
        "multi_choice": ["3", "4"], "answer": 1, "dataset_name": "MMSU", "task": "counting", "category": "Perception",
        "sub_category": "Linguistics"}),
    "audio_flamingo": (FLAMINGO, {
        "id": "Yabc", "audio_path": "clips/Yabc.flac", "question_text": "Where are they?",
        "multi_choice": ["swimming pool", "restaurant", "church"], "answer": 1, "dataset_name": "AudioFlamingo"}),
}  # fmt: skip


def clip(tmp_path, name):
    path = tmp_path / "clips" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [0.1] * 1600, 16_000)


def run(tmp_path, source, *rows, options=(), form="array"):
    """Convert these rows with clips/ as the directory of the clips; gives (records, bad lines)."""
    (tmp_path / "clips").mkdir(exist_ok=True)
    given = tmp_path / "given.json"
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    given.write_text(json.dumps(rows) if form == "array" else lines, encoding="utf-8")
    convert.main([source, str(given), str(tmp_path / "out.jsonl"), "--audio", str(tmp_path / "clips"), *options])
    return lines_of(tmp_path / "out.jsonl"), lines_of(tmp_path / "out.bad.jsonl")


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("source", RECORDS)
def test_a_published_row_becomes_this_line_and_loads(tmp_path, source, form):
    row, record = RECORDS[source]
    clip(tmp_path, record["audio_path"].removeprefix("clips/"))
    records, bad = run(tmp_path, source, row, form=form)
    assert records == [record] and bad == []
    assert list(records[0]) == list(record), "in this order of keys"
    (example,), _ = load_examples(tmp_path / "out.jsonl")
    assert example.clips[0].source.is_file() and example.answer_text == record["multi_choice"][record["answer"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "given.json", "out.jsonl"], "nothing left over"


def test_text_is_written_as_it_is_not_escaped(tmp_path):
    clip(tmp_path, f"audio/{MMAR['id']}.wav")
    run(tmp_path, "mmar", MMAR)
    assert "他说了什么？" in (tmp_path / "out.jsonl").read_text("utf-8")


def test_missing_clips_are_counted_and_every_row_is_listed_with_its_place(tmp_path, capsys):
    clip(tmp_path, "-HG3Omg_89c_000030.flac")
    gone = {**AVQA, "video_name": "gone_000001"}
    records, bad = run(tmp_path, "avqa", {**gone, "id": 1}, AVQA, {**gone, "id": 2})
    assert [record["audio_path"] for record in records] == ["clips/-HG3Omg_89c_000030.flac"]
    assert [(line["file"], line["id"]) for line in bad] == [("given.json[0]", "1"), ("given.json[2]", "2")]
    assert bad[0]["reason"].startswith("gone_000001 or gone_1: no such clip in ")
    said = capsys.readouterr().out
    for line in ("3 rows read", "1 questions", "2 left out: missing clip", "1 clips are missing, first gone_000001"):
        assert line in said
    assert f"listed in {tmp_path / 'out.bad.jsonl'}" in said


def test_what_cannot_be_converted_is_listed_and_the_rest_written(tmp_path, capsys):
    clip(tmp_path, "AudioCaps/7.wav")
    rows = [
        {**AUDIOMCQ, "answer": "Fire"},
        {key: value for key, value in AUDIOMCQ.items() if key != "question"},
        "{",
        {**AUDIOMCQ, "choices": ["x", "X.", "y"], "answer": "y"},
        AUDIOMCQ,
    ]
    records, bad = run(tmp_path, "audiomcq", *rows, form="lines")
    assert len(records) == 1
    assert [line["file"] for line in bad] == [f"given.json:{number}" for number in (1, 2, 3, 4)]
    reasons = ("'Fire' is none of the choices", '"question" is missing', "not valid JSON", "repeats 'x' as 'X.'")
    assert all(reason in line["reason"] for reason, line in zip(reasons, bad, strict=True))
    said = capsys.readouterr().out
    for kind in ("answer not among the choices", 'no "question"', "not a row of this format", "not a usable question"):
        assert f"1 left out: {kind}" in said


def test_half_of_a_surrogate_pair_is_a_fault_of_its_row_alone(tmp_path):
    clip(tmp_path, "AudioCaps/7.wav")
    records, bad = run(tmp_path, "audiomcq", {**AUDIOMCQ, "question": "Why \ud83d?"}, AUDIOMCQ, {"id": "\ud83d"})
    assert len(records) == 1
    assert "holds half of a surrogate pair" in bad[0]["reason"] and [line["file"][-3:] for line in bad] == [
        "[0]",
        "[2]",
    ]


def test_strict_makes_any_such_row_an_error_and_writes_nothing_but_the_list(tmp_path):
    clip(tmp_path, "AudioCaps/7.wav")
    with pytest.raises(DataError, match="1 rows cannot be converted, and --strict was given"):
        run(tmp_path, "audiomcq", AUDIOMCQ, {**AUDIOMCQ, "answer": "Fire"}, options=["--strict"])
    assert not (tmp_path / "out.jsonl").exists() and len(lines_of(tmp_path / "out.bad.jsonl")) == 1


def test_drop_view_leaves_out_what_has_to_be_seen_without_calling_it_bad(tmp_path, capsys):
    clip(tmp_path, "-HG3Omg_89c_30.wav")
    rows = [
        AVQA,
        {**AVQA, "id": 2, "question_relation": "Sound"},
        {**AVQA, "id": 3, "question_relation": "Both", "question_text": "Which color is the car in the video?"},
    ]
    records, bad = run(tmp_path, "avqa", *rows, options=["--drop-view", "--strict"])
    assert [record["id"] for record in records] == ["2"] and bad == []
    assert "2 about the picture or a colour, dropped" in capsys.readouterr().out
    assert len(run(tmp_path, "avqa", *rows, options=["--force"])[0]) == 3
    with pytest.raises(DataError, match="--drop-view: mmau does not say"):
        run(tmp_path, "mmau", MMAU, options=["--drop-view", "--force"])


def test_a_benchmarks_unknown_answers_are_null_and_its_choices_may_coincide(tmp_path, capsys):
    clip(tmp_path, "3fe64f3d.wav")
    rows = [{**MMAU, "answer": ""}, {**MMAU, "id": "2", "choices": ["Man", "man", "Woman"], "answer": "man"}]
    records, bad = run(tmp_path, "mmau", *rows)
    assert [record["answer"] for record in records] == [None, 1] and bad == []
    assert "1 of the questions have no known answer" in capsys.readouterr().out
    examples, _ = load_examples(tmp_path / "out.jsonl", benchmark=True)
    assert [example.answer for example in examples] == [None, 1]


def test_ids_that_name_clips_are_told_apart_and_a_benchmarks_never_changed(tmp_path, capsys):
    clip(tmp_path, "Yabc.flac")
    records, bad = run(tmp_path, "audio_flamingo", FLAMINGO, FLAMINGO, {**FLAMINGO, "id": "other"}, FLAMINGO)
    assert [record["id"] for record in records] == ["Yabc", "Yabc#2", "other", "Yabc#3"] and bad == []
    assert "2 repeated ids have a number added" in capsys.readouterr().out
    clip(tmp_path, "3fe64f3d.wav")
    records, bad = run(tmp_path, "mmau", MMAU, MMAU, options=["--force"])
    assert [record["id"] for record in records] == ["3fe64f3d"]
    assert [(line["file"], line["id"]) for line in bad] == [("given.json[1]", "3fe64f3d")]


def test_a_clip_found_by_its_last_part_is_not_taken_for_another_of_that_name(tmp_path):
    clip(tmp_path, "7.wav")
    rows = [AUDIOMCQ, {**AUDIOMCQ, "audio_path": "Clotho/7.wav"}, {**AUDIOMCQ, "audio_path": "./AudioCaps/7.wav"}]
    records, bad = run(tmp_path, "audiomcq", *rows)
    assert [record["id"] for record in records] == ["7", "7#2"]
    assert [line["file"] for line in bad] == ["given.json[1]"] and "is 'AudioCaps/7.wav' already" in bad[0]["reason"]


def test_clips_elsewhere_are_named_by_their_full_path_and_the_inputs_directory_is_looked_in_first(tmp_path):
    clip(tmp_path, "Yabc.flac")
    (tmp_path / "clips" / "given.json").write_text(json.dumps([FLAMINGO]))
    out = tmp_path / "deep" / "er" / "out.jsonl"
    convert.main(["audio_flamingo", str(tmp_path / "clips" / "given.json"), str(out)])
    assert lines_of(out)[0]["audio_path"] == str(tmp_path / "clips" / "Yabc.flac")
    assert load_examples(out, allow_outside=True)[0][0].clips[0].source.is_file()


def test_an_output_that_is_there_is_overwritten_only_by_force_and_its_old_list_goes_with_it(tmp_path):
    clip(tmp_path, "AudioCaps/7.wav")
    run(tmp_path, "audiomcq", AUDIOMCQ, {**AUDIOMCQ, "answer": "Fire"})
    before = (tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.bad.jsonl").read_bytes()
    with pytest.raises(DataError, match="out.jsonl: exists already; .*--force"):
        run(tmp_path, "audiomcq", {**AUDIOMCQ, "id": "8"})
    assert before == ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.bad.jsonl").read_bytes())
    given = str(tmp_path / "given.json")
    with pytest.raises(DataError, match="given.json: is the input"):
        convert.main(["audiomcq", given, given, "--force"])
    records, _ = run(tmp_path, "audiomcq", {**AUDIOMCQ, "id": "8"}, options=["--force"])
    assert [record["id"] for record in records] == ["8"] and not (tmp_path / "out.bad.jsonl").exists()


def test_what_would_not_load_is_never_written_over_what_is_there(tmp_path):
    record = RECORDS["mmau"][1]
    for wrong in ({**record, "answer": 9}, {**record, "answer": None}):
        (tmp_path / "out.jsonl").write_text("before")
        with pytest.raises(DataError, match="out.jsonl.partial:1"):
            write(Conversion(records=[wrong]), tmp_path / "out.jsonl", benchmark=False)
        assert (tmp_path / "out.jsonl").read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_to_convert_and_nowhere_to_look_are_errors(tmp_path):
    with pytest.raises(DataError, match="no row could be converted; is it a file of mmau"):
        run(tmp_path, "mmau", AVQA)
    assert len(lines_of(tmp_path / "out.bad.jsonl")) == 1 and not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match="nowhere: not a directory"):
        run(tmp_path, "mmau", MMAU, options=["--audio", str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="unknown source"):
        run(tmp_path, "mmmu", MMAU)


def test_a_benchmarks_question_stays_without_its_clip_so_that_it_is_counted(tmp_path, capsys):
    clip(tmp_path, "test-mini-audios/3fe64f3d.wav")
    gone = {**MMAU, "id": "gone", "audio_id": "./test-mini-audios/gone.wav"}
    records, bad = run(tmp_path, "mmau", MMAU, gone)
    assert [record["id"] for record in records] == ["3fe64f3d", "gone"] and bad == []
    assert records[1]["audio_path"] == "clips/test-mini-audios/gone.wav"
    assert "1 clips are missing, first ./test-mini-audios/gone.wav" in capsys.readouterr().out


def test_names_of_missing_clips_cannot_steer_the_terminal_and_are_cut(tmp_path, capsys):
    clip(tmp_path, "test-mini-audios/3fe64f3d.wav")
    run(tmp_path, "mmau", MMAU, *({**MMAU, "id": str(n), "audio_id": f"{n}{HOSTILE}.wav"} for n in range(9)))
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert all(line.isprintable() and len(line) < 1200 for line in lines)
    assert any(r"9 clips are missing, first 0\x1b[2J" in line for line in lines)


@pytest.mark.parametrize("name", ["../secret.wav", "{0}/secret.wav", "audio/../../secret.wav"])
def test_a_name_that_leads_out_of_the_directory_of_the_clips_finds_nothing_there(tmp_path, name):
    soundfile.write(tmp_path / "secret.wav", [0.1] * 1600, 16_000)
    clip(tmp_path, "audio/a.wav")
    clip(tmp_path, "7.wav")
    hostile = AUDIOMCQ | {"id": "8", "audio_path": name.format(tmp_path)}
    records, bad = run(tmp_path, "audiomcq", AUDIOMCQ | {"audio_path": "7.wav"}, hostile)
    assert [record["audio_path"] for record in records] == ["clips/7.wav"]
    assert len(bad) == 1 and "no such clip" in bad[0]["reason"]
