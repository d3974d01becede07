"""A checkpoint of realistic form through the commands: loaded in shards, trained, saved, resumed, exported.

A Qwen2-Audio with the real names, saved by transformers itself in several safetensors files.
"""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.launch import export, sft
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from tests.clips import waveform
from tests.conftest import TEXTS
from tests.ranks import as_torchrun

pytestmark = pytest.mark.slow

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """18 M parameters, 74 MB: large enough to tell a rank's share from the memory that any process needs."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    small, directory = (tmp_path_factory.mktemp(name) for name in ("small", "qwen2-audio"))
    build_mini(small, TEXTS, vocabulary=320, hidden=768, layers=3, tower_hidden=256, tower_layers=2)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small)
    model.save_pretrained(directory, max_shard_size="15MB")
    AutoProcessor.from_pretrained(small).save_pretrained(directory)
    assert len(list(directory.glob("model-*.safetensors"))) >= 4
    return directory


def fine_tune(words: list[str], said: Path) -> None:
    with said.open("a") as file, redirect_stdout(file):
        sft.main(words)


def test_from_a_sharded_checkpoint_to_an_export_over_one_two_and_four_ranks(checkpoint, questions, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    run = [
        f"{tmp_path}/config.yaml", f"model.path={checkpoint}", f"data.train={questions}",
        f"run.directory={tmp_path}/run", "run.threads=1", "optim.prompts_per_step=4", "checkpoint.every=1",
        "checkpoint.export=false", "optim.lr=1e-3", "run.allow_changed=[optim.steps, ranks]",
    ]  # fmt: skip
    sft.main([*run, "optim.steps=1"])
    total = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2**30
    for steps, ranks in ((2, 2), (3, 4)):
        said = tmp_path / f"said-{ranks}"
        as_torchrun(ranks, fine_tune, [*run, f"optim.steps={steps}", "run.resume=true"], said)
        peaks = re.search(r"host memory rose by ([\d., ]+) GiB while", said.read_text()).group(1).split(", ")
        assert len(peaks) == ranks
        # A rank's share, and what else it allocates for the first time while loading, some 20 MB: less than the whole.
        assert total / ranks + 0.03 < total
        assert all(0.9 * total / ranks < float(peak) < total / ranks + 0.03 for peak in peaks), (ranks, peaks)
    export.main([str(tmp_path / "run")])
    same_logits(tmp_path / "run" / "model-000003", checkpoint)
    export.main([str(tmp_path / "run"), "--dtype", "bfloat16", "--to", str(tmp_path / "half")])
    half, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "half", tmp_path / "run/model-000003"))
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def same_logits(exported: Path, original: Path) -> None:
    """transformers and the policy give equal logits for the exported model, which differs from the original."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    policy, processor = load_policy(exported), AutoProcessor.from_pretrained(exported)
    audio = waveform(0.7, 3)
    content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": TEXTS[0]}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[chat], audio=[audio], sampling_rate=16_000, return_tensors="pt")
    prompt = policy.prepare(TEXTS[0], audio)
    embeddings, lengths = policy.embed([prompt])
    positions = torch.arange(int(lengths[0]))[None]
    causal = torch.ones(len(positions[0]), len(positions[0]), dtype=torch.bool).tril()[None, None]
    own = policy.logits(policy.decode(embeddings, {"full_attention": causal}, positions))
    logits = [
        Qwen2AudioForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()(**inputs).logits
        for path in (exported, original)
    ]
    assert (own - logits[0]).abs().max() < ROUNDING
    assert (logits[1] - logits[0]).abs().max() > 100 * ROUNDING, "nothing was trained"


def test_an_export_of_what_is_not_there_says_what_is(tmp_path, checkpoint):
    from hark.grpo.config import ConfigError
    from hark.grpo.runtime.checkpoint import CheckpointError

    with pytest.raises(ConfigError, match="holds no config.yaml; expected the run.directory"):
        export.main([str(tmp_path)])
    (tmp_path / "config.yaml").write_text(f"model: {{path: {checkpoint}}}\n")
    with pytest.raises(CheckpointError, match="the run has no checkpoints; train with checkpoint.every above 0"):
        export.main([str(tmp_path)])
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "hark.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint after step 5; the run has 2"):
        export.main([str(tmp_path), "--step", "5"])
