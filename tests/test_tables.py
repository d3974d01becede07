"""Parquet files and Hugging Face data sets as files of questions."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from datetime import datetime
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from hark.data import arrow, tables
from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.clip_memory import ClipMemory
from hark.data.clips import Rules, clips_in, inspect, inspect_all, usable
from hark.data.errors import AudioError, DataError
from hark.data.examples import load_examples
from hark.data.order import hold_out
from hark.launch import check_data, evaluate, train
from tests import decoders
from tests.clips import grown_by, write_questions
from tests.runs import largest_difference

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded on Linux only")
COUNT = 7
PATHS, BYTES = pyarrow.string(), pyarrow.binary()
STRUCT = pyarrow.struct([("bytes", BYTES), ("path", PATHS)])


@pytest.fixture
def jsonl(tmp_path) -> Path:
    changes = {
        "line2": {"video": 3},
        "line3": {"start": 0.1, "end": 0.3},
        "line4": {"multi_choice": [], "answer": None},
    }
    return write_questions(tmp_path / "files", COUNT, **changes)


def rows_of(jsonl: Path) -> list[dict]:
    return [json.loads(line) for line in jsonl.read_text().splitlines()]


def content(jsonl: Path, row: dict) -> bytes:
    return (jsonl.parent / row["audio_path"]).read_bytes()


def written(path: Path, rows: list[dict], kind: pyarrow.DataType, values: list, name="audio", size=3) -> Path:
    """A parquet file of the rows with a column of clips, in row groups of `size` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if k != "audio_path"} for row in rows])
    for key in {key for row in rows for key in row} - {*texts.column_names, "audio_path"}:  # keys of later rows alone
        texts = texts.append_column(key, pyarrow.array([row.get(key) for row in rows]))
    table = texts.append_column(name, pyarrow.array(values, kind))
    pyarrow.parquet.write_table(table, path, row_group_size=size)
    return path


def in_bytes(jsonl: Path, path: Path, **more) -> Path:
    rows = rows_of(jsonl)
    return written(path, rows, BYTES, [content(jsonl, row) for row in rows], **more)


def saved(jsonl: Path, directory: Path) -> str:
    """A data set with a split, saved by the library, whose column of clips is the library's own."""
    rows = rows_of(jsonl)
    both = [{"bytes": content(jsonl, row), "path": row["audio_path"]} for row in rows]
    file = written(directory.with_suffix(".parquet"), rows, STRUCT, both)
    data = datasets.Dataset(pyarrow.parquet.read_table(file)).cast_column("audio", datasets.Audio(sampling_rate=16_000))
    datasets.DatasetDict({"train": data}).save_to_disk(directory)
    return f"hf:{directory}:train"


def table(kind: str, jsonl: Path, tmp_path: Path) -> str:
    rows = rows_of(jsonl)
    if kind == "bytes":
        return str(in_bytes(jsonl, tmp_path / "t" / "a.parquet"))
    if kind == "paths":
        return str(written(jsonl.parent / "a.parquet", rows, PATHS, [row["audio_path"] for row in rows]))
    if kind == "both":
        both = [{"bytes": content(jsonl, row), "path": row["audio_path"]} for row in rows]
        return str(written(tmp_path / "t" / "a.parquet", rows, STRUCT, both))
    if kind == "folder":
        for n in (0, 1):
            half = rows[4 * n : 4 * n + 4]
            written(tmp_path / "t" / f"{n}.parquet", half, BYTES, [content(jsonl, row) for row in half])
        return str(tmp_path / "t")
    return saved(jsonl, tmp_path / "hf")


KINDS = ("bytes", "paths", "both", "folder", "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_holds_the_same_questions_and_clips_as_the_file_of_lines(tmp_path, jsonl, kind):
    expected, _ = load_examples(jsonl)
    found, _ = load_examples(path := table(kind, jsonl, tmp_path))
    assert len(found) == COUNT and found[1].extra["video"] == 3
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, clips=(), line="") == dataclasses.replace(other, clips=(), line="")
        (clip,), (file,) = one.clips, other.clips
        assert (clip.start, clip.end) == (file.start, file.end)
        settings = dict(sample_rate=16_000, max_seconds=5)
        assert np.array_equal(load_waveform(clip, **settings), load_waveform(file, **settings))
    last = {"folder": f"{path}/1.parquet[2]"}.get(kind, f"{path}[6]")
    assert found[-1].line == last


