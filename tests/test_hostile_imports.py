"""A CTranslate2 or GGUF model, or a codec, that somebody made to do harm, or that is damaged: errors of one line."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hark import UserError
from hark.data.errors import DataError
from hark.models.codec import Codec, Settings, load_codec
from hark.models.ctranslate2 import import_whisper, read_tensors
from hark.models.gguf import check_header, import_gguf
from tests.test_import_model import FLOAT16, source, tensors_of, whisper, write_gguf, written  # noqa: F401  (fixtures)

SMALL = Settings(codes=4, frames=2, mels=8, n_fft=64, hop=16)


def sentence(error: Exception) -> bool:
    return str(error).isprintable() and len(str(error)) < 1000


def only_sentences(use, changed) -> int:
    """Use each changed file; an error must be one sentence. Returns how many were refused."""
    refused = 0
    for change in changed:
        change()
        try:
            use()
        except UserError as error:
            assert sentence(error)
            refused += 1
    return refused


def test_lengths_in_a_model_bin_are_compared_with_the_file_before_anything_is_allocated(source):  # noqa: F811
    path = source / "model.bin"
    whole = path.read_bytes()
    started = time.monotonic()
    for size in range(0, len(whole) - 70, 997):  # the names at the end are not read
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as error:
            read_tensors(path)
        assert sentence(error.value)
    head = (6).to_bytes(4, "little") + b"\x0c\0WhisperSpec\0" + (3).to_bytes(4, "little")
    tensor = b"\x02\0a\0" + bytes([4]) + b"\xff\xff\xff\xff" * 4 + b"\0" + b"\xff\xff\xff\xff"
    for body in (b"\xff\xff\xff\xff", b"\xff\xff\xff\xff" + b"\xff\xff" + b"x" * 9, b"\x01\0\0\0" + tensor + b"x" * 99):
        path.write_bytes(head + body)
        with pytest.raises(DataError, match="is the file complete"):
            read_tensors(path)
    assert time.monotonic() - started < 20


def test_tensors_of_a_whisper_that_do_not_agree_are_one_sentence_and_take_no_memory(source, whisper, tmp_path):  # noqa: F811
    stored = tensors_of(whisper)
    wide = ("decoder/embeddings/weight", np.zeros((1, 3_000_000), np.float16), FLOAT16)  # the model would have 36 TB
    many = [(f"encoder/layer_{n}/ffn/linear_0/weight", np.zeros((1, 1), np.float16), FLOAT16) for n in range(300)]
    nan = ("encoder/conv1/bias", np.full(32, np.nan, np.float16), FLOAT16)
    heads = ("encoder/num_heads", np.zeros(3, np.float16), FLOAT16)
    scalar = ("encoder/layer_0/self_attention/linear_0/weight", np.zeros(1, np.float16), FLOAT16)
    for change in ([wide], many, [nan], [heads], [scalar]):
        names = {name for name, _, _ in change}
        written(source / "model.bin", [*(one for one in stored if one[0] not in names), *change])
        with pytest.raises(DataError) as error:
            import_whisper(source, tmp_path / "out")
        assert sentence(error.value) and not (tmp_path / "out").exists()
    written(source / "model.bin", stored[1:])
    with pytest.raises(DataError):
        import_whisper(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_settings_of_a_whisper_of_other_kinds_are_one_sentence(source, name, tmp_path):  # noqa: F811
    path = source / name
    good = json.loads(path.read_text())
    texts = [json.dumps(good | {key: value}) for key in good for value in (None, 1, "x", [None], [{}], [[]], {"a": 1})]
    texts += ["[" * 100_000, "[]", "1", "\udcff", '{"added_tokens": ' + "9" * 5000 + "}"]
    texts += [json.dumps({"added_tokens": [{"content": "<|endoftext|>", "id": -1}]})]
    changed = [lambda text=text: path.write_bytes(text.encode(errors="surrogateescape")) for text in texts]
    number = iter(range(len(texts)))
    assert only_sentences(lambda: import_whisper(source, tmp_path / f"out{next(number)}"), changed) > 5


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    from tests.compose import build_llama

    write_gguf(tmp_path / "model.gguf", build_llama(tmp_path / "llama"))
    return tmp_path / "model.gguf"


def test_lengths_in_a_gguf_file_are_compared_with_the_file_before_transformers_reads_it(gguf_file):
    whole = gguf_file.read_bytes()
    assert check_header(gguf_file) > 1000

    def number(value: int, size: int = 8) -> bytes:
        return value.to_bytes(size, "little")

    head = b"GGUF" + number(3, 4)
    setting = head + number(0) + number(1) + number(1) + b"a"
    for content in (
        head, head + number(2**60) + number(0), head + number(0) + number(2**60),
        setting + number(9, 4) + number(0, 4) + number(2**62), setting + number(9, 4) + number(9, 4) + number(1),
        setting + number(8, 4) + number(2**62), setting + number(99, 4), b"GGUF" + number(3, 4)[::-1] + bytes(99),
        head + number(1) + number(0) + number(1) + b"a" + number(2, 4) + number(2**40) * 2 + bytes(12),
        *(whole[:size] for size in range(0, len(whole) // 4, 1501)),
    ):  # fmt: skip
        gguf_file.write_bytes(content)
        started = time.monotonic()
        with pytest.raises(DataError) as error:
            import_gguf(gguf_file, gguf_file.with_name("out"))
        assert sentence(error.value) and time.monotonic() - started < 20


def test_a_damaged_gguf_file_is_one_sentence(gguf_file, tmp_path):
    whole, chance = gguf_file.read_bytes(), random.Random(0)

    def damage() -> None:
        content = bytearray(whole)
        for _ in range(3):
            content[chance.randrange(len(content) // 3)] ^= 1 << chance.randrange(8)
        gguf_file.write_bytes(content)

    number = iter(range(99))
    assert only_sentences(lambda: import_gguf(gguf_file, tmp_path / f"out{next(number)}"), [damage] * 10) > 0


def test_a_gguf_file_whose_settings_are_of_a_larger_model_takes_no_memory(gguf_file, tmp_path):
    key = b"llama.embedding_length"
    content = bytearray(gguf_file.read_bytes())
    place = content.index(key) + len(key) + 4
    content[place : place + 4] = (1 << 22).to_bytes(4, "little")
    gguf_file.write_bytes(content)
    with pytest.raises(DataError, match="its settings are of .* weights, and it holds|cannot read it"):
        import_gguf(gguf_file, tmp_path / "out")


def test_a_codec_of_other_settings_or_centres_is_one_sentence(tmp_path):
    good = Codec(SMALL, torch.zeros(SMALL.codes, SMALL.frames * SMALL.mels))
    good.save(tmp_path)
    assert load_codec(tmp_path).settings == SMALL
    path, settings = tmp_path / "codec.json", asdict(SMALL)
    texts = [json.dumps(settings | {key: value}) for key in settings for value in (None, 0, -1, "x", 1.5, 10**12, [])]
    for text in (*texts, "[" * 100_000, "[]", "", json.dumps(settings | {"more": 1}), '{"hop": ' + "9" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(DataError) as error:
            load_codec(tmp_path)
        assert sentence(error.value), text
    good.save(tmp_path)
    whole = (tmp_path / "codec.safetensors").read_bytes()
    for centres in (torch.full((4, 16), torch.nan), torch.zeros(4, 15), torch.zeros(4, 16).double(), torch.zeros(0)):
        save_file({"centres": centres}, tmp_path / "codec.safetensors")
        with pytest.raises(DataError, match="the centres are"):
            load_codec(tmp_path)
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 8 + whole):
        (tmp_path / "codec.safetensors").write_bytes(content)
        with pytest.raises(DataError) as error:
            load_codec(tmp_path)
        assert sentence(error.value)
