"""Positions: rotary tables, their scaling, sinusoids, ALiBi slopes, relative buckets."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

# By type, the fields that must be there and those that may.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("finetuned",)),
    "yarn": (
        (),
        ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
         "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",),
    ),
}  # fmt: skip
RENAMED = {"su": "longrope"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its rotary positions: ``rope_scaling`` of config.json.

    Args:
        rope_type: a key of `ROPE_TYPES`.
        type: the older name of `rope_type`; None afterwards.
        factor: by how much the context is longer than that of the first training.
        original_max_position_embeddings: context of the first training, in tokens; None is the
            config's ``max_position_embeddings``.
        attention_factor: of cosines and sines (yarn, longrope); None is the paper's.
        beta_fast, beta_slow: rotations over the original context from which a frequency stays as
            it is, and up to which it is divided by the factor (yarn); None is 32 and 1.
        mscale, mscale_all_dim: of the attention factor (yarn).
        truncate: whether the bounds of yarn's ramp are rounded to whole frequencies; None is true.
        short_factor, long_factor: a divisor for each frequency, up to and beyond the original
            context (longrope).
        low_freq_factor, high_freq_factor: the original context over these are the wavelengths
            from which all and up to which nothing is divided (llama3).
        finetuned: how the model was made; changes nothing.

    Raises:
        ValueError: an unknown type, fields it needs and lacks, or has and does not read.
    """

    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    finetuned: bool | None = None

    def __post_init__(self) -> None:
        kind = self.type if self.rope_type is None else self.rope_type
        kind = "default" if kind is None else RENAMED.get(kind, kind)
        if kind not in ROPE_TYPES:
            raise ValueError(f"has the rope_type {kind!r}; known are {list(ROPE_TYPES)}")
        object.__setattr__(self, "rope_type", kind)
        object.__setattr__(self, "type", None)
        needed, allowed = ROPE_TYPES[kind]
        given = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "rope_type" and (value := getattr(self, field.name)) is not None
        }
        problems = [f"{kind} needs {name}" for name in needed if name not in given]
        problems += [
            f"{kind} does not read {name}" for name in given if name not in needed + allowed
        ]
        numbers = {
            name: given[name]
            for name in ("factor", "original_max_position_embeddings", "attention_factor",
                         "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
            if name in given
        }  # fmt: skip
        problems += [
            f"{name}={value!r} must be a positive number"
            for name, value in numbers.items()
            if not (isinstance(value, int | float | np.number) and value > 0)
        ]
        if kind == "yarn" and not given.keys() & {"factor", "original_max_position_embeddings"}:
            problems.append("yarn needs factor or original_max_position_embeddings")
        if kind == "llama3" and not problems and self.low_freq_factor == self.high_freq_factor:
            problems.append("low_freq_factor and high_freq_factor must differ")
        if problems:
            raise ValueError("is wrong: " + "; ".join(problems))

    def size_problems(self, size: int) -> list[str]:
        """What does not fit `size` rotated features a head."""
        problems = [
            f"rope_scaling.{name} has {len(factors)} numbers; {size} rotated features of a head "
            f"need {(size + 1) // 2}"
            for name, factors in (
                ("short_factor", self.short_factor), ("long_factor", self.long_factor)
            )
            if factors is not None and len(factors) != (size + 1) // 2
        ]  # fmt: skip
        if self.rope_type == "dynamic" and size < 3:
            problems.append(
                f"dynamic rope_scaling needs more than the {size} rotated features of a head"
            )
        return problems


def inverse_frequencies(size: int, theta: float) -> np.ndarray:
    """theta^(-2i / size) for i = 0 .. size / 2 - 1: float32 [size / 2].

    Far positions multiply the rounding of these numbers, so they are made in numpy, the same on
    every device.
    """
    return (np.float32(1.0) / _periods(size, theta)).astype(np.float32)


def _periods(size: int, theta: float) -> np.ndarray:
    """theta^(2i / size): float32 [size / 2]; exponents are rounded as in PyTorch."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def scaled_frequencies(
    size: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    max_positions: int,
    length: Array | int | None = None,
) -> tuple[Array | np.ndarray, float]:
    """The frequencies that rotary positions turn with, stretched for longer contexts.

    Linear and dynamic: Chen et al. 2023, arXiv:2306.15595, and "NTK-aware" scaling; yarn: Peng et
    al. 2023, arXiv:2309.00071, eq. 13 to 17 and 22; longrope: Ding et al. 2024, arXiv:2402.13753;
    llama3: Grattafiori et al. 2024, arXiv:2407.21783.

    Args:
        size: R, how many features of a head are rotated.
        theta: base of the wavelengths.
        scaling: None is none.
        max_positions: the config's ``max_position_embeddings``.
        length: positions seen, int []; may be traced. Only dynamic and longrope depend on it; None
            is the original context.

    Returns:
        (radians per position, float32 [R / 2]; the factor of cosines and sines).

    Raises:
        ValueError: the scaling does not fit these numbers.
    """
    kind = "default" if scaling is None else scaling.rope_type
    plain = inverse_frequencies(size, theta)
    if scaling is None or kind == "default":
        return plain, 1.0
    original = scaling.original_max_position_embeddings or max_positions
    factor = scaling.factor
    problems = scaling.size_problems(size)
    if kind == "yarn" and theta <= 1:
        problems.append(f"theta={theta} must be above 1 for yarn")
    if kind == "longrope" and original < 2:
        problems.append(f"longrope needs an original context above {original} position")
    if problems:
        raise ValueError("; ".join(problems))
    match kind:
        case "linear":
            assert factor is not None
            return plain / np.float32(factor), 1.0
        case "dynamic":
            assert factor is not None
            if length is None:
                return plain, 1.0
            seen = jnp.maximum(length, max_positions) / max_positions
            base = theta * (factor * seen - (factor - 1)) ** (size / (size - 2))
            exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
            return jnp.where(seen > 1, 1.0 / base**exponents, plain), 1.0
        case "yarn":
            return _yarn(size, theta, scaling, factor or max_positions / original, original)
        case "longrope":
            return _longrope(
                size, theta, scaling, factor or max_positions / original, original, length
            )
    return _llama3(plain, scaling, original), 1.0


def _yarn(
    size: int, theta: float, scaling: RopeScaling, factor: float, original: int
) -> tuple[np.ndarray, float]:
    def turning(rotations: float) -> float:
        """The (fractional) index of the frequency that turns so often in the original context."""
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(scaling.beta_fast or 32), turning(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1.0) - np.clip(ramp, 0, 1)
    periods = _periods(size, theta)
    stretched = np.float32(1.0) / (np.float32(factor) * periods)
    frequencies = stretched * (np.float32(1.0) - kept) + np.float32(1.0) / periods * kept

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = scaling.attention_factor
    if attention is None and scaling.mscale and scaling.mscale_all_dim:
        attention = magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return frequencies, magnitude(1.0) if attention is None else attention


def _longrope(
    size: int,
    theta: float,
    scaling: RopeScaling,
    factor: float,
    original: int,
    length: Array | int | None,
) -> tuple[Array | np.ndarray, float]:
    periods = _periods(size, theta)
    short, long = (
        np.float32(1.0) / (np.array(divisors, np.float32) * periods)
        for divisors in (scaling.short_factor, scaling.long_factor)
    )
    attention = scaling.attention_factor
    if attention is None:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return short if length is None else jnp.where(length > original, long, short), attention


def _llama3(plain: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    assert factor is not None
    assert low is not None
    assert high is not None
    rotations = original * plain / np.float32(2 * math.pi)  # over the original context
    smooth = (rotations - np.float32(low)) / np.float32(high - low)
    stretched = plain / np.float32(factor)
    between = (1 - smooth) * stretched + smooth * plain
    return np.where(rotations < low, stretched, np.where(rotations > high, plain, between))


def scaled_rotary(
    position_ids: Array,
    size: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    max_positions: int,
) -> Rotary:
    """Rotary tables for the positions of a call; the length seen is the largest position + 1.

    Args:
        position_ids: int [B, T].
        size, theta, scaling, max_positions: see `scaled_frequencies`.

    Returns:
        (cos, sin), each float32 [B, T, R / 2].
    """
    frequencies, factor = scaled_frequencies(
        size, theta, scaling, max_positions=max_positions, length=jnp.max(position_ids) + 1
    )
    return rotary_tables(position_ids, frequencies, factor)


def rotary_tables(
    position_ids: Array, frequencies: Array | np.ndarray, scale: float = 1.0
) -> Rotary:
    """Cosines and sines of every position's angles (Su et al. 2021, arXiv:2104.09864, eq. 15).

    Args:
        position_ids: int [B, T].
        frequencies: float32 [R / 2], or [B, R / 2].
        scale: factor of both tables (the attention factor of yarn and longrope).

    Returns:
        (cos, sin), each float32 [B, T, R / 2].
    """
    angles = position_ids[..., None].astype(jnp.float32) * frequencies[..., None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


Rotary = tuple[Array, Array]
"""(cos, sin), each float32 [B, T, R / 2]; R may be less than the head size K."""


def rotate(x: Array, rotary: Rotary, *, interleaved: bool = False) -> Array:
    """Turns the first R features of every head by their position's angles.

    Args:
        x: [B, T, H, K], R <= K; features behind the first R stay as they are.
        rotary: see `rotary_tables`.
        interleaved: whether a pair is (2i, 2i + 1), as in GPT-J; otherwise (i, i + R / 2), as in
            Llama.

    Returns:
        [B, T, H, K] in x's dtype; the rotation is computed in float32.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)  # [B, T, 1, R / 2]
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    turned, rest = x32[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin  # [B, T, H, R / 2]
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def sinusoids(length: int, width: int, *, interleaved: bool) -> np.ndarray:
    """Fixed position vectors (Vaswani et al. 2017, section 3.5): float32 [length, width].

    Args:
        length: positions 0 .. length - 1.
        width: D.
        interleaved: sines at even and cosines at odd features, as published; otherwise all sines
            first, as in Marian.
    """
    angles = np.arange(length)[:, None] / np.power(
        10000.0, 2 * (np.arange(width)[None, :] // 2) / width
    )  # [length, D]
    table = np.zeros((length, width), np.float32)
    if interleaved:
        table[:, 0::2], table[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    else:
        middle = (width + 1) // 2
        table[:, :middle], table[:, middle:] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return table


def sinusoids_of(positions: Array, width: int) -> Array:
    """All sines, then all cosines, of wavelengths from 2 pi to 20,000 pi, both included.

    (Vaswani et al. 2017 stop one step earlier.)

    Args:
        positions: int [...].
        width: D; an odd one ends in a zero.

    Returns:
        float32 [..., D].

    Raises:
        ValueError: there is no shortest and longest wavelength in so few features.
    """
    if width < 4:
        raise ValueError(f"width={width} must be at least 4: a sine and a cosine of two waves")
    half = width // 2
    steps = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1))
    angles = positions[..., None].astype(jnp.float32) * np.exp(steps)  # [..., D / 2]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, [(0, 0)] * positions.ndim + [(0, width - 2 * half)])


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of the linear biases (Press et al. 2022, arXiv:2108.12409, section 3): float32 [H].

    For a number of heads that is no power of two, those of the power below and then every other
    one of twice that power, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def geometric(count: int) -> list[float]:
        return [2 ** (-8.0 * (i + 1) / count) for i in range(count)]

    slopes = geometric(power) + geometric(2 * power)[0::2][: num_heads - power]
    return np.array(slopes, np.float32)


def relative_position_buckets(
    relative: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """T5's buckets of relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance`.

    Args:
        relative: int [...], key position minus query position.
        bidirectional: whether keys after the query have buckets of their own.
        num_buckets: in all.
        max_distance: distances from here on share the last bucket.

    Returns:
        int32 [...] in [0, num_buckets).
    """
    offset = jnp.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    ratio = ratio / math.log(max_distance / exact) * (num_buckets - exact)
    far = jnp.minimum(exact + ratio.astype(jnp.int32), num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, far)).astype(jnp.int32)
