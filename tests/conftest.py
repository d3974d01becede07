"""Small random policies of both families, saved by transformers, and the same models in Hugging Face to compare."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# The tests run on the CPU even if the machine has a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.grpo.instruments import flops
from hark.models.families import TOO_RECENT
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from hark.models.policy import Policy, Prompt
from tests.causal_types import ACCEPTED
from tests.clips import waveform, write_questions

torch.set_num_threads(1)
flops.SIZES = (256,)  # the rate that a training run measures at its start need not be exact here

TEXTS = (
    "Which comes second? Please choose the answer from the following options: ['a bell', 'rain'].",
    "How many times does the dog bark?",
    "Rising or falling? Output the final answer in <answer> </answer>.",
)
NO_PARAMETERS = SimpleNamespace(params={})  # of a test that is not parametrised
SECONDS = (1.03, 0.4, 0.77)  # odd and even numbers of mel frames


def pytest_collection_modifyitems(items):
    """On Python 3.10 leave out the tests of model types that its transformers has not."""
    from transformers import CONFIG_MAPPING

    missing = {*TOO_RECENT, *(set(ACCEPTED) - set(CONFIG_MAPPING))} if sys.version_info < (3, 11) else set()
    for item in items:
        if missing & {str(value) for value in getattr(item, "callspec", NO_PARAMETERS).params.values()}:
            item.add_marker(pytest.mark.skip(reason="needs transformers 5.23, which needs Python 3.11"))


@dataclass(frozen=True)
class Case:
    """A policy, prompts for it, and the same model and inputs in Hugging Face."""

    name: str
    directory: Path
    policy: Policy
    prompts: tuple[Prompt, ...]
    waveforms: tuple[np.ndarray | None, ...]

    def load_hf(self):
        from transformers import AutoModelForCausalLM, Qwen2AudioForConditionalGeneration

        kind = Qwen2AudioForConditionalGeneration if self.name == "qwen2_audio" else AutoModelForCausalLM
        return kind.from_pretrained(self.directory, dtype=torch.float32).eval()

    def hf_inputs(self, n: int) -> dict[str, torch.Tensor]:
        """Prompt n as Hugging Face's own processor gives it: audio padded to 30 s of mel frames."""
        if self.name != "qwen2_audio":
            return {"input_ids": self.prompts[n].ids[None], "attention_mask": torch.ones(1, len(self.prompts[n].ids))}
        processor = self.policy.processor
        content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": TEXTS[n]}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(processor(text=[chat], audio=[self.waveforms[n]], sampling_rate=16_000, return_tensors="pt"))


def build_causal_lm(directory: Path, **overrides) -> None:
    """A small Llama-like checkpoint with the tokenizer of the small Qwen2-Audio."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    build_mini(directory / "tokenizer", TEXTS, vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, sliding_window=None, initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**(sizes | overrides))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _stop_often(directory: Path) -> None:
    """Make a fifth of all ids stop tokens; otherwise a random model would hardly ever stop."""
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], *range(100, 160)]}))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """The memory of clips is a file of this session, also for the processes that it starts."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def qwen2_audio_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2_audio")
    build_mini(directory, TEXTS, vocabulary=320, hidden=64, layers=2, tower_hidden=64, tower_layers=2)
    _stop_often(directory)
    return directory


@pytest.fixture(scope="session")
def causal_lm_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("causal_lm")
    build_causal_lm(directory)
    _stop_often(directory)
    return directory


@pytest.fixture(params=["qwen2_audio", "causal_lm"])
def case(request) -> Case:
    directory = request.getfixturevalue(f"{request.param}_dir")
    policy = load_policy(directory)
    has_audio = request.param == "qwen2_audio"
    waveforms = tuple(waveform(s, n) if has_audio else None for n, s in enumerate(SECONDS))
    prompts = tuple(policy.prepare(text, *([] if w is None else [w])) for text, w in zip(TEXTS, waveforms, strict=True))
    return Case(request.param, directory, policy, prompts, waveforms)


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), 12)


@pytest.fixture
def settings(tmp_path, qwen2_audio_dir, questions) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    return [
        str(path),
        f"model.path={qwen2_audio_dir}",
        f"data.train={questions}",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "optim.prompts_per_step=4",
        "optim.micro_batch=2",
        "optim.lr=1e-3",
        "optim.schedule=constant",
        "optim.steps=3",
    ]
