"""data/features.py: our log-mel is WhisperFeatureExtractor's, without the 30 s of padding."""

import numpy as np
import pytest
import torch

from hark.data.features import log_mel, mel_filters
from hark.data.torchaudio_compat import torchaudio

# Lengths around every edge: shorter than a window, around a hop, and where the 30 s padding begins to run out.
LENGTHS = [1, 159, 160, 161, 200, 201, 400, 401, 16_000, 32_077, 479_599, 479_600, 479_601, 479_800, 479_999, 480_000]
# Measured 2.4e-7, two steps of float32 at the output's largest values; a filterbank in float32 alone gives 2e-5.
TOLERANCE = 1e-6


def clip(kind, samples, seed):
    noise = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    if kind == "click":  # the loudest frames come after the last one that is returned
        noise *= 1e-5
        noise[-1] = 0.9
        return noise
    return noise * {"noise": 0.1, "faint": 1e-5, "silence": 0.0}[kind]


@pytest.fixture(scope="module", params=[80, 128])
def whisper(request):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=request.param)
    return request.param, lambda x: torch.as_tensor(
        extractor(x, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    )


@pytest.mark.parametrize("kind", ["noise", "click", "faint", "silence"])
def test_log_mel_equals_the_first_frames_of_whispers_extractor(whisper, kind):
    n_mels, reference = whisper
    for samples in LENGTHS:
        waveform = clip(kind, samples, seed=samples)
        frames = -(-samples // 160)
        ours = log_mel(waveform, n_mels=n_mels)
        assert ours.shape == (n_mels, frames) and ours.dtype == torch.float32
        difference = (ours - reference(waveform)[:, :frames]).abs().max().item()
        assert difference <= TOLERANCE, f"{samples} samples: {difference}"


def test_the_filterbank_is_torchaudios_slaney_bank(whisper):
    n_mels, _ = whisper
    theirs = torchaudio.functional.melscale_fbanks(
        201, 0.0, 8000.0, n_mels, 16_000, norm="slaney", mel_scale="slaney"
    ).T
    # Weights are up to 0.03; theirs is computed in float32.
    torch.testing.assert_close(mel_filters(n_mels, 400, 16_000), theirs, atol=3e-7, rtol=0)


def test_a_longer_padding_means_zeros_and_not_reflection_after_30_seconds(whisper):
    n_mels, _ = whisper
    waveform = clip("noise", 480_000, seed=0)
    short, long = log_mel(waveform, n_mels=n_mels), log_mel(waveform, n_mels=n_mels, padded_samples=960_000)
    assert torch.equal(short[:, :-2], long[:, :-2])
    assert not torch.allclose(short[:, -1], long[:, -1], atol=1e-3)


def test_what_is_no_single_channel_of_at_most_the_padded_length_is_refused():
    for shape in [(0,), (2, 160), (480_001,)]:
        with pytest.raises(ValueError, match="expected one channel of 1 to 480000 samples"):
            log_mel(np.zeros(shape, dtype=np.float32), n_mels=80)