@pytest.mark.parametrize("kind", ["bytes", "both", "folder", "hf"])
def test_clips_stay_in_the_table_until_they_are_decoded(tmp_path, jsonl, kind):
    path = table(kind, jsonl, tmp_path)
    for file in jsonl.parent.glob("*.wav"):
        file.unlink()
    before = sorted(tmp_path.rglob("*"))
    examples, _ = load_examples(path)
    assert len(pickle.dumps(examples[0].clips)) < 1000, "a cell, and not the bytes in it"
    assert all(pickle.loads(pickle.dumps(example.clips)) == example.clips for example in examples)
    for example in examples:
        load_waveform(*example.clips, sample_rate=16_000, max_seconds=5)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_row_group_is_read_once_for_neighbours_and_only_for_the_clips(tmp_path, jsonl, monkeypatch):
    path = in_bytes(jsonl, tmp_path / "a.parquet")
    read, read_row_group = [], pyarrow.parquet.ParquetFile.read_row_group

    def counted(table, group, columns):
        read.append((group, columns))
        return read_row_group(table, group, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    for source in (clip.source for clip in clips_in(load_examples(path)[0])):
        found, _ = arrow.clip(str(path), source.group, source.place, source.column, source.item)
        assert found == source.read()
    assert read == [(0, ["audio"]), (1, ["audio"]), (2, ["audio"])]
    assert arrow.row_group.cache_info().currsize <= arrow.GROUPS


def test_a_list_of_clips_is_a_question_about_several(tmp_path, jsonl):
    rows = rows_of(jsonl)[:2]
    clips = [content(jsonl, row) for row in rows_of(jsonl)]
    for name, kind, make in (
        ("a", BYTES, lambda n: clips[n]),
        ("b", STRUCT, lambda n: {"bytes": clips[n], "path": None}),
        ("c", PATHS, lambda n: f"train-{n}.wav"),
    ):
        file = written(jsonl.parent / f"{name}.parquet", rows, pyarrow.list_(kind), [[make(0), make(1)], [make(2)]])
        for path in (str(file), hub_of(file)):
            examples, _ = load_examples(path, audio_root=jsonl.parent)
            assert [len(example.clips) for example in examples] == [2, 1]
            for clip, n in zip(clips_in(examples), range(3), strict=True):
                expected = soundfile.read(jsonl.parent / f"train-{n}.wav", dtype="float32")[0]
                assert np.array_equal(load_waveform(clip, sample_rate=16_000, max_seconds=5), expected)


def hub_of(file: Path) -> str:
    """The same table as a data set in a directory."""
    data = datasets.Dataset(pyarrow.parquet.read_table(file))
    data.save_to_disk(file.with_suffix(""))
    return f"hf:{file.with_suffix('')}:train"


def test_rows_need_no_id_and_other_columns_of_bytes_are_not_read(tmp_path, jsonl):
    rows = [{key: value for key, value in row.items() if key != "id"} | {"image": b"x" * 100} for row in rows_of(jsonl)]
    clips = [content(jsonl, row) for row in rows]
    single = written(tmp_path / "one" / "a.parquet", rows, BYTES, clips)
    assert [example.id for example in load_examples(single)[0]] == list("0123456")
    assert "image" not in load_examples(single)[0][0].extra
    written(tmp_path / "one" / "b.parquet", rows, BYTES, clips)
    assert [example.id for example in load_examples(tmp_path / "one")[0]][6:8] == ["a[6]", "b[0]"]
    example = load_examples(hub_of(single))[0][3]
    assert example.id == "3" and "image" not in example.extra


def test_a_column_of_another_name_counts_instead_of_the_key_itself(tmp_path, jsonl):
    rows = [{"uid": row["id"], "text": row["question_text"], **row, "question_text": "other"} for row in rows_of(jsonl)]
    rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    path = written(tmp_path / "a.parquet", rows, BYTES, [content(jsonl, row) for row in rows])
    examples, _ = load_examples(path, columns={"id": "uid", "question_text": "text"})
    assert [(one.id, one.question) for one in examples] == [(row["uid"], row["text"]) for row in rows]
    assert "question_text" not in examples[0].extra and "uid" not in examples[0].extra


def test_keys_that_have_another_name_are_named_by_columns(tmp_path, jsonl):
    rows = [{"sound": row["audio_path"], "text": row["question_text"], **row} for row in rows_of(jsonl)]
    for row in rows:
        del row["question_text"]
    path = written(tmp_path / "a.parquet", rows, BYTES, [content(jsonl, row) for row in rows], name="sound2")
    with pytest.raises(DataError, match=r'a.parquet\[0\]: "audio_path" is missing; each line needs'):
        load_examples(path)
    examples, _ = load_examples(path, columns={"audio_path": "sound2", "question_text": "text"})
    assert [example.question for example in examples] == [row["text"] for row in rows]
    assert isinstance(examples[0].clips[0].source, tables.ParquetCell)
    with pytest.raises(DataError, match="unknown key in columns 'question'; did you mean 'question_text'"):
        load_examples(path, columns={"question": "text"})
    check_data.main([str(path), "--columns", "audio_path=sound2", "question_text=text"])
    with pytest.raises(DataError, match="--columns has 'text'; expected KEY=NAME, such as question_text=question"):
        check_data.main([str(path), "--columns", "text"])
    lines = jsonl.with_name("renamed.jsonl")
    lines.write_text(jsonl.read_text().replace("question_text", "text"))
    assert load_examples(lines, columns={"question_text": "text"})[0][0].question == examples[0].question


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "folder", "hf"])
def test_an_error_names_the_file_and_the_row(tmp_path, jsonl, kind):
    lines = jsonl.read_text().splitlines()
    row = {**json.loads(lines[5]), "answer": 9}
    jsonl.write_text("\n".join([*lines[:5], json.dumps(row), *lines[6:]]))
    path = table(kind, jsonl, tmp_path)
    where = f"{path}/1.parquet[1]" if kind == "folder" else f"{path}[5]"
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f'{where}: "answer" is 9, out of range')
    examples, bad = load_examples(path, skip_bad=True)
    assert len(examples) == 6 and [(one.line, one.id) for one in bad] == [(where, "train-5")]


