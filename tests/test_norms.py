"""RMS norms as one operator: the same values and gradients, and fewer operators in a decode step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from hark.grpo.sampler import sample
from hark.models.norms import use_fused_norms


class Calls(TorchFunctionMode):
    """Counts the functions of torch that are called. A build for the CPU has no single kernel for `rms_norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def filled(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(dtype):
    """In bfloat16 theirs is rounded before and after it is multiplied by the weight, ours once."""
    theirs, ours = (filled(Qwen2RMSNorm(64, eps=1e-3)).to(dtype) for _ in range(2))
    use_fused_norms(ours)
    assert (
        type(ours) is not Qwen2RMSNorm and isinstance(ours, Qwen2RMSNorm) and not ours.state_dict().keys() - {"weight"}
    )
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for norm in (theirs, ours):
        own = x.clone().requires_grad_()
        output = norm(own)
        (output * torch.linspace(-1, 1, 64, dtype=dtype)).sum().backward()
        results.append([output, own.grad, norm.weight.grad])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_a_norm_that_computes_something_else_stays_what_it_is():
    class ScaledRMSNorm(Qwen2RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    norms = nn.ModuleList([GemmaRMSNorm(8), ScaledRMSNorm(8), nn.LayerNorm(8), Qwen2RMSNorm(8, eps=1e-6)])
    before = [type(norm) for norm in norms]
    use_fused_norms(norms)
    assert [type(norm) is kind for norm, kind in zip(norms, before, strict=True)] == [True, True, True, False]


def test_a_norm_whose_weight_has_no_values_yet_is_recognised():
    with torch.device("meta"):
        norm = Qwen2RMSNorm(8)
    use_fused_norms(norm)
    assert type(norm) is not Qwen2RMSNorm and norm.weight.is_meta


def test_a_decode_step_calls_one_function_for_each_norm(case):
    def counts() -> Counter[str]:
        found = []
        for tokens in (3, 2):
            with Calls() as calls:
                sample(case.policy, case.prompts[:1], group_size=2, max_new_tokens=tokens, temperature=0, stop=False)
            found.append(calls.counts)
        return found[0] - found[1]  # of one decode step

    norms = [module for module in case.policy.decoder.modules() if type(module).__name__.endswith("RMSNorm")]
    count = 2 * len(case.policy.decoder.layers) + 1
    fused = counts()
    assert len(norms) == fused["rms_norm"] == count and not fused["rsqrt"]
    for norm in norms:
        norm.__class__ = type(norm).__base__
    plain = counts()
    assert not plain["rms_norm"] and all(plain[name] - fused[name] == count for name in ("pow", "mean", "rsqrt"))
