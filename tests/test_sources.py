"""data/sources: a row as each data set is published becomes the question that it asks."""

import json

import pytest

from hark.data.errors import DataError
from hark.data.json_files import read_rows
from hark.data.sources import SOURCES, find_source
from hark.data.sources.answers import find_answer, split_options, unlabelled
from hark.data.sources.rows import Question, SourceError

AVQA = {
    "id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
    "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1,
    "question_relation": "View", "question_type": "Happening",
}  # fmt: skip
AVQA_PROCESSED = {
    "file_name": "-HG3Omg_89c_000030.wav",
    "question": "How many animals are there in the video?\nChoices:\nA. 3\nB. One\nC. 4\nD. 2",
    "answer": "B. One",
}
AUDIOMCQ = {
    "source_dataset": "AudioCaps", "id": "7", "question_type": "sound", "audio_path": "AudioCaps/7.wav",
    "question": "How does the water move?", "answer": "Water splashing continuously",
    "choices": ["Water is pouring steadily", "Water splashing continuously", "Water is boiling rapidly"],
    "audio-contribution": "strong", "structured_cot": "...",
}  # fmt: skip
MMAU = {
    "id": "3fe64f3d", "audio_id": "./test-mini-audios/3fe64f3d.wav", "question": "Who speaks?",
    "choices": ["Man", "Woman", "Cannot be reliably determined from audio "], "answer": "Man", "dataset": "AudioSet",
    "task": "sound", "split": "test-mini", "category": "Reasoning", "sub-category": "Acoustic Source Inference",
    "difficulty": "medium",
}  # fmt: skip
MMAR = {
    "id": "KBn0lNwcPHA_00-00-00_00-00-30", "audio_path": "./audio/KBn0lNwcPHA_00-00-00_00-00-30.wav",
    "question": "他说了什么？", "choices": ["你好", "再见"], "answer": "再见", "modality": "mix-sound-speech",
    "category": "Semantic Layer", "sub-category": "Content Analysis", "language": "zh", "url": "https://...",
    "timestamp": "00:00:00,00:00:30",
}  # fmt: skip
MMSU = {
    "id": "a-1", "task_name": "counting", "audio_path": "audio/a-1.wav", "question": "How many syllables?",
    "choice_a": 3, "choice_b": 4, "choice_c": "", "choice_d": None, "answer_gt": 4, "category": "Perception",
    "sub-category": "Linguistics", "sub-sub-category": "Phonology", "linguistics_sub_discipline": "Phonetics",
}  # fmt: skip
FLAMINGO = {
    "id": "Yabc", "sound": "Yabc.flac", "duration": 10.0,
    "conversations": [
        {"from": "human", "value": "<sound>\nWhere are they?\nChoose the correct option from the following options:\n"
                                   "(A) swimming pool\n(B) restaurant\n(C) church"},
        {"from": "gpt", "value": "(B) restaurant"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        ("avqa", AVQA, Question(
            "183", ("-HG3Omg_89c_000030", "-HG3Omg_89c_30"), "What happened in the audio?", AVQA["multi_choice"], 1,
            category="Happening", sub_category="View")),
        ("avqa_processed", AVQA_PROCESSED, Question(
            "-HG3Omg_89c_000030", ("-HG3Omg_89c_000030.wav",), "How many animals are there in the audio?",
            ["3", "One", "4", "2"], 1)),
        ("audiomcq", AUDIOMCQ, Question(
            "7", ("AudioCaps/7.wav",), "How does the water move?", AUDIOMCQ["choices"], 1, task="sound",
            category="AudioCaps", sub_category="strong")),
        ("mmau", MMAU, Question(
            "3fe64f3d", ("./test-mini-audios/3fe64f3d.wav",), "Who speaks?", MMAU["choices"], 0, "sound", "Reasoning",
            "Acoustic Source Inference", "medium")),
        ("mmar", MMAR, Question(
            MMAR["id"], (MMAR["audio_path"],), "他说了什么？", ["你好", "再见"], 1, "mix-sound-speech",
            "Semantic Layer", "Content Analysis")),
        ("mmsu", MMSU, Question(
            "a-1", ("audio/a-1.wav",), "How many syllables?", ["3", "4"], 1, "counting", "Perception", "Linguistics")),
        ("audio_flamingo", FLAMINGO, Question(
            "Yabc", ("Yabc.flac",), "Where are they?", ["swimming pool", "restaurant", "church"], 1)),
    ],
)  # fmt: skip
def test_a_row_as_it_is_published_becomes_its_question(source, row, expected):
    assert SOURCES[source].question(row) == expected


def test_every_source_is_tested_and_an_unknown_one_is_answered_with_the_nearest():
    assert set(SOURCES) == {"avqa", "avqa_processed", "audiomcq", "audio_flamingo", "mmau", "mmar", "mmsu", "csv"}
    with pytest.raises(DataError, match="unknown source 'mmma'; did you mean 'mm"):
        find_source("mmma")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("Car", 0), (" car. ", 0), ("B", 1), ("(B)", 1), ("B.", 1), ("B. Dog", 1), ("(B) dog.", 1), ("B) Dog", 1),
        ("C", 2), ("C. E flat", 2), ("A", 3), ("A. A", 3),
    ],
)  # fmt: skip
def test_an_answer_is_found_by_its_text_first_and_else_by_its_letter(answer, index):
    # The last choice is a text that is a letter: it is the note that is meant by "A".
    choices = ["Car", "Dog", "E flat", "A"] if answer != "A. A" else ["Car", "Dog", "E flat", "A. A"]
    assert find_answer(answer, choices) == index


