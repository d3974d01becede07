"""A step of GRPO by Hark and by the R1-AQA procedure, in phases that can be timed, and helpers of all studies.

The other files of launch/studies measure these steps. Of them, this file imports only baseline.py.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hark.grpo.loss import policy_loss, token_weights
from hark.grpo.optimizer import build_optimizer, clip_gradients
from hark.grpo.recorded import RecordedSteps
from hark.grpo.runtime.sharding import gathered, release
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import PolicyBatch, Rollout
from hark.launch.studies.baseline import Baseline, grpo_loss
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from hark.models.policy import Policy

SECONDS = {"A": 10.0, "B": 30.0}  # shape -> length of its clips
CLIP, BETA = 0.2, 0.04
QUESTION = "How often does the bell ring? Choose: ['once', 'twice']."


@dataclass(frozen=True)
class Size:
    """Sizes of the model, in the proportions of Qwen2-Audio-7B; attention heads have 64 channels."""

    vocabulary: int = 8192
    hidden: int = 512
    inner: int = 1408
    layers: int = 8
    tower_hidden: int = 384
    tower_layers: int = 4


@dataclass(frozen=True)
class Work:
    """Sizes of a step: the length of the clips, the numbers of prompts, completions and tokens, and the micro-batch."""

    seconds: float
    prompts: int
    group_size: int
    new_tokens: int
    micro_batch: int = 1

    def waveforms(self) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        samples = round(16_000 * self.seconds)
        return [0.1 * random.standard_normal(samples, dtype=np.float32) for _ in range(self.prompts)]

    def advantages(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.randn(self.prompts * self.group_size, generator=torch.Generator().manual_seed(0)).to(device)

    def micro_batches(self) -> Iterator[tuple[slice, slice]]:
        """The prompts and the completions of each micro-batch."""
        for first in range(0, self.prompts, self.micro_batch):
            last = first + self.micro_batch
            yield slice(first, last), slice(first * self.group_size, last * self.group_size)


BASE = Work(seconds=10.0, prompts=1, group_size=8, new_tokens=24)  # the step that launch/studies/scaling.py varies


class HarkSide:
    """A step of Hark, phase by phase. With `shard`, on several ranks, each rank has the given work."""

    recorded: RecordedSteps | None = None  # its decode steps as CUDA graphs

    def __init__(self, directory: Path, work: Work, *, shard: Callable[[Policy], None] | None = None):
        self.work = work
        self.policy, self.frozen = (load_policy(directory, train=part, shard=shard) for part in ("all", "nothing"))
        # The audio placeholder is never sampled. As the only stop token, it makes every completion run to the limit.
        self.policy.model.generation_config.eos_token_id = self.policy.audio_id
        self.prompts = tuple(self.policy.prepare(QUESTION, waveform) for waveform in work.waveforms())
        # With learning rate 0 an update takes the same time, and the weights are the same in all turns.
        self.optimizer = build_optimizer(self.policy, weight_decay=0.0, betas=(0.9, 0.999))
        self.model, self.reference_model = self.policy.model, self.frozen.model

    def rollout(self) -> Rollout:
        keys = [(0, 0, n) for n in range(self.work.prompts)]
        sizes: dict[str, Any] = dict(group_size=self.work.group_size, max_new_tokens=self.work.new_tokens)
        with gathered(self.policy):
            return sample(self.policy, self.prompts, temperature=1.0, keys=keys, recorded=self.recorded, **sizes)

    @torch.no_grad()
    def reference(self, drawn: Rollout) -> torch.Tensor:
        parts = [
            score(self.frozen, self.prompts[n], drawn.tokens[b], drawn.mask[b], group_size=self.work.group_size)[0]
            for n, b in self.work.micro_batches()
        ]
        release(self.frozen)
        return torch.cat(parts)

    def score(self, drawn: Rollout, ref_logprobs: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the logprobs (B, T)."""
        weights = token_weights(drawn.mask, kind="sequence-mean", completions=len(drawn.mask), tokens=0)
        batch = PolicyBatch(
            self.prompts, self.work.group_size, drawn.tokens, drawn.mask, weights, drawn.logprobs, ref_logprobs,
            self.work.advantages(drawn.mask.device),
        )  # fmt: skip
        logprobs = torch.zeros_like(drawn.logprobs)
        for groups in batch.split_by_length(self.work.micro_batch):
            logprobs[batch.rows(groups)] = self._accumulate(batch.select(groups))
        return logprobs

    def optimizer_step(self) -> None:
        clip_gradients(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _accumulate(self, micro: PolicyBatch) -> torch.Tensor:
        size = micro.group_size
        logprobs, _ = score(self.policy, micro.prompts, micro.tokens, micro.mask, group_size=size)
        ours = micro.old_logprobs, micro.ref_logprobs, micro.advantages, micro.weights
        policy_loss(logprobs, *ours, clip_low=CLIP, clip_high=CLIP, beta=BETA)[0].backward()
        return logprobs.detach()


class BaselineSide:
    """The same step by the procedure of R1-AQA."""

    def __init__(self, directory: Path, work: Work):
        self.work = work
        self.policy, self.frozen = Baseline.load(directory), Baseline.load(directory)
        self.frozen.model.requires_grad_(False)
        self.inputs = self.policy.inputs([QUESTION] * work.prompts, work.waveforms())
        self.model, self.reference_model = self.policy.model, self.frozen.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def rollout(self) -> torch.Tensor:
        size, limit = self.work.group_size, self.work.new_tokens
        return self.policy.rollout(self.inputs, group_size=size, new_tokens=limit)

    @torch.no_grad()
    def reference(self, drawn: Rollout) -> torch.Tensor:
        return torch.cat([self._logprobs(self.frozen, drawn, *part) for part in self.work.micro_batches()])

    def score(self, drawn: Rollout, ref_logprobs: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the logprobs (B, T)."""
        advantages, parts = self.work.advantages(drawn.mask.device), []
        for n, b in self.work.micro_batches():
            logprobs = self._logprobs(self.policy, drawn, n, b)
            loss = grpo_loss(
                logprobs, logprobs.detach(), ref_logprobs[b], advantages[b], drawn.mask[b], clip=CLIP, beta=BETA
            )
            (loss * len(logprobs) / len(drawn.mask)).backward()
            parts.append(logprobs.detach())
        return torch.cat(parts)

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logprobs(self, baseline: Baseline, drawn: Rollout, n: slice, b: slice) -> torch.Tensor:
        inputs = {name: tensor[n] for name, tensor in self.inputs.items()}
        return baseline.logprobs(inputs, drawn.tokens[b], group_size=self.work.group_size)


def build_model(directory: Path, size: Size) -> None:
    """Write a Qwen2-Audio of the given size with random weights, with the tokenizer and processor of the demo's model.

    The tokenizer has fewer tokens than the model. That is possible because completions are not turned into text.
    """
    from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

    # The vocabulary is so small that the question has about 60 tokens, as real questions have.
    build_mini(directory, [QUESTION], vocabulary=275, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    audio_id = AutoConfig.from_pretrained(directory, trust_remote_code=False).audio_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2AudioForConditionalGeneration(model_config(size, audio_id)).save_pretrained(directory)


def model_config(size: Size, audio_id: int) -> Any:
    """The transformers config of a Qwen2-Audio of the given size."""
    from transformers import Qwen2AudioConfig

    text = dict(
        model_type="qwen2", vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=4096, initializer_range=size.hidden**-0.5 / 2,
    )  # fmt: skip
    audio = dict(
        model_type="qwen2_audio_encoder", num_mel_bins=80, d_model=size.tower_hidden, encoder_layers=size.tower_layers,
        encoder_attention_heads=size.tower_hidden // 64, encoder_ffn_dim=4 * size.tower_hidden,
        initializer_range=size.tower_hidden**-0.5 / 2,
    )  # fmt: skip
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_id)


# Timing ---------------------------------------------------------------------------------------------------------------


def timed(device: torch.device, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds of a call, until the device has finished its work, and the result."""
    wait(device)
    start = time.perf_counter()
    result = function(*args)
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_passes(side: Any, drawn: Rollout) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of each phase up to the gradients, and the policy's logprobs."""
    device = drawn.tokens.device
    rollout, _ = timed(device, side.rollout)
    reference, ref_logprobs = timed(device, side.reference, drawn)
    scoring, logprobs = timed(device, side.score, drawn, ref_logprobs)
    return {"rollout": rollout, "reference": reference, "score": scoring}, logprobs


def with_update(side: Any, seconds: dict[str, float]) -> dict[str, float]:
    """The seconds of a whole step: those of its passes, and of an optimizer step with their gradients."""
    seconds = seconds | {"optimizer": timed(torch.device("cpu"), side.optimizer_step)[0]}
    return seconds | {"step": sum(seconds.values())}


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


# The machine ----------------------------------------------------------------------------------------------------------


def silence() -> None:
    """Switch off the messages and progress bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def machine() -> dict[str, Any]:
    import transformers

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's name from Linux's /proc/cpuinfo, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
