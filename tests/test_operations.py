"""The counts of tests/operations.py: what a decode step launches, waits for and copies."""

from __future__ import annotations

from transformers import AutoConfig

from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B
from tests.operations import OUTSIDE, count

LAYERS = 3
# A layer of Qwen2: seven products, three of them with a bias in the same kernel, and two norms.
EXPECTED = {"norms": 2, "linear layers": 7, "rotary positions": 10, "attention": 11, "additions": 2, "activation": 2}


def test_a_decode_step_launches_few_kernels_waits_once_and_no_mask_is_copied():
    config = AutoConfig.for_model(**QWEN2_AUDIO_7B)
    config.text_config.update({"num_hidden_layers": LAYERS})
    hark, plain = (count(config, plain=how) for how in (False, True))
    outside = hark.kernels.pop(OUTSIDE)
    hark.kernels["attention"] -= 1  # the indices of the branches, once for all layers
    assert hark.kernels == {part: LAYERS * kernels for part, kernels in EXPECTED.items()} and outside < 75
    assert hark.waits == 1 and hark.copied == 0
    # What the counts are held against: transformers' norms take eight kernels each, and a mask of 331 keys is copied.
    assert plain.kernels["norms"] == 16 * LAYERS and plain.copied == LAYERS
