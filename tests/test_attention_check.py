"""model.attention=auto: FlexAttention is taken where it computes what sdpa does, and is refused for any fault."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_mask

from hark.grpo import attention_check as checked
from hark.grpo.attention_check import LayerKind, agreed_fault, chosen_attention, fault_of, layer_kinds
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.models.attention import BLOCK, BlockMask
from hark.models.loading import load_policy
from tests.ranks import on_ranks
from tests.test_blocks import lists_of
from tests.test_models import build_mixed_windows

CPU, WHOLE, APART = torch.device("cpu"), (False,), (True,)
KIND = LayerKind(4, 2, 16, 16, 0.25, torch.float32)
KINDS = [  # grouped heads or not, sizes that are no power of 2, narrow values, another scaling, a window
    KIND,
    LayerKind(2, 2, 80, 80, 80**-0.5, torch.float32),
    LayerKind(2, 1, 24, 16, 1.0, torch.float32, has_window=True),
    LayerKind(4, 4, 32, 32, 0.1, torch.bfloat16),
    LayerKind(4, 1, 96, 96, 0.1, torch.bfloat16, has_window=True),
]


class Attention:
    """FlexAttention by its definition: the rule in some blocks, all pairs in others, none elsewhere."""

    def __init__(self, masks: tuple[BlockMask, ...]):
        (mask,) = masks
        rows, _, height, width = mask.shape
        parts, wholes = (self.pairs(blocks, height, width) for blocks in self.lists(mask))
        self.mask = parts & create_mask(mask.mask_mod, rows, None, height, width, device="cpu") | wholes

    def lists(self, mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
        return lists_of(mask)

    @staticmethod
    def pairs(blocks: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, None, :height, :width]

    def __call__(self, module, query, key, value, mask, *, scaling):
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        scores = scaling * (query.float() @ key.float().mT)
        weights = scores.masked_fill(~self.mask, -1e30).softmax(dim=-1) * self.mask.any(dim=-1, keepdim=True)
        return (weights.to(value.dtype) @ value).transpose(1, 2)


class SeesOneKeyTooMany(Attention):
    def __init__(self, masks):
        super().__init__(masks)
        assert not self.mask[0, 0, -1, 200]  # a token of a sibling
        self.mask[0, 0, -1, 200] = True


class IsBlindToItself(Attention):
    def __init__(self, masks):
        super().__init__(masks)
        of_others = torch.ones_like(self.mask[0, 0]).tril(self.mask.shape[3] - self.mask.shape[2] - 1)
        self.mask &= of_others


class LeavesABlockOut(Attention):
    def lists(self, mask):
        parts, wholes = super().lists(mask)
        assert wholes[0, 2, 0]
        wholes[0, 2, 0] = False
        return parts, wholes


class AppliesTheRuleNowhere(Attention):
    def lists(self, mask):
        parts, wholes = super().lists(mask)
        return parts & False, parts | wholes


class HasAWrongGradient(Attention):
    def __call__(self, module, query, key, value, mask, **kwargs):
        wrong = key.clone()
        wrong.register_hook(lambda gradient: gradient * 1.05)
        return super().__call__(module, query, wrong, value, mask, **kwargs)


class LosesAGradient(Attention):
    def __call__(self, module, query, key, value, mask, **kwargs):
        return super().__call__(module, query, key, value.detach(), mask, **kwargs)


class ForgetsTheScaling(Attention):
    def __call__(self, module, query, key, value, mask, *, scaling):
        return super().__call__(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5)


class GivesNaN(Attention):
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        output[-1, -1, -1, -1] = torch.nan
        return output


class HasANaNGradient(Attention):
    def __call__(self, module, query, key, value, mask, **kwargs):
        output = super().__call__(module, query, key, value, mask, **kwargs)
        output.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([300]), torch.nan))
        return output


class Fails(Attention):
    def __call__(self, *args, **kwargs):
        raise RuntimeError("No valid triton configs.\nOutOfResources: out of resource: shared memory")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_right_implementation_passes(kind):
    assert fault_of([kind], CPU, (False, True), Attention) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_uncompiled_flexattention_passes(kind, monkeypatch):
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    assert fault_of([kind], CPU, (False, True)) is None


@pytest.mark.parametrize("apart", [WHOLE, APART])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong",
    [
        SeesOneKeyTooMany,
        IsBlindToItself,
        LeavesABlockOut,
        AppliesTheRuleNowhere,
        HasAWrongGradient,
        GivesNaN,
        HasANaNGradient,
    ],
)
def test_a_wrong_implementation_is_refused(wrong, dtype, apart):
    kind = LayerKind(8, 2, 32, 32, 32**-0.5, dtype)
    fault = fault_of([kind], CPU, apart, wrong)
    assert fault and fault.startswith("FlexAttention differs from sdpa by") and str(kind) in fault


def test_a_fault_of_one_kind_of_layer_is_enough():
    other = LayerKind(4, 2, 16, 16, 0.5, torch.float32)
    assert fault_of([KIND], CPU, WHOLE, ForgetsTheScaling) is None
    assert str(other) in fault_of([KIND, other], CPU, WHOLE, ForgetsTheScaling)


@pytest.mark.parametrize(
    "broken, reason", [(Fails, "No valid triton configs. OutOf"), (LosesAGradient, "not have been")]
)
def test_what_cannot_be_computed_is_refused_in_one_line(broken, reason):
    fault = fault_of([KIND], CPU, WHOLE, broken)
    assert fault.startswith(f"FlexAttention fails for {KIND}: ") and reason in fault and "\n" not in fault


def test_the_layers_say_what_they_pass_to_attention(case, tmp_path):
    config = case.policy.decoder.config
    size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    assert layer_kinds(case.policy) == [LayerKind(*heads, size, size, size**-0.5, torch.float32)]
    build_mixed_windows(tmp_path)
    assert {kind.has_window for kind in layer_kinds(load_policy(tmp_path))} == {False, True}


def agree(world: World, directory: str) -> None:
    policy = load_policy(directory, shard=partial(shard, mesh=device_mesh(world)))
    assert agreed_fault(policy, world, WHOLE, Attention) is None
    fault = agreed_fault(policy, world, WHOLE, Attention if world.rank == 0 else Fails)
    assert fault and "No valid triton configs" in fault


def test_all_ranks_refuse_it_for_a_fault_on_one(causal_lm_dir):
    on_ranks(2, agree, str(causal_lm_dir))


LIMITS = dict(branches=5, max_new_tokens=257, apart=WHOLE)


def test_it_is_chosen_on_a_gpu_for_rows_with_many_siblings(monkeypatch):
    world, gpu = World(0, 1, CPU), SimpleNamespace(device=torch.device("cuda"))
    faults = iter([None, "a fault"])
    monkeypatch.setattr(checked, "agreed_fault", lambda policy, world, apart: next(faults))
    assert chosen_attention(gpu, world, **LIMITS)[0] == "flex"
    assert chosen_attention(gpu, world, **LIMITS) == ("sdpa", "a fault")
    for less in ({"branches": 4}, {"max_new_tokens": 256}):
        choice, reason = chosen_attention(gpu, world, **(LIMITS | less))
        assert choice == "sdpa" and "less than 1024 tokens" in reason
    assert chosen_attention(SimpleNamespace(device=CPU), world, **LIMITS)[0] == "sdpa"
