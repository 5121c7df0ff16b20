"""Spectra, filter banks and cepstra against transformers' and scipy's; augmentation of sounds."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import transformers
from transformers import audio_utils

from fmjax.data import spectral
from fmjax.data.audio_augment import (
    POLICIES,
    SpecAugment,
    change_speed,
    perturb_speed,
    spec_augment,
)
from fmjax.data.resampling import resample
from fmjax.data.spectral import Frames

SOUND = (np.random.default_rng(0).normal(size=8_000) * 0.1).astype(np.float32)


def near(ours, reference, tolerance=1e-5):
    """Within a share of the reference's largest value."""
    reference = np.asarray(reference)
    assert ours.shape == reference.shape
    assert np.abs(np.asarray(ours) - reference).max() <= tolerance * np.abs(reference).max()


@pytest.mark.parametrize("scale", spectral.SCALES)
@pytest.mark.parametrize("equal_area", [False, True])
def test_mel_filters(scale, equal_area):
    norm = "slaney" if equal_area else None
    reference = audio_utils.mel_filter_bank(
        201, 40, 50.0, 7600.0, 16_000, norm=norm, mel_scale=scale
    )
    options = {"low": 50.0, "high": 7600.0, "scale": scale, "equal_area": equal_area}
    near(spectral.mel_filters(Frames(400), 40, 16_000, **options), reference)


@pytest.mark.parametrize(
    "frames",
    [
        Frames(400, 160, 512, center=True),
        pytest.param(Frames(400, 160, center=True), marks=pytest.mark.slow),
        pytest.param(Frames(400, 160, 512), marks=pytest.mark.slow),
        pytest.param(Frames(320, 160, window="hamming", periodic=False), marks=pytest.mark.slow),
        Frames(256, 100, window="povey", periodic=False, remove_mean=True, preemphasis=0.9),
    ],
)
def test_power_spectra(frames):
    window = audio_utils.window_function(frames.length, frames.window, periodic=frames.periodic)
    reference = audio_utils.spectrogram(
        SOUND, window, frames.length, frames.hop, frames.size, power=2.0, center=frames.center,
        preemphasis=frames.preemphasis or None, remove_dc_offset=frames.remove_mean,
    )  # fmt: skip
    ours = spectral.power(jnp.stack([SOUND, 2 * SOUND]), frames)
    near(ours[0], reference.T)
    near(ours[1], 4 * reference.T)
    assert frames.count(len(SOUND)) == ours.shape[1]


def test_filter_banks_of_speech2text():
    """Before they are normalised and behind that."""
    ours = jax.jit(spectral.kaldi_filter_banks)(SOUND)
    extractor = transformers.Speech2TextFeatureExtractor()
    near(ours, extractor._extract_fbank_features(SOUND))
    normed = extractor(SOUND, sampling_rate=16_000)["input_features"][0]
    near(spectral.normalise(ours, epsilon=0.0), normed, 1e-4)


@pytest.mark.slow
def test_filter_banks_of_ast_and_seamless():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of AST's 128 filters the lowest hold no bin
        ast = transformers.ASTFeatureExtractor(max_length=48, do_normalize=False)
    reference = np.asarray(ast(SOUND, sampling_rate=16_000)["input_values"])[0]
    frames = dataclasses.replace(spectral.KALDI, window="hann", scale=1.0)
    near(spectral.kaldi_filter_banks(SOUND, mels=128, frames=frames), reference)
    seamless = transformers.SeamlessM4TFeatureExtractor()
    near(spectral.kaldi_filter_banks(SOUND), seamless._extract_fbank_features(SOUND))


