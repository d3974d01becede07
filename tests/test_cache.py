"""The cache of a frozen tower's outputs, and attention through the cache of a rollout's keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hark.models.attention import DecodeAttention
from hark.models.cache import GroupCache, TowerCache


def test_the_least_recently_used_outputs_are_dropped_and_computed_again():
    cache, computed = TowerCache(capacity=2 * 40), []

    def get(name: str) -> torch.Tensor:
        def encode() -> torch.Tensor:
            computed.append(name)
            return torch.full((10,), float(ord(name)))  # 40 bytes

        return cache.get(name, encode)

    for name in "abacab":
        assert (get(name) == ord(name)).all()
    # "a" was used after "b" when "c" came, so "b" had to go; then "c", the older of "c" and "a".
    assert computed == ["a", "b", "c", "b"]
    get("a")
    assert computed == ["a", "b", "c", "b"]


def test_an_output_larger_than_the_cache_is_given_and_not_kept():
    cache = TowerCache(capacity=10)
    for value in (1.0, 2.0):
        assert cache.get("a", lambda value=value: torch.full((10,), value))[0] == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_half_precision_loses_no_digits_of_the_scores(dtype):
    """Scores of size 20, which bfloat16 would round by up to 0.06, and so each weight by 6 %."""
    heads, prompt, steps, size = 2, 64, 8, 128
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, length: int) -> torch.Tensor:
        return torch.randn(count, heads, length, size, generator=generator).to(dtype)

    keys, values, own_keys, own_values = draw(1, prompt), draw(1, prompt), draw(2, steps), draw(2, steps)
    query, cache, layer = draw(2, 1), GroupCache(1, prompt, 2, steps), SimpleNamespace(layer_idx=0)
    cache.fill(0, [0], keys, values)
    places = torch.arange(2)
    mask = torch.zeros(2, 1, 1, prompt + steps, dtype=dtype)
    for step in range(steps):
        attend = DecodeAttention(cache, torch.full((2,), step), places, places, 1, prompt, steps)
        output = attend(layer, query, own_keys[:, :, [step]], own_values[:, :, [step]], mask, scaling=1.0)

    all_keys, all_values = (
        torch.cat([shared.expand(2, -1, -1, -1), own], dim=2).double()
        for shared, own in ((keys, own_keys), (values, own_values))
    )
    weights = (query.double() @ all_keys.mT).softmax(dim=-1)
    expected = (weights @ all_values).transpose(1, 2)
    # Weights, partial sums and the output are rounded to the dtype, at values of up to 2.5: 1e-2 was seen in bfloat16.
    # Float32 rounds scores of 20 by 1e-6. With scores in bfloat16 the difference is 3e-2.
    assert (output.double() - expected).abs().max() < {torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
