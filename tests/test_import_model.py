"""`hark import-model`: a Whisper of CTranslate2 and a GGUF file become Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hark.data.errors import DataError
from hark.launch import import_model
from hark.models import gguf as gguf_files
from hark.models.ctranslate2 import import_whisper, read_tensors
from tests.compose import build_llama, build_whisper

FLOAT16, INT8, INT16 = 4, 1, 2
SPECIAL = {"<|endoftext|>": 50, "<|startoftranscript|>": 51, "<|notimestamps|>": 59}


# A Whisper of CTranslate2 ---------------------------------------------------------------------------------------------


def written(path: Path, tensors: list[tuple[str, np.ndarray, int]], *, name: str = "WhisperSpec") -> None:
    """Write a model.bin."""

    def text(value: str) -> bytes:
        return (len(value) + 1).to_bytes(2, "little") + value.encode() + b"\0"

    parts = [(6).to_bytes(4, "little"), text(name), (3).to_bytes(4, "little"), len(tensors).to_bytes(4, "little")]
    for tensor_name, values, dtype in tensors:
        shape = b"".join(size.to_bytes(4, "little") for size in values.shape)
        content = values.tobytes()
        parts += [text(tensor_name), bytes([values.ndim]), shape, bytes([dtype]), len(content).to_bytes(4, "little")]
        parts.append(content)
    alias = [(1).to_bytes(4, "little"), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    path.write_bytes(b"".join([*parts, *alias]))


def tensors_of(model) -> list[tuple[str, np.ndarray, int]]:
    """The tensors of a Whisper of transformers as CTranslate2 stores them, in float16."""
    weights = {name: tensor.half().numpy() for name, tensor in model.model.state_dict().items()}
    found = {f"{part}/num_heads": np.array(2, np.int16) for part in ("encoder", "decoder")}

    def norm(here: str, there: str) -> None:
        found[f"{there}/gamma"], found[f"{there}/beta"] = weights[f"{here}.weight"], weights[f"{here}.bias"]

    def linear(there: str, *here: str) -> None:
        for kind in ("weight", "bias"):  # keys have no bias
            zeros = np.zeros(32, np.float16)
            found[f"{there}/{kind}"] = np.concatenate([weights.get(f"{name}.{kind}", zeros) for name in here])

    for part in ("encoder", "decoder"):
        for n in range(2):
            here, there = f"{part}.layers.{n}", f"{part}/layer_{n}"
            own = f"{here}.self_attn"
            linear(f"{there}/self_attention/linear_0", *(f"{own}.{kind}_proj" for kind in "qkv"))
            linear(f"{there}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{own}_layer_norm", f"{there}/self_attention/layer_norm")
            linear(f"{there}/ffn/linear_0", f"{here}.fc1")
            linear(f"{there}/ffn/linear_1", f"{here}.fc2")
            norm(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
            if part == "decoder":
                other = f"{here}.encoder_attn"
                linear(f"{there}/attention/linear_0", f"{other}.q_proj")
                linear(f"{there}/attention/linear_1", f"{other}.k_proj", f"{other}.v_proj")
                linear(f"{there}/attention/linear_2", f"{other}.out_proj")
                norm(f"{other}_layer_norm", f"{there}/attention/layer_norm")
        norm(f"{part}.layer_norm", f"{part}/layer_norm")
        found[f"{part}/position_encodings/encodings"] = weights[f"{part}.embed_positions.weight"]
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        found[f"encoder/{name.replace('.', '/')}"] = weights[f"encoder.{name}"]
    found["decoder/embeddings/weight"] = weights["decoder.embed_tokens.weight"]
    return [(name, values, INT16 if values.ndim == 0 else FLOAT16) for name, values in found.items()]


@pytest.fixture
def whisper(tmp_path):
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(build_whisper(tmp_path / "whisper")).eval()


@pytest.fixture
def source(whisper, tmp_path) -> Path:
    directory = tmp_path / "ctranslate2"
    directory.mkdir()
    written(directory / "model.bin", tensors_of(whisper))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [3, 50], "alignment_heads": [[1, 0]], "lang_ids": []}
    (directory / "config.json").write_text(json.dumps(settings))
    added = [{"id": index, "content": token, "special": True} for token, index in SPECIAL.items()]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return directory


def test_a_whisper_is_the_same_but_for_the_rounding_to_float16(whisper, source, tmp_path, capsys):
    from transformers import WhisperForConditionalGeneration

    import_model.main([str(source), "--out", str(tmp_path / "out")])
    assert f"wrote {tmp_path}/out: {whisper.num_parameters() / 1e6:.1f} M parameters" in capsys.readouterr().out
    found, loading = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    expected = whisper.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
    settings = found.generation_config
    assert settings.suppress_tokens == [1, 2] and settings.begin_suppress_tokens == [3, 50]
    assert settings.no_timestamps_token_id == 59 and not settings.is_multilingual
    assert found.config.decoder_start_token_id == 51 and found.config.eos_token_id == 50
    mel, ids = torch.randn(1, 80, 1000), torch.tensor([[51, 7, 8]])
    whisper.half().float()
    with torch.no_grad():
        logits = [model(input_features=mel, decoder_input_ids=ids).logits for model in (found.eval(), whisper)]
    torch.testing.assert_close(*logits)


def test_a_directory_that_is_no_whisper_or_cannot_be_used_is_refused_with_the_reason(source, tmp_path):
    path = source / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read at .*; is the file complete"):
        read_tensors(path)
    written(path, [], name="TransformerSpec")
    with pytest.raises(DataError, match="expected a Whisper of CTranslate2, format 6; this is 'TransformerSpec'"):
        read_tensors(path)
    written(path, [("encoder/conv1/weight", np.zeros((32, 80, 3), np.int8), INT8)])
    with pytest.raises(DataError, match=r"encoder/conv1/weight is quantised \(torch.int8\)"):
        import_whisper(source, tmp_path / "out")
    (source / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer.json"):
        import_whisper(source, tmp_path / "out")


def test_tensors_that_a_whisper_has_not_are_refused(whisper, source, tmp_path):
    written(source / "model.bin", [*tensors_of(whisper), ("encoder/extra", np.zeros(2, np.float16), FLOAT16)])
    with pytest.raises(DataError, match="unknown .*extra"):
        import_whisper(source, tmp_path / "out")


# A language model of llama.cpp ----------------------------------------------------------------------------------------


def write_gguf(path: Path, llama: Path) -> None:
    """A Llama of transformers as a GGUF file, its feed-forward weights quantised to 8 bits."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    config, state = model.config, model.model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokenizer))
    model_part = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model_part["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in state.items():
        values, stored = tensor.numpy(), names.get_name(f"model.{name}", try_suffixes=(".weight",))
        for kind, heads in (("q_proj", 4), ("k_proj", 2)):
            if kind in name:  # llama.cpp keeps the two halves of each head in turns
                values = values.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(values.shape)
        quantised = gguf.GGMLQuantizationType.Q8_0 if "mlp" in name else None
        content = values if quantised is None else gguf.quantize(values, quantised)
        writer.add_tensor(stored, np.ascontiguousarray(content), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_language_model_its_tokenizer_and_its_chat_template(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = build_llama(tmp_path / "llama")
    write_gguf(tmp_path / "small.gguf", llama)
    import_model.main([str(tmp_path / "small.gguf"), "--out", str(tmp_path / "out")])
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "llama"))
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        tolerance = 0.02 * theirs[name].abs().max() if "mlp" in name else 0.0
        torch.testing.assert_close(tensor, theirs[name], atol=float(tolerance), rtol=0, msg=name)
    assert found.config.tie_word_embeddings and found.generation_config.eos_token_id == 0
    new, old = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "llama"))
    assert new.chat_template == old.chat_template and new.eos_token == old.eos_token
    text = "Rising or falling, which comes 2nd?<end>"
    assert new(text)["input_ids"] == old(text)["input_ids"]


def test_without_the_packages_for_gguf_the_error_says_which(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))  # no tensors, no settings
    import transformers

    def fail(*_args, **_kwargs):
        raise ImportError("Please install torch and gguf>=0.10.0")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(DataError, match="pip install gguf accelerate"):
        gguf_files.import_gguf(path, tmp_path / "out")


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "model.txt").write_text("no model")
    for source in (tmp_path, tmp_path / "model.txt", tmp_path / "nothing"):
        with pytest.raises(DataError, match="expected a GGUF file, or the directory of a CTranslate2 model"):
            import_model.main([str(source), "--out", str(tmp_path / "out")])
