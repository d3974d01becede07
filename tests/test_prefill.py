"""rollout.keep_prefill and optim.micro_branches: the update is the same, and what is fed is what each says.

launch/common/contract.py compares the gradients with those of transformers' own models, for every family.
"""

from __future__ import annotations

import pytest
import torch

from hark.grpo import learner as learner_module
from hark.grpo import reference as reference_module
from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch.common.config_file import load_config
from hark.models.policy import Policy
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, gradients, largest_gap

KEEP = "rollout.keep_prefill=true"
SPLIT = "optim.micro_branches=3"  # of four: parts of three and of one
ADAPTERS = ["lora.rank=4", "lora.targets=[q_proj, o_proj, gate_proj]"]  # the first layer's keys have no gradient
CASES = {  # what is trained, and how prompts are computed apart
    "plain": ([], [KEEP], [SPLIT], [SPLIT, "model.recompute=true"], [KEEP, SPLIT, "optim.micro_batch=1"]),
    "two epochs": (["loss.inner_epochs=2", "optim.micro_batch=1"], [KEEP], [KEEP, SPLIT]),
    "frozen tower": (["model.train=no-tower", "optim.micro_batch=4"], [KEEP]),
    "skipped groups": (["loss.beta=0", "loss.advantage=none", "optim.micro_batch=1"], [KEEP], [SPLIT]),
    "adapters": ([*ADAPTERS, "optim.micro_batch=1"], [KEEP], [SPLIT]),
    "one token": (["rollout.max_new_tokens=1"], [KEEP]),
    "gathered layers": (["sharding.reshard=false"], [KEEP], [SPLIT]),
}


def compare(world: World, words: list[str]) -> None:
    for name, (options, *ways) in CASES.items():
        plain = gradients(world, [*words, *options])
        assert len(plain) == (2 if name == "two epochs" else 1)
        for more in ways:
            assert largest_gap(plain, gradients(world, [*words, *options, *more])) < ROUNDING, (name, more)


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

    def tokens(*options: str) -> tuple[int, int]:
        """Tokens that are fed beside those of decode steps, of which two epochs have as many as branches."""
        config = load_config(
            [*settings, *options, "loss.beta=0", "optim.micro_batch=4", "run.directory=" + str(tmp_path)]
        )
        found = []

        def run(world: World) -> None:
            trainer = build(world, config)
            fed.clear()
            trainer.step(0)
            found.extend([fed[0], sum(fed)])

        on_ranks(1, run)
        return tuple(found)

    prompt, plain = tokens("loss.inner_epochs=2")
    kept_prompt, kept = tokens("loss.inner_epochs=2", KEEP)
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


def test_what_excludes_them_is_said(settings, case):
    rollout = "rollout.refill=1", "rollout.batch=2", "model.recompute=true"
    both = "sharding.replicas=2"
    for setting, others in ((KEEP, [*rollout, both]), (SPLIT, [both])):
        for other in others:
            named = f"{setting.partition('=')[0]} and {other.partition('=')[0]}.* are both set"
            with pytest.raises(ConfigError, match=named):
                load_config([*settings, "run.directory=x", setting, other])
    with pytest.raises(ValueError, match="needs all 3 prompts at once; batch is 2"):
        sample(case.policy, case.prompts[:3], group_size=2, max_new_tokens=2, temperature=0, batch=2, keep_prefill=True)


def test_no_more_branches_are_fed_at_a_time_than_were_asked_for(settings, tmp_path, monkeypatch):
    """In the update and in the reference pass, whose logprobs are the same."""
    shapes: list[tuple[int, int]] = []

    def scored(policy, prompts, tokens, mask, *, group_size, **kwargs):
        shapes.append((len(prompts), group_size))
        return score(policy, prompts, tokens, mask, group_size=group_size, **kwargs)

    def logprobs(*more: str) -> list[torch.Tensor]:
        found = []

        def run(world: World) -> None:
            trainer = build(world, load_config([*settings, f"run.directory={tmp_path}/run", *more]))
            of_reference = trainer.reference_logprobs
            trainer.reference_logprobs = lambda rollout: found.append(of_reference(rollout)) or found[-1]
            trainer.step(0)

        shapes.clear()
        on_ranks(1, run)
        return found

    monkeypatch.setattr(learner_module, "score", scored)
    monkeypatch.setattr(reference_module, "score", scored)
    (whole,) = logprobs("optim.micro_batch=2")
    assert shapes == [(2, 4)] * 4
    (parts,) = logprobs("optim.micro_batch=2", SPLIT)
    assert shapes == [(2, 3), (2, 1)] * 4
    torch.testing.assert_close(parts, whole, atol=ROUNDING, rtol=0)
