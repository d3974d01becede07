"""Decode steps that are recorded once draw in every later rollout what plain steps draw; on a simulated GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hark.grpo.recorded import FixedWeights, RecordedSteps, recorded_steps
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.cuda import CudaGraphs, round_up
from hark.grpo.runtime.sharding import device_mesh, gathered, shard
from hark.models.loading import load_policy
from hark.models.policy import Lora
from tests.conftest import Case
from tests.ranks import on_ranks
from tests.test_sampler import draw, groups

LONG = dict(max_new_tokens=24, batch=2)


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: keeps operations with the tensors they read and wrote, to do them again."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.namespace != "profiler":  # FSDP's labels
            self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """The recordings that a test makes, on a CPU that is taken for a GPU where decode steps are concerned."""
    made, cuda = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("hark.grpo.runtime.cuda.WARM_UP_CALLS", 1)
    monkeypatch.setattr("hark.grpo.recorded.recorder", lambda device: CudaGraphs())
    monkeypatch.setattr(
        "hark.grpo.branches.round_up", lambda count, most, _, **least: round_up(count, most, cuda, **least)
    )
    return made


def sharded(case: Case, world: World, **settings) -> Case:
    """The case with a policy that FSDP shards; one process alone is sharded in half precision only."""
    dtype = torch.bfloat16
    split = partial(shard, mesh=device_mesh(world), dtype=dtype)
    return replace(case, policy=load_policy(case.directory, dtype=dtype, shard=split, **settings))


def same(rollout, expected) -> None:
    assert groups(rollout) == groups(expected)
    torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)  # as in test_parity.py


@pytest.mark.parametrize(
    "room, settings",
    [
        pytest.param(64, LONG, id="with room"),
        pytest.param(40, dict(max_new_tokens=70, batch=1, stop=False), id="growing", marks=pytest.mark.slow),
    ],
)
def test_a_step_recorded_once_and_repeated_draws_the_same(case, monkeypatch, tapes, room, settings):
    """Nothing that changes from step to step but by way of the plan may be in a recording, also of a sharded policy.

    room: tokens of a branch for which the cache has room at first; where it grows, its tensors move, and the first
    steps of the next prompt must not be those that were recorded before.
    """
    monkeypatch.setattr("hark.models.cache.STEPS", room)

    def check(world: World) -> None:
        for own in (case, sharded(case, world)):
            tapes.clear()
            with gathered(own.policy):
                rollout = draw(own, recorded=recorded_steps(own.policy, wanted=True), **settings)
                assert sum(tape.replays for tape in tapes) > 2 * len(tapes) > 2, "some are repeated"
                same(rollout, draw(own, **settings))

    on_ranks(1, check)


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, ("q_proj", "up_proj"))], ids=["all weights", "adapters"])
def test_recordings_hold_in_later_rollouts_with_other_weights_and_prompts(case, tapes, lora):
    """Between rollouts the weights are freed, updated, and gathered elsewhere."""

    def check(world: World) -> None:
        own = sharded(case, world, lora=lora)
        recorded = recorded_steps(own.policy, wanted=True)
        generator = torch.Generator().manual_seed(0)
        drawn = []
        for number, which in enumerate(((2, 1), (2, 1), (1, 2), (0, 1), (2, 0), (0, 2))):
            keys = [(0, number, n) for n in range(3)]
            with gathered(own.policy):
                rollout = draw(own, which, keys, recorded=recorded, **LONG)
                same(rollout, draw(own, which, keys, **LONG))
            drawn.append((rollout, rollout.tokens.clone()))
            for weight in own.policy.parameters():
                if weight.requires_grad:
                    local = weight.to_local() if isinstance(weight, DTensor) else weight
                    local.data += 0.02 * torch.randn(local.shape, generator=generator)
        assert len({rollout.logprobs[:, 0].sum().item() for rollout, _ in drawn}) == len(drawn), "weights have changed"
        assert all(torch.equal(rollout.tokens, tokens) for rollout, tokens in drawn), "a rollout is not overwritten"
        counts = []
        for _ in range(4):  # plain, recorded, and twice repeated
            with gathered(own.policy):
                draw(own, (0, 2), recorded=recorded, **LONG)
            counts.append((len(tapes), sum(tape.replays for tape in tapes)))
        (recordings, before), (again, after) = counts[-2:]
        assert again == recordings and after > before, "nothing is recorded anew"

    on_ranks(1, check)


def test_steps_with_other_settings_have_recordings_of_their_own(case, tapes):
    recorded = recorded_steps(case.policy, wanted=True)
    for settings in (LONG, LONG | dict(group_size=2), LONG | dict(temperature=0.5), LONG | dict(temperature=0), LONG):
        same(draw(case, recorded=recorded, **settings), draw(case, **settings))
        same(draw(case, recorded=recorded, stop=False, **settings), draw(case, stop=False, **settings))


def test_a_cache_that_moves_for_more_prompts_is_recorded_anew(case, tapes):
    """A step of one prompt has the same sizes in all of these rollouts, and reads another cache from the third on."""
    recorded = recorded_steps(case.policy, wanted=True)
    for batch, which in ((1, (0, 1)), (1, (0, 2)), (2, (0, 1)), (1, (0, 2)), (1, (0, 1))):
        settings = LONG | dict(batch=batch)
        same(draw(case, which, recorded=recorded, **settings), draw(case, which, **settings))


def test_a_cache_that_has_grown_is_freed_after_the_rollout(case, monkeypatch, tapes):
    recorded = recorded_steps(case.policy, wanted=True)
    for room, freed in ((4, True), (64, False)):
        monkeypatch.setattr("hark.models.cache.STEPS", room)
        for which in ((0, 1), (0, 2)):
            rollouts = (draw(case, which, recorded=how, stop=False, **LONG) for how in (recorded, None))
            same(*rollouts)
            assert (recorded._cache is None) == freed


def test_only_weights_that_are_gathered_and_decode_are_copied(case):
    """With one shard FSDP ignores frozen weights, and they stay where they are."""

    def copied(policy) -> set[str]:
        fixed = FixedWeights(policy)
        with gathered(policy):
            fixed.copy()
        names = {module: name for name, module in policy.model.named_modules()}
        return {f"{names[module]}.{name}" for places in fixed._places for module, name in places}

    def check(world: World) -> None:
        names = {name for name, _ in case.policy.model.named_parameters()}
        encoding = {name for name in names if "audio_tower" in name or "projector" in name}
        assert copied(sharded(case, world).policy) >= names - encoding
        assert not copied(sharded(case, world).policy) & encoding
        adapters = copied(sharded(case, world, lora=Lora(4, 8.0, ("q_proj",))).policy)
        assert adapters and all(".lora_" in name for name in adapters)
        assert not copied(case.policy)

    on_ranks(1, check)


def test_frequencies_that_follow_the_longest_position_are_not_recorded(case, tapes):
    assert recorded_steps(case.policy, wanted=True) is not None
    assert recorded_steps(case.policy, wanted=False) is None
    case.policy.decoder.rotary_emb.rope_type = "dynamic"
    assert recorded_steps(case.policy, wanted=True) is None


def test_nothing_is_recorded_on_the_cpu(case):
    assert recorded_steps(case.policy, wanted=True) is None


def test_a_step_that_cannot_be_recorded_says_how_to_go_on(case, monkeypatch, tapes):
    class Refusing(Tape):
        def __torch_dispatch__(self, *call):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\); set rollout.cuda_graphs=false"):
        draw(case, recorded=RecordedSteps(CudaGraphs(), None), **LONG)