def test_a_clip_in_a_table_that_cannot_be_used_is_named_with_its_cell(tmp_path, jsonl):
    rows = rows_of(jsonl)
    whole = content(jsonl, rows[0])
    values = [whole, b"", b"no sound", whole[:-2000], None, whole, whole]
    path = written(tmp_path / "a.parquet", rows, BYTES, values)
    examples, _ = load_examples(path)
    found = {clip: inspect(clip, Rules(16_000, 5.0)) for clip in clips_in(examples)}
    assert [finding.fault for finding in found.values()] == ["", "broken", "broken", "cut off", "broken", "", ""]
    with pytest.raises(AudioError, match=r"a.parquet\[1\]: .*a.parquet\[1\].audio: holds no bytes"):
        usable(examples, found, long_clips="error", skip_bad=False)
    files = [{"bytes": None, "path": "there.wav"}, {"bytes": None, "path": "none.wav"}]
    (tmp_path / "there.wav").write_bytes(whole)
    path = written(tmp_path / "b.parquet", rows[:2], STRUCT, files)
    good, bad = (example.clips[0] for example in load_examples(path)[0])
    assert good == Clip(tmp_path / "there.wav") and load_waveform(good, sample_rate=16_000, max_seconds=5).any()
    with pytest.raises(AudioError, match="its path 'none.wav' names no file; set data.audio_root"):
        load_waveform(bad, sample_rate=16_000, max_seconds=5)


