"""Kernels of a decode step, waits for the GPU and copied masks of Qwen2-Audio-7B, counted without a GPU.

    python -m tests.operations        a minute; it needs a C++ compiler

The sampler and the scorer are the real ones, in bfloat16, on fake tensors, which have sizes and no values and say that
they are on a GPU. An operator that computes is counted as one kernel, although a few launch more. `plain` is the same
with the norms of transformers and with masks whose rows are not padded; `Hark` is what runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from hark.grpo.branches import Branches
from hark.grpo.instruments.memory import Setting
from hark.grpo.scorer import score
from hark.models.attention import MASK_STRIDE, AttentionFunction, DecodeAttention
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B
from hark.models.policy import Policy, Prompt
from tests.simulation import ConfigOnlyPolicy, FixedValues, fill, whole_rows

GROUP, PROMPT, TOKENS = 8, 310, 20
HALF = Setting(shards=1, dtype=2, master=2)
READS = {torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__index__}
OUTSIDE, ATTENTION = "outside of layers", "attention"
SMALL = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
CALL = re.compile(r"(?:cpp_fused_\w+|extern_kernels\.\w+)\(")  # in the code that torch generates
VIEWS = {"aten::_unsafe_view", "aten::detach", "aten::lift_fresh"}  # their schemas do not tell
ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}


class Counts(NamedTuple):
    """kernels: of a decode step, by part. waits: for the GPU in it. copied: masks in a pass of the scorer."""

    kernels: dict[str, int]
    waits: int
    copied: int


class Kernels(TorchDispatchMode):
    """Counts the operators that compute, by the part of the policy that calls them."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._parts = [OUTSIDE]
        for layer in policy.decoder.layers:
            for name, module in {"": layer, **dict(layer.named_modules())}.items():
                kind = type(module).__name__
                named = {"": "additions", "self_attn": "rotary positions", "mlp": "activation"}.get(name)
                named = "linear layers" if isinstance(module, nn.Linear) else named
                named = "norms" if kind.endswith("RMSNorm") else named
                if named:
                    module.register_forward_pre_hook(lambda *_, named=named: self._parts.append(named))
                    module.register_forward_hook(lambda *_: self._parts.pop() and None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returns = function._schema.name, function._schema.returns
        is_view = name in VIEWS or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if name.startswith("aten::") and not is_view and name not in ALLOCATIONS:
            self.counts[self._parts[-1]] += 1
        return function(*args, **(kwargs or {}))

    def attention_of(self, kind: Callable[..., AttentionFunction]) -> Callable[..., AttentionFunction]:
        """A kind of attention whose calls are counted as a part of their own."""

        def made(*arguments: Any) -> AttentionFunction:
            attention = kind(*arguments)

            def counted(*args: Any, **kwargs: Any) -> Any:
                self._parts.append(ATTENTION)
                output = attention(*args, **kwargs)
                self._parts.pop()
                return output

            return counted

        return made


class OnGPU(FixedValues):
    """Lets tensors say that they are on a GPU, and counts where the host reads one: no completion has stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.copied = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is rms_norm:  # one kernel on a GPU; on fake tensors of the CPU it would be seven
            return args[0].neg()
        by_mask = function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        self.waits += function in READS or by_mask
        mask = (kwargs or {}).get("attn_mask")
        self.copied += (
            function is scaled_dot_product_attention and mask is not None and mask.stride(-2) % MASK_STRIDE > 0
        )
        return super().__torch_function__(function, types, args, kwargs)

    def read(self, tensor: torch.Tensor) -> list[bool]:
        """A tensor as a list, which fake tensors do not ask of a mode."""
        self.waits += 1
        return [True] * tensor.numel()


def count(config: Any, *, plain: bool) -> Counts:
    """Count the second decode step of a group, and a pass of the scorer over it."""
    with ExitStack() as stack:
        for target, replacement in {
            "hark.grpo.branches.paying_threads": lambda most: lambda step, result: step(),
            "hark.grpo.scorer.row_attention": whole_rows,
            **({"hark.models.policy.use_fused_norms": lambda model: None} if plain else {}),
            **({"hark.models.policy.mask_row": lambda keys: keys} if plain else {}),
        }.items():
            stack.enter_context(mock.patch(target, replacement))
        policy = ConfigOnlyPolicy(config).requires_grad_(False)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fill(policy, HALF)
        gpu, kernels = stack.enter_context(OnGPU()), Kernels(policy)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: gpu.read(tensor)))
        stack.enter_context(mock.patch("hark.grpo.branches.DecodeAttention", kernels.attention_of(DecodeAttention)))
        prompts = (Prompt(torch.zeros(PROMPT, dtype=torch.long)),)
        with torch.no_grad():
            step = decoding(policy, prompts)
            step()
            gpu.waits = 0
            with kernels:
                step()
            waits, shape = gpu.waits, (GROUP, TOKENS)
            score(policy, prompts, torch.zeros(shape).long(), torch.ones(shape).bool(), group_size=GROUP)
        return Counts(dict(kernels.counts), waits, gpu.copied)


def decoding(policy: Policy, prompts: tuple[Prompt, ...]) -> Callable[[], None]:
    """What does a decode step of prompts that are prefilled, and looks which completions have ended."""
    branches = Branches(
        policy, prompts, group_size=GROUP, limit=TOKENS, temperature=1.0, rows=len(prompts), stop=True, recorded=None,
        keep_prefill=False, uniforms=torch.zeros(len(prompts) * GROUP, TOKENS, dtype=torch.float64),
    )  # fmt: skip
    branches.prefill(range(len(prompts)))

    def step() -> None:
        branches.decode_step()
        branches.remove_finished(keep_rows=False)

    return step


def compiled_kernels() -> int:
    """Kernels of a decode step in a compiled layer, attention left out: calls in the code that torch generates.

    Of a small decoder on the CPU, because code for a GPU is generated on one only. It needs a C++ compiler.
    """
    config = AutoConfig.for_model(**QWEN2_AUDIO_7B)
    config.text_config.update(SMALL)
    config.audio_config.update({"encoder_layers": 0})
    policy = ConfigOnlyPolicy(config).requires_grad_(False)
    weights = {name: torch.randn(weight.shape) / 8 for name, weight in policy.model.named_parameters()}
    policy.model.load_state_dict(weights, assign=True, strict=False)
    policy.compile_layers()
    torch.set_num_threads(1)  # else the step is compiled for each number of threads that is tried
    with torch.no_grad():
        step = decoding(policy, (Prompt(torch.zeros(PROMPT, dtype=torch.long)),))
        _, code = run_and_get_code(step)
    return sum(len(CALL.findall(part[part.index("def call(") :])) for part in code)


def main() -> None:
    config = AutoConfig.for_model(**QWEN2_AUDIO_7B)
    layers = config.text_config.num_hidden_layers
    plain, hark = (count(config, plain=how) for how in (True, False))
    print(f"{'':34}{'plain':>8}{'Hark':>8}")
    for part in plain.kernels:
        counts = [one.kernels[part] // (1 if part == OUTSIDE else layers) for one in (plain, hark)]
        print(f"{part if part == OUTSIDE else 'of a layer: ' + part:34}" + "".join(f"{n:8}" for n in counts))
    for name, counts in {
        "kernels of a decode step": [sum(one.kernels.values()) for one in (plain, hark)],
        "waits for the GPU in it": [plain.waits, hark.waits],
        "masks copied by the scorer": [plain.copied, hark.copied],
    }.items():
        print(f"{name:34}" + "".join(f"{n:8,}" for n in counts), flush=True)
    outside, attention = (hark.kernels[part] for part in (OUTSIDE, ATTENTION))
    of_layer = compiled_kernels()
    every = layers * of_layer + attention + outside
    print(f"with model.compile: {of_layer} in a layer beside attention, {every:,} in all")


if __name__ == "__main__":
    main()
