"""Rooms and channels: what they do to tones, silence and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.data.audio_rooms import (
    Rooms,
    surround,
    through,
    warp_frequencies,
    with_noise,
    without_silence,
)

RATE = 8_000
NONE = Rooms(
    silence=(0, 0), echo=(0, 0), tilt=(0, 0), low=(0, 0), high=(9, 9), speakers=(1, 1)
)  # fmt: skip


def tones(*hertz, seconds=0.25):
    time = np.arange(int(seconds * RATE)) / RATE
    return np.stack([np.sin(2 * np.pi * f * time) for f in hertz]).astype(np.float32)


def level(x):
    """Decibels, away from the ends."""
    return 10 * np.log10(np.square(np.asarray(x))[:, 400:-400].mean(axis=1))


def test_silence_surrounds_a_sound():
    sounds = tones(300, 500)
    sounds[1, 1000:] = 0
    lengths = jnp.array([2000, 1000])
    moved, new = surround(jax.random.key(0), sounds, lengths, RATE, (0.01, 0.1))
    assert moved.shape == (2, 2000 + 1600)
    for row, length in ((0, 2000), (1, 1000)):
        first = int(np.flatnonzero(moved[row])[0]) - 1  # sines begin with 0
        np.testing.assert_array_equal(moved[row, first : first + length], sounds[row, :length])
        assert 80 <= first <= 800
        assert 80 <= int(new[row]) - first - length <= 800
        assert not np.asarray(moved[row, first + length :]).any()


def test_channels_do_to_tones_what_they_say():
    sounds = tones(250, 500, 2000)
    same = through(jax.random.key(0), sounds, RATE, NONE)
    np.testing.assert_allclose(same, sounds, atol=1e-4)
    tilted = through(jax.random.key(0), sounds, RATE, Rooms(**vars(NONE) | {"tilt": (3, 3)}))
    np.testing.assert_allclose(level(tilted) - level(sounds), [-3, 0, 6], atol=0.2)
    narrow = Rooms(**vars(NONE) | {"low": (500, 500), "high": (0.25, 0.25)})
    passed = level(through(jax.random.key(0), sounds, RATE, narrow)) - level(sounds)
    np.testing.assert_allclose(passed, [-12.3, -3.0, -72.3], atol=0.3)
    echoing = Rooms(**vars(NONE) | {"echo": (0.5, 0.5), "reverberation": (0.2, 0.2)})
    click = np.zeros((1, 4000), np.float32)
    click[0, 10] = 1
    heard = np.asarray(through(jax.random.key(1), click, RATE, echoing))[0]
    assert heard[10] == pytest.approx(1, abs=1e-3)
    assert np.square(heard[11:]).sum() == pytest.approx(0.5, abs=0.01)
    early, late = (np.square(heard[a:b]).sum() for a, b in ((11, 411), (811, 1211)))
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=3)  # 0.1 s of 0.2 s


def test_noise_is_so_much_below():
    sounds = np.pad(tones(300, 700, 900, 1100), ((0, 0), (0, 500)))
    lengths = jnp.full(4, 2000)
    noisy = np.asarray(with_noise(jax.random.key(0), sounds, lengths, (20, 20)))
    assert not noisy[:, 2000:].any()
    np.testing.assert_allclose(level(noisy - sounds)[0] - level(sounds)[0], -20, atol=1.5)


def test_frequencies_are_moved():
    powers = np.zeros((2, 3, 101), np.float32)
    powers[:, :, 40] = 1
    warped = np.asarray(warp_frequencies(jnp.asarray(powers), jnp.array([1.25, 1.0])))
    assert warped[0].argmax(axis=1).tolist() == [50] * 3
    np.testing.assert_array_equal(warped[1], powers[1])


def test_silence_is_cut_off():
    sound = np.concatenate([np.zeros(900), tones(400)[0], 1e-3 * tones(50)[0]]).astype(np.float32)
    cut = without_silence(sound, RATE)
    assert 2000 <= len(cut) <= 2000 + 2 * 160 + 80
    assert without_silence(np.zeros(50, np.float32), RATE).shape == (50,)


def test_bad_ranges_are_named():
    with pytest.raises(ValueError, match=r"echo=\(-1, 0\) must be at least 0"):
        Rooms(echo=(-1, 0))
    with pytest.raises(ValueError, match=r"noise=\(3, 1\)"):
        Rooms(noise=(3, 1))