@pytest.mark.parametrize("answer", ["Cat", "", "E", "(D)", "B. Car", "Dog bark", "At most 3"])
def test_an_answer_that_is_no_choice_or_contradicts_its_letter_is_refused(answer):
    with pytest.raises(SourceError, match="is none of the choices") as error:
        find_answer(answer, ["Car", "Dog", "At least 3"])
    assert error.value.kind == "answer not among the choices"


def test_an_answer_that_several_different_choices_could_be_is_refused_and_the_exact_one_is_not():
    assert find_answer("car", ["Car", "car"]) == 1
    with pytest.raises(SourceError):
        find_answer("CAR", ["Car", "car"])
    assert find_answer("rain", ["rain", "dog", "rain"]) == 0, "the same text twice is the same answer"


def test_labels_are_taken_off_only_where_all_choices_have_theirs():
    assert unlabelled(["A. x", "B. y"]) == ["x", "y"] == unlabelled(["(A) x", "(B) y"]) == unlabelled(["A) x", "B) y"])
    for choices in (["A. Smith", "Jones"], ["B. x", "A. y"], ["A", "B"], ["E. coli", "F. x"]):
        assert unlabelled(choices) == choices


@pytest.mark.parametrize(
    "text",
    [
        "Where (if at all)?\n(A) swimming pool. (B) church",
        "Where (if at all)? (A) swimming pool. (B) church",
        "Where (if at all)?\nOptions:\nA. swimming pool.\nB. church\nAnswer with the letter.",
        "Where (if at all)? Please choose one option from these:\nA) swimming pool.\nB) church",
    ],
)
def test_options_are_found_at_the_end_of_a_question_however_they_stand(text):
    assert split_options(text) == ("Where (if at all)?", ["swimming pool.", "church"])


def test_a_letter_in_the_question_itself_is_no_option():
    assert split_options("Is it (A) minor? (A) yes (B) no") == ("Is it (A) minor?", ["yes", "no"])


@pytest.mark.parametrize("text", ["Describe the sound.", "(A) only one", "(B) x (C) y", "Vitamin A. or B. here?"])
def test_a_question_without_options_is_refused(text):
    with pytest.raises(SourceError, match="ends in no options"):
        split_options(text)


def flamingo(said, asked="<sound>\nWhere? (A) pool. (B) restaurant. (C) church.", **changes):
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return SOURCES["audio_flamingo"].question({**FLAMINGO, "conversations": turns, **changes})


@pytest.mark.parametrize(
    "said",
    [
        "(B) restaurant", "(B)", "B", "restaurant", "Plates clink, so not (C) church.\n(B) restaurant.",
        "<SUMMARY>(A)?</SUMMARY><CONCLUSION> (B) restaurant </CONCLUSION>",
        "There are plates. Therefore, the answer is (B) restaurant.",
    ],
)  # fmt: skip
def test_a_reply_names_its_choice_at_once_or_in_its_conclusion(said):
    assert flamingo(said).answer == 1


@pytest.mark.parametrize(
    "said", ["It may be (A) or (B).", "I hear (A) no pool at all.", "", "(D) forest", "(B) church"]
)
def test_a_reply_whose_choice_is_not_certain_is_refused_rather_than_guessed(said):
    with pytest.raises(SourceError):
        flamingo(said)


