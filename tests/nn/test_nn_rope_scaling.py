"""Rotary scaling against transformers' ROPE_INIT_FUNCTIONS, every type and option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fmjax.config import _read, config_to_json
from fmjax.nn.position import (
    RopeScaling,
    inverse_frequencies,
    rotary_tables,
    scaled_frequencies,
    scaled_rotary,
    sinusoids_of,
)

SHORT, LONG = tuple(1.0 + 0.1 * i for i in range(8)), tuple(1.0 + 2.5 * i for i in range(8))
CASES = [
    RopeScaling("linear", factor=3.0),
    RopeScaling("dynamic", factor=2.5),
    RopeScaling("yarn", factor=4.0),
    RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=6, beta_slow=2),
    RopeScaling("yarn", factor=8, original_max_position_embeddings=16, truncate=False),
    RopeScaling("yarn", factor=16, attention_factor=0.7),
    RopeScaling("yarn", factor=40, mscale=0.707, mscale_all_dim=1.5),
    RopeScaling("longrope", short_factor=SHORT, long_factor=LONG, factor=2.0),
    RopeScaling(
        "longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=16
    ),
    RopeScaling("longrope", short_factor=SHORT, long_factor=LONG, attention_factor=1.3),
    RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
]  # fmt: skip


def reference(scaling, theta, length):
    """transformers' frequencies for heads of 16 and 64 positions."""
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_theta=theta,
        rope_scaling=config_to_json(dataclasses.make_dataclass("C", ["s"])(scaling), {})["s"],
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, "cpu", seq_len=length)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("scaling", CASES, ids=lambda s: s.rope_type)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_equals_transformers(scaling, theta):
    def ours(length):
        return scaled_frequencies(16, theta, scaling, max_positions=64, length=length)

    traced = jax.jit(lambda length: ours(length)[0])
    for length in (None, 5, 16, 17, 64, 65, 333):
        frequencies, factor = ours(length)
        theirs, their_factor = reference(scaling, theta, length)
        # Rounding of float32, twice: powers and quotients.
        np.testing.assert_allclose(frequencies, theirs, rtol=3e-7)
        assert factor == pytest.approx(their_factor, rel=1e-12)
        if length is not None:
            np.testing.assert_allclose(traced(length), theirs, rtol=1e-6)


def test_lengths_matter_where_they_should():
    for scaling in CASES:
        near, far = (
            scaled_frequencies(16, 1e4, scaling, max_positions=64, length=length)[0]
            for length in (9, 4000)
        )
        assert np.allclose(near, far) == (scaling.rope_type not in ("dynamic", "longrope"))


def test_tables_of_far_positions_equal_pytorch():
    """The rounding of a frequency counts 131,071 times."""
    positions = np.array([[0, 1, 131_071]])
    cos, sin = scaled_rotary(positions, 64, 500000.0, max_positions=131_072)
    exponents = torch.arange(0, 64, 2, dtype=torch.float) / 64
    frequencies = 1.0 / 500000.0**exponents
    angles = torch.tensor(positions)[..., None].float() * frequencies
    np.testing.assert_array_equal(inverse_frequencies(64, 500000.0), frequencies.numpy())
    np.testing.assert_allclose(cos, angles.cos().numpy(), atol=1e-6)
    np.testing.assert_allclose(sin, angles.sin().numpy(), atol=1e-6)


def test_tables_read_the_length_from_the_positions():
    scaling = RopeScaling("dynamic", factor=2.0)
    positions = jnp.array([[0, 1, 2], [97, 98, 99]])
    frequencies, factor = scaled_frequencies(16, 1e4, scaling, max_positions=64, length=100)
    ours = scaled_rotary(positions, 16, 1e4, scaling, max_positions=64)
    theirs = rotary_tables(positions, frequencies, factor)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_both_spellings_are_one():
    assert RopeScaling(type="linear", factor=2.0) == RopeScaling("linear", factor=2.0)
    assert RopeScaling(type="su", short_factor=SHORT, long_factor=LONG).rope_type == "longrope"
    read = _read({"type": "yarn", "factor": 4, "truncate": False}, RopeScaling | None)
    assert read == RopeScaling("yarn", factor=4, truncate=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope'; known are"),
        ({"rope_type": "linear"}, "linear needs factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "linear does not read beta_fast"),
        ({"rope_type": "dynamic", "factor": 0.0}, "factor=0.0 must be a positive"),
        ({"rope_type": "linear", "factor": "2"}, "factor='2' must be a positive number"),
        ({"rope_type": "yarn", "factor": 2, "attention_factor": -1}, "attention_factor=-1 must be"),
        ({"rope_type": "yarn"}, "yarn needs factor or original_max_position_embeddings"),
        ({"rope_type": "longrope", "factor": 2.0}, "needs short_factor; longrope needs long_fac"),
        (
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 2},
            "must differ",
        ),
    ],
)
def test_bad_scalings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        RopeScaling(**fields)


def test_factors_must_fit_the_head():
    scaling = RopeScaling("longrope", short_factor=SHORT, long_factor=LONG)
    assert scaling.size_problems(16) == []
    assert "long_factor has 8 numbers; 18 rotated" in scaling.size_problems(18)[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rotated(2, 1e4, RopeScaling("dynamic", factor=2.0)), "more than the 2 rotated"),
        (lambda: rotated(16, 1.0, RopeScaling("yarn", factor=2.0)), "theta=1.0 must be above 1"),
        (lambda: rotated(16, 1e4, CASES[7], 1), "an original context above 1 position"),
        (lambda: sinusoids_of(jnp.arange(3), 3), "width=3 must be at least 4"),
    ],
)
def test_what_would_divide_by_zero_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def rotated(size, theta, scaling, max_positions=64):
    return scaled_frequencies(size, theta, scaling, max_positions=max_positions, length=70)
