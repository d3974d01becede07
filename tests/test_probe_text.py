"""Chat templates and tokenizers that somebody made to do harm: an error of one line, within seconds."""

import json
import shutil
import time
from pathlib import Path

import pytest

from hark.models import probe
from hark.models.loading import load_policy, load_tokenizer
from hark.models.policy import PolicyError


@pytest.fixture(params=["causal_lm_dir", "qwen2_audio_dir"])
def model(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(probe, "SECONDS", 1)
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model"))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template cannot be used .*unsafe"),
        ("{{ messages.append(1) }}", "chat template cannot be used"),
        ("{% include '/etc/passwd' %}", "chat template cannot be used"),
        ("{{ raise_exception('\x1b[2J' ~ 'x' * 9999) }}", "chat template cannot be used"),
        ("{% broken", "chat template cannot be used"),
        (ENDLESS, "does not end within 1 s"),
        ("{{ 'x' * 10 ** 11 }}", "takes more than 2 GB"),
    ],
)
def test_a_hostile_chat_template_is_an_error_of_one_line_within_seconds(model, template, message):
    for file in model.glob("chat_template*"):
        file.unlink()
    (model / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    with pytest.raises(PolicyError, match=message) as error:
        load_policy(model)
    assert time.monotonic() - start < 30 and str(error.value).isprintable() and len(str(error.value)) < 800


def test_a_pattern_of_a_tokenizer_that_backtracks_without_end_is_ended(model):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    start = time.monotonic()
    for load in (load_policy, load_tokenizer):
        with pytest.raises(PolicyError, match="does not end within 1 s|its tokenizer gave up"):
            load(model)
    assert time.monotonic() - start < 30


def test_trying_a_template_and_a_tokenizer_takes_a_fraction_of_a_second(tmp_path, qwen2_audio_dir):
    tokenizer = load_tokenizer(qwen2_audio_dir)
    start = time.monotonic()
    probe.check_text(tmp_path, lambda text: tokenizer.decode(tokenizer(text)["input_ids"]))
    assert time.monotonic() - start < 1