def test_what_cannot_be_read_is_one_sentence(tmp_path, jsonl):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read \(.*\); expected a parquet file"):
        load_examples(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"none.parquet: cannot be read \(no such file\)"):
        load_examples(tmp_path / "none.parquet")
    name = saved(jsonl, tmp_path / "hf")
    with pytest.raises(DataError, match="hf:.*:test: has no split 'test'; its splits are train"):
        load_examples(name.replace(":train", ":test"))
    with pytest.raises(DataError, match="hf:x: names no split; expected hf:OWNER/NAME:SPLIT"):
        load_examples("hf:x")
    with pytest.raises(DataError, match=rf"hf:{tmp_path}/none:train: cannot be loaded \("):
        load_examples(f"hf:{tmp_path}/none:train")


@pytest.mark.parametrize(
    ("package", "path", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("datasets", "hf:owner/name:train", "datasets")],
)
def test_a_missing_package_is_one_sentence_with_the_command(tmp_path, monkeypatch, package, path, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value) == f'{path}: needs the package {package}; install it with pip install "hark[{extra}]"'


def test_a_data_set_of_the_hub_is_loaded_by_its_name_and_split(jsonl, tmp_path, monkeypatch):
    local = saved(jsonl, tmp_path / "hf")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.load_from_disk(str(tmp_path / "hf"))[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples, _ = load_examples("hf:owner/name:train")
    assert asked == [("owner/name", "train")] and examples[2].line == "hf:owner/name:train[2]"
    assert [example.question for example in examples] == [one.question for one in load_examples(local)[0]]
    tables._dataset.cache_clear()


def test_a_script_beside_a_data_set_never_runs_and_a_library_that_runs_it_is_refused(jsonl, tmp_path, monkeypatch):
    name, ran = saved(jsonl, tmp_path / "hf"), tmp_path / "ran"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match=r"cannot be loaded \(Dataset scripts are no longer supported"):
        load_examples(f"hf:{tmp_path}/evil:train")
    assert not ran.exists()
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(DataError, match="needs datasets 4 or later, and 3.6.0 is installed, which runs scripts"):
        load_examples(name)


def test_data_sets_are_loaded_in_the_one_place_that_looks_at_the_version_of_the_library():
    root = Path(__file__).parents[1]
    files = [file for name in ("data", "grpo", "launch", "models") for file in (root / name).rglob("*.py")]
    texts = {file.relative_to(root).as_posix(): file.read_text() for file in files}
    importing = [name for name, text in texts.items() if re.search(r"(?m)^\s*(import|from) datasets\b", text)]
    assert importing == ["data/tables.py"]
    loads = [line.strip() for line in texts["data/tables.py"].split("\n") if "datasets.load" in line]
    assert loads == ["found = datasets.load_dataset(place, split=split)", "found = datasets.load_from_disk(place)"]


# What takes memory, or is a fault of one row ------------------------------------------------------------------------


def questions(count: int, **columns: pyarrow.Array) -> pyarrow.Table:
    """Questions that differ in their number alone, with more columns."""
    row = {"audio_path": "a.wav", "question_text": "Which?", "multi_choice": ["a", "b"], "answer": 0}
    table = pyarrow.Table.from_pylist([row | {"id": str(n)} for n in range(count)])
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
    return table


