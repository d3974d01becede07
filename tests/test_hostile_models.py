"""A model directory, or adapters, that somebody made to do harm: each fault is an error of one line."""

import ast
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hark.models.loading import MOST_LAYERS, load_policy, load_tokenizer, read_config
from hark.models.lora import CONFIG_FILE, WEIGHTS_FILE, read_lora
from hark.models.mini import whisper_encoder
from hark.models.policy import PolicyError
from hark.shown import shown

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(causal_lm_dir, tmp_path) -> Path:
    return Path(shutil.copytree(causal_lm_dir, tmp_path / "model"))


def set_keys(path: Path, **keys) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def change_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(model: Path, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as error:
        load_policy(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_code_beside_a_model_never_runs_and_nobody_is_asked(model, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    set_keys(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")
    set_keys(model / "config.json", auto_map=names)
    for load in (load_policy, load_tokenizer):
        try:
            load(model)
        except PolicyError:
            pass
    set_keys(model / "config.json", model_type="own")
    refused(model, "no policy for model type 'own'")
    assert not ran.exists()


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Each call `X.from_pretrained(...)` or `AutoX.from_config(...)` of the packages, with the text of X."""
    files = [file for name in ("data", "grpo", "launch", "models") for file in (ROOT / name).rglob("*.py")]
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    named = [(node.func, node) for node in calls if isinstance(node.func, ast.Attribute)]
    return [(ast.unparse(f.value), node) for f, node in named if f.attr in ("from_pretrained", "from_config")]


def test_every_call_of_transformers_says_that_code_of_a_model_is_not_run():
    calls = [(name, ast.unparse(call)) for name, call in loading_calls() if name.rpartition(".")[2].startswith("Auto")]
    assert len(calls) > 10
    assert [call for _, call in calls if "trust_remote_code=False" not in call] == []


def test_every_call_that_reads_weights_reads_safetensors_alone():
    other = re.compile(r"Tokenizer|Processor|Extractor|Config")
    calls = [
        ast.unparse(call)
        for name, call in loading_calls()
        if not other.search(name) and "from_config" not in ast.unparse(call)
    ]
    assert len(calls) > 5
    assert [call for call in calls if "use_safetensors=True" not in call and "gguf_file" not in call] == []


def test_a_pickle_beside_or_instead_of_weights_is_not_opened(model, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Harm()}, model / "pytorch_model.bin")
    load_policy(model)
    (model / "model.safetensors").unlink()
    refused(model, "pytorch_model.bin; expected model.safetensors")
    set_keys(model / "config.json", model_type="whisper")
    with pytest.raises(Exception, match="safetensors"):
        whisper_encoder(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("/etc/passwd", "expected safetensors files"),
        ("../secret.safetensors", "is not in the model directory"),
        ("{outside}/secret.safetensors", "is not in the model directory"),
        ("pytorch_model.bin", "expected safetensors files"),
        (17, "expected safetensors files"),
        ("a\0.safetensors", "expected safetensors files"),
        ("absent.safetensors", "missing or broken"),
    ],
)
def test_an_index_names_safetensors_files_of_the_directory_alone(model, tmp_path, file, message):
    shutil.copy(model / "model.safetensors", tmp_path / "secret.safetensors")
    names = load_file(model / "model.safetensors").keys()
    (model / "model.safetensors").unlink()
    file = file.format(outside=tmp_path) if isinstance(file, str) else file
    set_keys(model / "model.safetensors.index.json", weight_map=dict.fromkeys(names, file))
    refused(model, message)


@pytest.mark.parametrize(
    "text", ["[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_an_index_that_is_none_is_an_error_of_one_line(model, text):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    refused(model, "model.safetensors.index.json: ")


def test_weights_outside_the_directory_are_not_read_by_a_link(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(model, "model.safetensors: a link that leaves the model directory")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "processor_config.json",
            {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/etc"}},
            "audio_tokenizer names",
        ),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../../tokenizer.1.0.json"]}, "must name files of the dir"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation is 'someone/kernel', code on"),
        ("config.json", {"text_config": {"_attn_implementation": "a/b"}}, "code on the hub"),
        (
            "config.json",
            {"num_hidden_layers": 10**12},
            f"num_hidden_layers is 1000000000000; expected at most {MOST_LAYERS}",
        ),
        ("config.json", {"hidden_size": 10**15}, "its model cannot be built"),
        ("config.json", {"vocab_size": -1}, "its model cannot be built"),
        ("config.json", {"num_attention_heads": 0}, "do not fit config.json"),
        ("config.json", {"hidden_size": "x"}, "cannot be"),
    ],
)
def test_settings_that_name_others_or_make_no_sense_are_refused_quickly(model, name, keys, message):
    set_keys(model / name, **keys)
    refused(model, message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_file(model, value):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = value

    change_weights(model / "model.safetensors", change)
    refused(model, "model.safetensors: model.layers.1.mlp.down_proj.weight holds a value that is not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_whole_numbers_or_truth_values_are_refused(model, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    change_weights(model / "model.safetensors", change)
    refused(model, "model.norm.weight does not hold floating-point numbers in model.safetensors")


def test_weights_that_a_smaller_dtype_cannot_hold_are_refused(model):
    change_weights(model / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_policy(model)
    with pytest.raises(PolicyError, match="model.norm.weight holds a value that is not finite, as torch.float16"):
        load_policy(model, dtype=torch.float16, master_dtype=torch.float16)


@pytest.fixture
def adapters(tmp_path) -> Path:
    directory = tmp_path / "adapters"
    directory.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 64), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    save_file(tensors, directory / WEIGHTS_FILE)
    set_keys(directory / CONFIG_FILE, r=2, lora_alpha=4)
    return directory


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 0}, {"r": -1}, {"r": 10**9}, {"r": "2"}, {"r": True}, {"r": 2.5}, {"r": None},
        {"lora_alpha": math.nan}, {"lora_alpha": math.inf}, {"lora_alpha": "4"}, {"lora_alpha": []},
        {"lora_alpha": 10**400}, {"modules_to_save": ["x" * 100_000]},
    ],
)  # fmt: skip
def test_settings_of_adapters_that_make_no_sense_are_refused(adapters, keys):
    read_lora(adapters)
    set_keys(adapters / CONFIG_FILE, **keys)
    with pytest.raises(PolicyError) as error:
        read_lora(adapters)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_adapters_that_are_not_finite_are_named(causal_lm_dir, adapters, value):
    load_policy(causal_lm_dir, lora=read_lora(adapters))
    change_weights(adapters / WEIGHTS_FILE, lambda tensors: next(iter(tensors.values())).fill_(value))
    with pytest.raises(
        PolicyError, match=f"{WEIGHTS_FILE}: .*q_proj.lora_[AB].weight holds a value that is not finite"
    ):
        load_policy(causal_lm_dir, lora=read_lora(adapters))


def test_links_and_pipes_among_adapters_are_refused(adapters, tmp_path):
    (adapters / WEIGHTS_FILE).rename(tmp_path / "elsewhere")
    (adapters / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PolicyError, match="leaves the model directory"):
        read_lora(adapters)
    (adapters / WEIGHTS_FILE).unlink()
    os.mkfifo(adapters / WEIGHTS_FILE)
    with pytest.raises(PolicyError, match="a pipe"):
        read_lora(adapters)


def test_what_a_model_says_of_itself_cannot_steer_a_terminal(model):
    set_keys(model / "config.json", model_type="\x1b]0;gone\x07\u202e" + "x" * 5000)
    with pytest.raises(PolicyError) as error:
        read_config(model)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_a_shown_text_is_one_short_line_without_control_characters():
    assert shown("a\x1b[2Jb\r\n\u202ec", 100) == r"a\x1b[2Jb\r\n\u202ec"
    assert shown("a" * 10**6 + "b" * 10**6, 25) == "a" * 10 + " ... " + "b" * 10
    assert len(shown("\x1b" * 10**6, 100)) <= 100


@pytest.mark.parametrize("ids", [-1, [[2], 2], [2, "x"], [], 1.5, True])
def test_stop_tokens_that_are_none_of_the_model_are_refused(model, ids):
    set_keys(model / "generation_config.json", eos_token_id=ids)
    refused(model, "eos_token_id|cannot be built")


def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line_when_such_a_token_is_used(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    letter = next(token for token in ("z", "q") if token in vocabulary)
    vocabulary[letter] = 5000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    policy = load_policy(model)
    for use in (policy.prepare, policy.completion_ids):
        with pytest.raises(PolicyError, match="the tokenizer gives the token 5000, and the model has"):
            use(" ".join("Whatzq"))


@pytest.mark.parametrize(
    ("key", "value"), [("hop_length", 0.5), ("feature_size", 40), ("n_fft", -1), ("hop_length", 0), ("n_fft", "x")]
)
def test_a_processor_that_does_not_fit_the_tower_is_refused_before_it_hears_a_clip(
    qwen2_audio_dir, tmp_path, key, value
):
    model = Path(shutil.copytree(qwen2_audio_dir, tmp_path / "model"))
    settings = json.loads((model / "processor_config.json").read_text())
    settings["feature_extractor"][key] = value
    (model / "processor_config.json").write_text(json.dumps(settings))
    refused(model, "its processor|cannot be built")


def test_a_weight_whose_square_overflows_is_named_with_its_file(model):
    def enlarge(tensors):
        next(iter(tensors.values())).view(-1)[0] = -1e38

    change_weights(model / "model.safetensors", enlarge)
    refused(model, r"model.safetensors: .* holds the value 1.0e\+38")