def test_cepstra_and_slopes():
    banks = spectral.kaldi_filter_banks(SOUND, mels=40)
    reference = scipy.fft.dct(np.asarray(banks, np.float64), type=2, norm="ortho")
    near(spectral.mfcc(banks, 13), reference[:, :13])
    near(spectral.mfcc(banks, 40), reference)
    lifted = reference[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    near(spectral.mfcc(banks, 13, lifter=22.0), lifted)
    line = jnp.arange(9.0)[:, None] * jnp.array([1.0, -3.0])
    slopes = spectral.deltas(line)
    np.testing.assert_allclose(slopes[2:-2], np.broadcast_to([1.0, -3.0], (5, 2)), atol=1e-6)


def test_normalising_counts_what_is_kept():
    features = jax.random.normal(jax.random.key(0), (2, 7, 3)) * 5 + 2
    mask = jnp.arange(7) < jnp.array([7, 4])[:, None]
    ours = spectral.normalise(features, mask, epsilon=0.0)
    alone = np.asarray(features[1, :4])
    near(ours[1, :4], (alone - alone.mean(0)) / alone.std(0))
    assert not np.any(ours[1, 4:])
    assert np.all(np.isfinite(spectral.normalise(jnp.ones((1, 4, 2)))))


def test_wrong_frames_and_filters():
    with pytest.raises(ValueError, match=r"hop=0 .*fft=100 .*window='square' .*preemphasis=1"):
        Frames(400, 0, 100, "square", preemphasis=1)
    with pytest.raises(ValueError, match=r"scale='bark' .*low=9000"):
        spectral.mel_filters(Frames(), 40, 16_000, low=9000, scale="bark")
    with pytest.raises(ValueError, match="100 samples have no frame of 400"):
        spectral.power(jnp.zeros(100), Frames())
    with pytest.raises(ValueError, match="coefficients=41"):
        spectral.mfcc(jnp.zeros((3, 40)), 41)
    with pytest.raises(ValueError, match=r"time_size=-1 .*time_share=2"):
        SpecAugment(time_size=-1, time_share=2)


def test_spec_augment_masks_spans_of_the_sizes_it_says():
    """Over many draws: whole rows and columns, never in padding's stead, as long as allowed."""
    policy = SpecAugment(0, 5, 2, 12, 0.5, 1)
    features = jnp.ones((64, 40, 16))
    lengths = jnp.array([40, 20] * 32)
    run = jax.jit(lambda key: spec_augment(key, features, lengths, policy))
    sizes, shares = [], []
    for seed in range(8):
        y = np.asarray(run(jax.random.key(seed)))
        in_time = (y == 0).all(axis=2)
        in_bins = (y == 0).all(axis=1)
        np.testing.assert_array_equal(y == 0, in_time[:, :, None] | in_bins[:, None])
        assert not in_time[1::2, 20:].any()
        assert in_bins.sum(axis=1).max() <= 10
        for row, limit in ((0, 12), (1, 10)):
            counts = in_time[row::2].sum(axis=1)
            assert counts.max() <= limit
            steps = np.diff(np.pad(in_time[row::2], ((0, 0), (1, 1))).astype(int), axis=1)
            np.testing.assert_array_equal((steps == 1).sum(axis=1), counts > 0)  # one span
        sizes += in_time[::2].sum(axis=1).tolist()
        shares.append((y == 0).mean())
    assert set(sizes) == set(range(13))  # every size is drawn
    assert len(set(shares)) == 8
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))


@pytest.mark.slow
def test_time_warp_moves_frames_and_keeps_their_order():
    policy = dataclasses.replace(POLICIES["LB"], time_warp=8, frequency_masks=0, time_masks=0)
    ramp = jnp.broadcast_to(jnp.arange(60.0)[:, None], (16, 60, 2))
    lengths = jnp.array([60, 50, 16, 40] * 4)
    y = np.asarray(spec_augment(jax.random.key(0), ramp, lengths, policy))[..., 0]
    for row, length in zip(y, np.asarray(lengths), strict=True):
        assert np.all(np.diff(row[:length]) >= 0)
        np.testing.assert_allclose(row[[0, length - 1]], [0, length - 1], atol=1e-4)
        np.testing.assert_array_equal(row[length:], np.arange(length, 60))
        moved = np.abs(row[:length] - np.arange(length)).max()
        assert moved <= 8 + 1e-3
        assert (moved > 1e-3) == (length > 16)


@pytest.mark.slow
def test_speeds_are_resamplings():
    """A sound at 1.1 times the speed is one of 11 kHz at 10 kHz, and its tones are higher."""
    time = np.arange(4_000) / 16_000
    tones = np.sin(2 * np.pi * 440 * time) + 0.5 * np.sin(2 * np.pi * 3_000 * time)
    short = np.where(np.arange(4_000) < 3_000, tones, 0)
    x = jnp.asarray(np.stack([tones, tones, short]), jnp.float32)
    lengths, factors = jnp.array([4_000, 4_000, 3_000]), jnp.array([1.1, 0.9, 1.1])
    y, new = jax.jit(change_speed, static_argnums=3)(x, lengths, factors, 4_445)
    assert new.tolist() == [3_637, 4_445, 2_728]
    for row, (old, rate) in enumerate(((11_000, 10_000), (9_000, 10_000))):
        expected = resample(np.asarray(x[row]), old, rate)[: new[row]]
        inner = slice(100, len(expected) - 100)
        np.testing.assert_allclose(y[row, : new[row]][inner], expected[inner], atol=1e-3)
    np.testing.assert_allclose(y[2, :2_500], y[0, :2_500], atol=1e-4)
    assert not np.any(y[2, 2_728:])
    same, kept = perturb_speed(jax.random.key(0), x, lengths, factors=(1.0,))
    np.testing.assert_allclose(same, x, atol=1e-5)
    np.testing.assert_array_equal(kept, lengths)
    with pytest.raises(ValueError, match=r"factors=\(3.0,\)"):
        perturb_speed(jax.random.key(0), x, lengths, factors=(3.0,))