def repeated(value: str | bytes, count: int) -> pyarrow.Array:
    """A column of one value, which is in the file once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


def stored(path: Path, table: pyarrow.Table, kind: str) -> str:
    """The table as a parquet file, with or without figures of its columns, or as a data set in a directory."""
    if kind == "hf":
        datasets.Dataset(table).save_to_disk(path)
        return f"hf:{path}:train"
    pyarrow.parquet.write_table(
        table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30,
        write_statistics=kind != "bare parquet",
    )  # fmt: skip
    return str(path)


@pytest.fixture
def small_reader(monkeypatch):
    """The process that reads parquet files, with 1 GiB of memory."""
    monkeypatch.setattr(tables, "MEMORY", 1 << 30)
    tables._reader.cache_clear()
    yield
    tables._reader.cache_clear()


@LINUX
def test_a_file_of_kilobytes_that_holds_gigabytes_is_an_error_of_one_line(tmp_path, small_reader):
    path = stored(tmp_path / "a.parquet", questions(256, own=repeated("x" * 30_000_000, 256)), "parquet")
    assert Path(path).stat().st_size < 20_000

    def use():
        with pytest.raises(DataError, match=r"a.parquet: cannot be read: its process needed more than 1 GiB; write it"):
            load_examples(path, skip_bad=True)

    assert grown_by(use) < 64 << 20


@LINUX
def test_clips_of_kilobytes_that_hold_gigabytes_are_an_error_of_one_line(tmp_path, small_reader):
    table = questions(64).drop_columns("audio_path").append_column("audio", repeated(b"x" * 30_000_000, 64))
    path = stored(tmp_path / "a.parquet", table, "parquet")
    examples, _ = load_examples(path)
    with pytest.raises(DataError, match=r"a.parquet: cannot be read: .* more than 1 GiB; .* row groups of 100 rows"):
        inspect(examples[0].clips[0], Rules(16_000, 5.0))


def test_a_process_that_dies_while_it_reads_a_table_is_an_error_of_one_line(tmp_path, jsonl, monkeypatch):
    path = in_bytes(jsonl, tmp_path / "a.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(arrow, "rows", decoders.exits)
        with pytest.raises(DataError, match=r"a.parquet: cannot be read: its process died with status 3; write it"):
            load_examples(path)
    assert len(load_examples(path)[0]) == COUNT, "by a new process"


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize(
    "large",
    [
        "x" * (arrow.LARGEST_ROW + 1),
        [0] * (arrow.LARGEST_ROW // 8),
        [None] * (arrow.LARGEST_ROW // 8),
        [[{"a": None}]] * (arrow.LARGEST_ROW // 16),
    ],
    ids=["text", "numbers", "nulls", "structs"],
)
def test_only_the_row_that_is_too_large_is_bad(tmp_path, kind, large):
    own = pyarrow.array([None, large, None])
    good, bad = load_examples(stored(tmp_path / "a.parquet", questions(3, own=own), kind), skip_bad=True)
    assert [example.id for example in good] == ["0", "2"]
    assert [one.line[-3:] for one in bad] == ["[1]"]
    assert bad[0].reason == "has more than 8 MB beside its clips; expected texts and numbers"


def test_rows_that_are_too_large_together_are_good(tmp_path):
    own = pyarrow.array(["x" * (arrow.LARGEST_ROW // 2)] * 4)
    for kind in ("parquet", "hf"):
        examples, _ = load_examples(stored(tmp_path / f"{kind}.parquet", questions(4, own=own), kind))
        assert [len(example.extra["own"]) for example in examples] == [arrow.LARGEST_ROW // 2] * 4


def test_a_row_that_arrow_holds_once_is_measured_as_python_holds_it():
    assert isinstance(pickle.loads(arrow._packed({"a": ["x" * 3_000_000 + str(n) for n in range(3)]})), DataError)
    assert pickle.loads(arrow._packed({"a": "x" * 3_000_000})) == {"a": "x" * 3_000_000}


def test_a_data_set_whose_values_may_share_bytes_is_refused(tmp_path):
    for own in (
        pyarrow.array(["x"], pyarrow.string_view()),
        pyarrow.array([["x"]], pyarrow.list_(pyarrow.string_view())),
    ):
        assert arrow.repeats(own.type)
    name = stored(tmp_path / "a", questions(1, own=pyarrow.array(["x"], pyarrow.string_view())), "hf")
    with pytest.raises(DataError, match="its column 'own' is of the type string_view; expected string; cast it"):
        load_examples(name)


def test_a_text_that_ends_before_it_begins_is_a_bad_row():
    places = pyarrow.py_buffer(np.array([0, 4, 2, 8, 8], np.int32).tobytes())
    own = pyarrow.StringArray.from_buffers(4, places, pyarrow.py_buffer(b"12345678"))
    rows = arrow.converted(pyarrow.table({"own": own}), None)
    assert [rows[0], *rows[2:]] == [{"own": "1234"}, {"own": "345678"}, {"own": ""}]
    assert "its 'own' cannot be read (" in str(rows[1])


def test_rows_out_of_proportion_to_their_file_are_an_error(tmp_path, monkeypatch):
    path = stored(tmp_path / "a.parquet", questions(3000, question_text=repeated("Which? " * 50, 3000)), "parquet")
    assert len(load_examples(path)[0]) == 3000
    monkeypatch.setattr(tables, "SMALL", 1000)
    monkeypatch.setattr(tables, "RATIO", 10)
    with pytest.raises(
        DataError, match="a.parquet: its rows are over 10 times as large as the file; write them as JSON"
    ):
        load_examples(path)


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_only_the_row_whose_text_is_no_utf8_or_whose_time_python_has_not_is_bad(tmp_path, kind):
    texts = pyarrow.array([b"Which?", b"\xff\xfe", b"Which?", b"Which?"]).view(pyarrow.string())
    times = pyarrow.array([0, 0, 2**62, 10**6], pyarrow.timestamp("us"))
    path = stored(tmp_path / "a.parquet", questions(4, question_text=texts, when=times), kind)
    good, bad = load_examples(path, skip_bad=True)
    assert [example.extra["when"] for example in good] == [datetime(1970, 1, 1), datetime(1970, 1, 1, 0, 0, 1)]
    assert [one.line[-3:] for one in bad] == ["[1]", "[2]"]
    assert "its 'question_text' cannot be read (" in bad[0].reason and "its 'when' cannot be read (" in bad[1].reason
    with pytest.raises(DataError, match=r"\[1\]: its 'question_text' cannot be read \(.*UTF"):
        load_examples(path)


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have_is_one_that_names_no_file(tmp_path, jsonl, kind, path):
    whole = content(jsonl, rows_of(jsonl)[0])
    clips = pyarrow.array([{"bytes": whole, "path": path}, {"bytes": None, "path": path}], STRUCT)
    name = stored(tmp_path / "a.parquet", questions(2).drop_columns("audio_path").append_column("audio", clips), kind)
    good, bad = (example.clips[0] for example in load_examples(name, skip_bad=True)[0])
    assert load_waveform(good, sample_rate=16_000, max_seconds=5).any()
    assert inspect(bad, Rules(16_000, 5.0)).reason.startswith("holds no bytes, and its path")


@pytest.mark.parametrize("kind", ["parquet", "bare parquet", "hf"])
@pytest.mark.parametrize("several", [False, True])
def test_a_file_of_the_name_beside_the_bytes_of_a_clip_is_not_read(tmp_path, jsonl, kind, several):
    rows = rows_of(jsonl)[:4]
    clips = [{"bytes": content(jsonl, row), "path": "other.wav"} for row in rows]
    soundfile.write(tmp_path / "other.wav", np.zeros(16_000), 16_000)
    for absent in ([], [2], [0, 1, 2, 3]):
        values = [clip | ({"bytes": None} if n in absent else {}) for n, clip in enumerate(clips)]
        column = pyarrow.array([[value] for value in values] if several else values)
        table = questions(4).drop_columns("audio_path").append_column("audio", column)
        name = stored(tmp_path / f"{len(absent)}.parquet", table, kind)
        sources = [example.clips[0].source for example in load_examples(name, audio_root=tmp_path)[0]]
        assert [n for n, source in enumerate(sources) if source == tmp_path / "other.wav"] == absent
        read = [source.read() for n, source in enumerate(sources) if n not in absent]
        assert read == [clip["bytes"] for n, clip in enumerate(clips) if n not in absent]


def test_a_clip_in_a_cell_has_a_bound(monkeypatch):
    column = pyarrow.chunked_array([pyarrow.array([b"12345", b"1234"])])
    monkeypatch.setattr(arrow, "LARGEST_CLIP", 4)
    assert arrow.content(column, 1, None) == (b"1234", None)
    with pytest.raises(DataError, match="holds more than 0 MB; expected a clip; keep longer ones as files"):
        arrow.content(column, 0, None)


def test_rows_are_read_on_wherever_another_reader_has_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "REPLY", 1)
    path = stored(tmp_path / "a.parquet", questions(5), "parquet")
    asked = [0, 1, 0, 1, 2, 4, 3]

    def number(start: int) -> str:
        return pickle.loads(arrow.rows(path, tables.AUDIO, start)[0][-1])["id"]

    assert [number(start) for start in asked] == list(map(str, asked))
    assert arrow.rows(path, tables.AUDIO, 5) == [] and len(arrow._streams) <= arrow.STREAMS


# Held out, remembered, run --------------------------------------------------------------------------------------------


def test_rows_with_the_same_sound_are_held_out_together(tmp_path, jsonl):
    rows = rows_of(jsonl)
    values = [content(jsonl, rows[n % 3]) for n in range(COUNT)]
    examples, _ = load_examples(written(tmp_path / "a.parquet", rows, BYTES, values))
    memory = ClipMemory("r", tmp_path / "memory")
    for _ in range(2):  # decoded, and then remembered
        found = dict(inspect_all(clips_in(examples), Rules(16_000, 5.0), workers=2, memory=memory))
        measured, _ = usable(examples, found, long_clips="error", skip_bad=False)
        for seed in range(5):
            training, held_out = hold_out(measured, 1, seed)
            assert not {int(one.id[6:]) % 3 for one in training} & {int(one.id[6:]) % 3 for one in held_out}


@pytest.mark.parametrize("kind", ["bytes", "hf"])
def test_clips_in_a_table_are_decoded_once_until_they_change(tmp_path, jsonl, kind, monkeypatch):
    memory, decoded = ClipMemory("r", tmp_path / "memory"), []
    monkeypatch.setattr("hark.data.clips.inspect", lambda clip, *rest: decoded.append(clip) or inspect(clip, *rest))
    path = table(kind, jsonl, tmp_path)
    for expected in (COUNT, 0):
        decoded.clear()
        dict(inspect_all(clips_in(load_examples(path)[0]), Rules(16_000, 5.0), workers=2, memory=memory))
        assert len(decoded) == expected
    (jsonl.parent / "train-0.wav").write_bytes((jsonl.parent / "train-6.wav").read_bytes())
    tables._dataset.cache_clear()
    again = in_bytes(jsonl, Path(path)) if kind == "bytes" else saved(jsonl, tmp_path / "hf2")
    if kind == "hf":
        return
    dict(inspect_all(clips_in(load_examples(again)[0]), Rules(16_000, 5.0), workers=2, memory=memory))
    assert [clip.source.row for clip in decoded] == [0]


def settings_of(tmp_path, model, data, name):
    (tmp_path / "c.yaml").write_text("{}")
    return [
        str(tmp_path / "c.yaml"), f"run.directory={tmp_path}/{name}", f"model.path={model}", f"data.train={data}",
        f"data.test={data}", "rollout.group_size=2", "rollout.max_new_tokens=9", "optim.prompts_per_step=4",
        "optim.steps=3", "optim.lr=1e-3", "loss.beta=0", "data.held_out=2", "evaluation.every=3",
        "reward.weights={format: 1.0}", "evaluation.limit=3",
    ]  # fmt: skip


def test_a_run_on_a_table_is_that_on_the_file_of_lines(tmp_path, jsonl, qwen2_audio_dir, capsys):
    paths = table("paths", jsonl, tmp_path)
    for name, data in (("lines", jsonl), ("table", paths)):
        train.main(settings_of(tmp_path, qwen2_audio_dir, data, name))
        evaluate.main([f"{tmp_path}/{name}"])
    assert largest_difference(tmp_path / "lines", tmp_path / "table") == 0.0
    rows = [json.loads((tmp_path / name / "evaluation.json").read_text())["rows"] for name in ("lines", "table")]
    assert rows[0] == rows[1]
    check_data.main([saved(jsonl, tmp_path / "hf")])
    out = capsys.readouterr().out
    assert "7 about 7 clips, in hf:" in out and "open questions             1\n" in out
    assert "other keys, for rewards    video: 7" in out and "all questions can be used" in out
