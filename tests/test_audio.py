"""data/audio.py and data/decoding.py: the waveform is the clip, and anything else is an error that says so."""

import numpy as np
import pytest
import soundfile
import torch

from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.cut_off import shortfall
from hark.data.decoding import read_header
from hark.data.errors import AudioError, CutClipError, SilentClipError, SkippedClipError
from hark.data.torchaudio_compat import torchaudio

RATE = 16_000


def tone(seconds, rate, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def save(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def load(path, max_seconds=30.0, **options):
    return load_waveform(path, sample_rate=RATE, max_seconds=max_seconds, **options)


# The tolerances are those of the codecs: none, 16 bits, and two lossy ones.
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("wav", {"subtype": "FLOAT"}, 0.0), ("flac", {}, 4e-5), ("ogg", {}, 0.05), ("mp3", {}, 0.05)],
)
def test_each_format_gives_back_the_samples(tmp_path, kind, options, tolerance):
    samples = tone(1.0, RATE)
    waveform = load(save(tmp_path / f"a.{kind}", samples, **options))
    assert waveform.dtype == np.float32 and waveform.shape == samples.shape
    assert np.abs(waveform - samples)[400:-400].max() <= tolerance


def test_all_channels_count_not_only_the_first(tmp_path):
    left, right = tone(0.5, RATE), tone(0.5, RATE, 1000.0)
    waveform = load(save(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT"))
    np.testing.assert_allclose(waveform, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_gives_the_same_tone_at_the_models_rate(tmp_path, rate):
    waveform = load(save(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT"))
    assert len(waveform) == RATE
    # 1e-3: the ripple of torchaudio's default filter, away from the edges where it sees zeros.
    assert np.abs(waveform - tone(1.0, RATE))[200:-200].max() < 1e-3


def test_the_waveform_is_torchaudios_resampling_of_the_file(tmp_path):
    samples = np.random.default_rng(0).standard_normal(44_100).astype(np.float32) * 0.1
    expected = torchaudio.functional.resample(torch.from_numpy(samples).double(), 44_100, RATE).numpy()
    waveform = load(save(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT"))
    # Measured 1.3e-6 against float64, the rounding of the filter; a step of 16-bit audio is 3e-5.
    np.testing.assert_allclose(waveform, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_a_crop_is_exactly_the_beginning_of_the_whole_waveform(tmp_path, rate):
    samples = np.random.default_rng(0).standard_normal(3 * rate).astype(np.float32) * 0.1
    path = save(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    cropped = load(path, max_seconds=1.3, long_clips="crop")
    assert len(cropped) == round(1.3 * RATE)
    # Not bitwise: a convolution may be summed in another order for another length.
    np.testing.assert_allclose(cropped, load(path)[: len(cropped)], atol=1e-6)


def test_a_crop_decodes_no_more_than_it_needs(tmp_path, monkeypatch):
    path = save(tmp_path / "a.wav", tone(20.0, RATE))
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, **k: asked.append(len(k["out"])) or read(self, **k))
    load(path, max_seconds=1.0, long_clips="crop")
    assert sum(asked) < 1.1 * RATE


def test_a_long_clip_is_an_error_that_names_its_length_and_the_limit(tmp_path):
    path = save(tmp_path / "long.wav", tone(2.5, RATE))
    with pytest.raises(AudioError, match=r"long.wav: is 2.50 s long; expected at most 2 s") as error:
        load(path, max_seconds=2.0)
    assert not isinstance(error.value, SkippedClipError)
    with pytest.raises(SkippedClipError, match="2.50 s"):
        load(path, max_seconds=2.0, long_clips="skip")


@pytest.mark.parametrize(
    ("limit", "message"),
    [(1.0, "is 1.0001 s long; expected at most 1 s"), (1.00001, "is 1.0001 s long; expected at most 1.00001 s")],
)
def test_the_printed_length_of_a_long_clip_is_over_the_printed_limit(limit, message, tmp_path):
    path = save(tmp_path / "a.wav", tone(1.0 + 1 / RATE, RATE))
    with pytest.raises(AudioError, match=message):
        load(path, max_seconds=limit)


def test_the_printed_peak_of_a_silent_clip_is_below_the_printed_limit(tmp_path):
    path = save(tmp_path / "a.wav", np.full(RATE, 9.99e-5, dtype=np.float32), subtype="FLOAT")
    with pytest.raises(SilentClipError, match=r"peak 9.99e-05, .*at least 1e-04"):
        load(path)


def test_a_clip_of_exactly_the_limit_is_not_long(tmp_path):
    path = save(tmp_path / "a.wav", tone(2.0, 44_100), 44_100)
    assert len(load(path, max_seconds=2.0)) == 2 * RATE


def test_an_unknown_way_with_long_clips_is_refused(tmp_path):
    path = save(tmp_path / "a.wav", tone(0.1, RATE))
    with pytest.raises(ValueError, match="expected one of error, crop, skip"):
        load(path, long_clips="cut")


def broken_files(tmp_path):
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "headerless.raw").write_bytes(b"12345678")
    (tmp_path / "directory.wav").mkdir()
    save(tmp_path / "nothing.wav", np.zeros(0))
    return {
        "missing.wav": "no such file",
        "zero.wav": "is empty",
        "text.wav": "cannot be decoded",
        "headerless.raw": "cannot be decoded",
        "directory.wav": "is a directory",
        "nothing.wav": "holds no samples",
    }


def test_a_file_without_sound_in_it_is_an_error_that_names_it(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(AudioError, match=f"{name}: {message}.*expected"):
            load(tmp_path / name)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_a_file_that_is_cut_off_is_an_error_also_where_the_decoder_says_nothing(tmp_path, kind):
    noise = np.random.default_rng(0).standard_normal(5 * RATE) * 0.1
    whole = save(tmp_path / f"a.{kind}", noise).read_bytes()
    for share in (0.5, 0.98):
        cut = tmp_path / f"cut{share}.{kind}"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CutClipError, match=f"{cut.name}: is cut off"):
            load(cut)
    load(tmp_path / f"a.{kind}")
    if kind != "flac":  # whose decoder refuses what follows the sound
        (tmp_path / f"tagged.{kind}").write_bytes(whole + b"TAG" + bytes(125))  # as ID3v1 stands at the end of a file
        load(tmp_path / f"tagged.{kind}")


def test_an_ogg_file_cut_between_two_pages_lacks_its_last(tmp_path):
    whole = save(tmp_path / "a.ogg", np.random.default_rng(0).standard_normal(5 * RATE) * 0.1).read_bytes()
    (tmp_path / "cut.ogg").write_bytes(whole[: whole.rindex(b"OggS")])
    with pytest.raises(CutClipError, match="its last page is not marked as the end"):
        load(tmp_path / "cut.ogg")


def lacking(path) -> str:
    with path.open("rb") as file:
        return shortfall(file)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_file_of_a_program_that_could_not_know_its_length_is_whole(tmp_path, length):
    whole = save(tmp_path / "a.wav", tone(1.0, RATE)).read_bytes()
    place = whole.index(b"data") + 4
    streamed = tmp_path / "streamed.wav"
    streamed.write_bytes(whole[:place] + length.to_bytes(4, "little") + whole[place + 4 :])
    assert len(load(streamed)) == RATE
    assert not lacking(tmp_path / "a.wav") and not lacking(streamed)
    streamed.write_bytes(whole[:place] + bytes(4) + whole[place + 4 :])
    assert not lacking(streamed)


@pytest.mark.parametrize("tag", [b"", b"ID3\4\0\0\0\0\1\0" + bytes(128)])
def test_the_promise_of_an_mp3_file_is_the_number_of_bytes_in_its_first_frame(tmp_path, tag):
    """Frames made by hand: 10 frames of 417 bytes, the first with the header that names them."""
    frame = b"\xff\xfb\x90\x64"

    def written(header: bytes, offset: int, frames: int) -> str:
        first = (frame + bytes(offset - 4) + header).ljust(417, b"\0")
        (tmp_path / "a.mp3").write_bytes(tag + first + frame.ljust(417, b"\0") * (frames - 1))
        return lacking(tmp_path / "a.mp3")

    xing = b"Xing" + (3).to_bytes(4, "big") + (10).to_bytes(4, "big") + (4170).to_bytes(4, "big")
    vbri = b"VBRI" + bytes(6) + (4170).to_bytes(4, "big") + (10).to_bytes(4, "big")
    for header, offset in ((xing, 36), (xing.replace(b"Xing", b"Info"), 21), (vbri, 36)):
        assert written(header, offset, 10) == ""
        assert written(header, offset, 7) == "2919 of the 4170 bytes of sound that its header promises"
    assert written(b"", 36, 7) == "", "nothing is promised"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(tmp_path, value):
    samples = tone(0.5, RATE)
    samples[100] = value
    with pytest.raises(AudioError, match="not finite"):
        load(save(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_silence_is_an_error_and_a_quiet_clip_is_not(tmp_path):
    quiet = tone(0.5, RATE) * 1e-3
    assert len(load(save(tmp_path / "quiet.wav", quiet, subtype="FLOAT"))) == len(quiet)
    opposite = np.stack([tone(0.5, RATE), -tone(0.5, RATE)], axis=1)
    for samples in (np.zeros(8000), quiet * 0.1, opposite):
        with pytest.raises(AudioError, match="is silent"):
            load(save(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_a_rate_that_would_need_gigabytes_of_filter_is_refused(tmp_path):
    with pytest.raises(AudioError, match="44101 Hz, which has no small ratio"):
        load(save(tmp_path / "a.wav", tone(0.1, 44_101), 44_101))


def test_the_header_of_a_compressed_file_is_not_believed_against_its_content(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mp3", tone(1.0, RATE))
    monkeypatch.setattr(soundfile.SoundFile, "frames", 100 * RATE)
    for claimed in (2**63 - 1, 100):
        monkeypatch.setattr(soundfile.SoundFile, "frames", claimed)
        assert len(load(path)) == RATE
        with pytest.raises(AudioError, match="a.mp3: is too long; expected at most 0.5 s"):
            load(path, max_seconds=0.5)


def test_the_header_says_what_the_file_is(tmp_path):
    stereo = np.stack([tone(2.5, 22_050)] * 2, axis=1)
    header = read_header(Clip(save(tmp_path / "a.wav", stereo, 22_050)))
    assert (header.sample_rate, header.channels, round(header.seconds, 3)) == (22_050, 2, 2.5)
