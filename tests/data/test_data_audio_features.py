"""Log-mel frames against transformers' WhisperFeatureExtractor."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from fmjax.data.audio_features import LogMel, log_energies, scaled


def sounds():
    """Noise, a chord with silence after it, and silence, of different lengths."""
    rng = np.random.default_rng(0)
    time = np.arange(16000 * 4) / 16000
    chord = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 3333 * time)
    chord[30000:] = 0.0
    return [
        (0.1 * rng.normal(size=23456)).astype(np.float32),
        chord.astype(np.float32),
        np.zeros(5000, np.float32),
    ]


def test_frames_equal_transformers():
    """Within 1e-4, in silence too; ours have frames before bins."""
    theirs = WhisperFeatureExtractor()(sounds(), sampling_rate=16000)["input_features"]
    ours = LogMel()(sounds())["input_features"]
    assert ours.shape == (3, 3000, 80)
    np.testing.assert_allclose(np.swapaxes(ours, 1, 2), theirs, atol=1e-4)


@pytest.mark.slow
def test_pieces_of_a_recording_are_its_frames():
    samples = np.concatenate([*sounds(), sounds()[0]])
    settings = LogMel()
    whole = log_energies(samples[None], settings)[0]
    half, pieces = settings.n_fft // 2, []
    padded = np.pad(samples, half, mode="reflect")
    for start in range(0, len(whole), 100):
        end = min(start + 100, len(whole))
        piece = padded[start * 160 : (end - 1) * 160 + 400]
        pieces.append(log_energies(piece[None], settings, padded=True)[0])
    np.testing.assert_allclose(jnp.concatenate(pieces), whole, atol=1e-5)
    theirs = WhisperFeatureExtractor()(
        samples, sampling_rate=16000, padding="longest", truncation=False
    )["input_features"][0]
    np.testing.assert_allclose(scaled(whole, whole.max()), theirs.T, atol=1e-4)


def test_files_are_read_and_written(tmp_path):
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    settings = LogMel.read(tmp_path)
    assert settings == LogMel(feature_size=128)
    settings.write(tmp_path)
    again = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert again.to_dict() == WhisperFeatureExtractor(feature_size=128).to_dict()


def test_what_is_not_understood_is_refused(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"dither": 0.1, "loudness": 3, "feature_extractor_type": "Other"}))
    with pytest.raises(ValueError, match=r"(?s)3 problems.*'Other'.*dither=0\.1.*loudness=3"):
        LogMel.read(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)feature_size=0.*hop_length='x'"):
        LogMel(feature_size=0, hop_length="x")
    with pytest.raises(FileNotFoundError):
        LogMel.read(tmp_path / "none")


def test_bad_recordings_are_refused():
    bad = [
        np.zeros((4, 2), np.float32), np.zeros(4, np.int16), np.zeros(0, np.float32),
        np.array([0.0, np.nan], np.float32), np.zeros(16000 * 31, np.float32),
        np.array([0.0, 9000.0], np.float32),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="6 problems") as error:
        LogMel()(bad)
    for words in (
        "one channel",
        "divide integers",
        "empty",
        "1 samples that are nan",
        "31.0 s",
        "of 9000",
    ):
        assert words in str(error.value)