def test_instructions_after_the_options_are_no_part_of_the_last_one():
    asked = "<sound>\nWhere?\n(A) pool. (B) sea. Output the answer with <SUMMARY>, <CAPTION>, <REASONING> tags."
    assert flamingo("(B) sea", asked).choices == ["pool.", "sea."]
    asked = "<sound>\nWhere? (A) pool (B) sea\nPlease think and reason about the input audio before you respond."
    assert flamingo("(B) sea", asked).choices == ["pool", "sea"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"conversations": FLAMINGO["conversations"] * 2}, "not one question and one answer"),
        ({"conversations": "x"}, 'wrong "conversations"'),
        ({"sound": ["a.wav", "b.wav"]}, "several clips"),
        ({"sound": None}, 'no "sound"'),
    ],
)
def test_a_conversation_that_is_no_multiple_choice_question_says_so(change, kind):
    with pytest.raises(SourceError) as error:
        SOURCES["audio_flamingo"].question({**FLAMINGO, **change})
    assert error.value.kind == kind


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_the_answers_that_mmau_keeps_are_unknown_and_those_missing_elsewhere_are_a_fault(answer):
    assert SOURCES["mmau"].question({**MMAU, "answer": answer}).answer is None
    with pytest.raises(SourceError):
        SOURCES["audiomcq"].question({**AUDIOMCQ, "answer": answer})


@pytest.mark.parametrize(
    ("name", "row", "key"), [("mmau", MMAU, "answer"), ("mmar", MMAR, "answer"), ("mmsu", MMSU, "answer_gt")]
)
def test_a_benchmarks_answer_that_is_no_choice_stays_as_it_is(name, row, key):
    assert SOURCES[name].question({**row, key: "none of them"}).answer == "none of them"


def test_categories_may_be_lists_and_numbers_are_texts():
    question = SOURCES["mmau"].question({**MMAU, "category": ["Reasoning", "Ex"], "choices": [1, 2.5], "answer": 2.5})
    assert (question.category, question.choices, question.answer) == ("Reasoning, Ex", ["1", "2.5"], 1)


@pytest.mark.parametrize(
    ("change", "visual"),
    [
        ({}, True),
        ({"question_relation": "Sound"}, False),
        ({"question_relation": "Both", "question_text": "What Colour is the car?"}, True),
        ({"question_relation": "Sound", "question_text": "What colors are there?"}, True),
        ({"question_relation": "Sound", "question_text": "Is she a coloratura soprano?"}, False),
    ],
)
def test_a_question_is_visual_if_it_is_about_the_view_or_a_colour(change, visual):
    assert SOURCES["avqa"].is_visual({**AVQA, **change}) is visual


def test_videos_become_audios_in_any_case():
    question = SOURCES["avqa"].question({**AVQA, "question_text": "Video? In the videos, VIDEO."})
    assert question.text == "Audio? In the audios, AUDIO."


def test_a_name_without_a_start_in_it_is_looked_for_as_it_is():
    for name in ("clip", "a_b", "_000030", "a_²"):
        assert SOURCES["avqa"].question({**AVQA, "video_name": name}).clips == (name,)


@pytest.mark.parametrize("missing", ["id", "video_name", "question_text", "multi_choice", "answer"])
def test_a_missing_key_is_named_with_the_keys_that_are_there(missing):
    row = {key: value for key, value in AVQA.items() if key != missing}
    with pytest.raises(SourceError, match=f'"{missing}" is missing; the row has .*question_type') as error:
        SOURCES["avqa"].question(row)
    assert error.value.kind == f'no "{missing}"'


def test_arrays_and_lines_are_read_alike_with_and_without_a_byte_order_mark(tmp_path):
    rows = [{"id": 1, "x": "ä"}, {"id": 2, "x": "[b"}]
    for mark in ("", "\ufeff"):
        (tmp_path / "a.json").write_text(mark + "\n " + json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
        (tmp_path / "a.jsonl").write_text(mark + "\n\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
        assert list(read_rows(tmp_path / "a.json")) == [("a.json[0]", rows[0]), ("a.json[1]", rows[1])]
        assert list(read_rows(tmp_path / "a.jsonl")) == [("a.jsonl:1", rows[0]), ("a.jsonl:3", rows[1])]


def test_a_bad_row_does_not_hide_the_others_and_a_bad_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": \n"text"\n{"id": "\xff"}\n{"id": 2}\n')
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert [isinstance(row, DataError) for _, row in rows] == [False, True, True, True, False]
    (tmp_path / "a.json").write_text('[{"id": 1}, 5]')
    assert isinstance(dict(read_rows(tmp_path / "a.json"))["a.json[1]"], DataError)
    for name, message in (("cut.json", "not valid JSON"), ("none.json", "no such file")):
        (tmp_path / "cut.json").write_text('[{"id": 1}, ')
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))
