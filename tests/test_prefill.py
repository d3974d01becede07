"""rollout.keep_prefill: the update is the same, and prompts are computed once for the rollout and the first update.

launch/common/contract.py compares its gradients with those of transformers' own models, for every family.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from hark.grpo import learner as learner_module
from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch.common.config_file import load_config
from hark.models.policy import Policy
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build

KEEP = "rollout.keep_prefill=true"
ADAPTERS = ["lora.rank=4", "lora.targets=[q_proj, o_proj, gate_proj]"]  # the first layer's keys have no gradient
OPTIONS = {
    "plain": [],
    "two epochs": ["loss.inner_epochs=2", "optim.micro_batch=1"],
    "frozen tower": ["model.train=no-tower", "optim.micro_batch=4"],
    "skipped groups": ["loss.beta=0", "loss.advantage=none", "optim.micro_batch=1"],
    "adapters": [*ADAPTERS, "optim.micro_batch=1"],
    "one token": ["rollout.max_new_tokens=1"],
    "gathered layers": ["sharding.reshard=false"],
}


def gradients(world: World, words: list[str]) -> list[dict[str, torch.Tensor]]:
    """The gradients of each update of a step whose updates change nothing."""
    trainer, found = build(world, load_config(words)), []

    def keep() -> None:
        every = {name: parameter.grad for name, parameter in trainer.policy.named_parameters()}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in every.items() if g is not None}
        found.append({name: gradient.clone() for name, gradient in whole.items()})

    trainer.optimizer.step = keep
    trainer.step(0)
    return found


def compare(world: World, words: list[str]) -> None:
    for name, options in OPTIONS.items():
        plain, kept = (gradients(world, [*words, *options, *more]) for more in ([], [KEEP]))
        assert len(plain) == len(kept) == (2 if name == "two epochs" else 1)
        for one, other in zip(plain, kept, strict=True):
            assert one.keys() == other.keys(), name
            largest = max(float(gradient.abs().max()) for gradient in one.values())
            differences = {key: float((one[key] - other[key]).abs().max()) / largest for key in one}
            assert largest > 1e-3 and max(differences.values()) < ROUNDING, (name, differences)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradients_are_the_same(ranks, settings, tmp_path):
    """Relative to the largest, to the rounding of float32 when the same numbers are added in another order."""
    on_ranks(ranks, compare, [*settings, f"run.directory={tmp_path}/run"])


def test_prompts_are_fed_once_for_the_rollout_and_the_first_update(settings, tmp_path, monkeypatch):
    fed: list[int] = []
    decode = Policy.decode

    def counted(policy: Policy, embeddings: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        fed.append(embeddings.shape[1] if embeddings.shape[1] > 1 else 0)  # 1: a decode step
        return decode(policy, embeddings, *args, **kwargs)

    monkeypatch.setattr(Policy, "decode", counted)

    def tokens(*options: str) -> tuple[int, int, int]:
        """Tokens that are fed beside those of decode steps, of which two epochs have as many as branches."""
        config = load_config(
            [*settings, *options, "loss.beta=0", "optim.micro_batch=4", "run.directory=" + str(tmp_path)]
        )
        found = []

        def run(world: World) -> None:
            trainer = build(world, config)
            fed.clear()
            trainer.step(0)
            found.extend([fed[0], sum(fed), trainer.micro_batch.size])

        on_ranks(1, run)
        return tuple(found)

    prompt, plain, _ = tokens("loss.inner_epochs=2")
    kept_prompt, kept, _ = tokens("loss.inner_epochs=2", KEEP)
    assert prompt == kept_prompt > 100 and plain - kept == prompt, "the second epoch computes the prompts anew"


def test_an_update_that_runs_out_of_memory_is_done_without_what_was_kept(settings, tmp_path, monkeypatch):
    """The part of the gradients that reached the prompts is of no use then, and its memory is free."""
    prefixes = []

    def scored(*args, prefix=None, **kwargs):
        prefixes.append(prefix)
        if len(prefixes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(*args, prefix=prefix, **kwargs)

    words = [*settings, "optim.micro_batch=2", f"run.directory={tmp_path}/run"]

    def run(world: World) -> None:
        (expected,) = gradients(world, words)
        monkeypatch.setattr(learner_module, "score", scored)
        (found,) = gradients(world, [*words, KEEP])
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=ROUNDING, rtol=ROUNDING)

    on_ranks(1, run)
    assert [prefix is not None for prefix in prefixes] == [True, True, False, False, False, False]


def test_what_excludes_it_is_said(settings, case):
    for other in (
        "rollout.refill=1", "rollout.batch=2", "model.recompute=true", "model.attention=flex", "sharding.replicas=2"
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"rollout.keep_prefill and {other.partition('=')[0]}.* are both set"):
            load_config([*settings, "run.directory=x", KEEP, other])
    with pytest.raises(ValueError, match="needs all 3 prompts at once; batch is 2"):
        sample(case.policy, case.prompts[:3], group_size=2, max_new_tokens=2, temperature=0, batch=2, keep_prefill=True)
