"""Weights in 8 or 4 bits: rounded after training, trained beside (QLoRA), or trained for it.

Weight-only: layers make arrays of the integers where they need them, and compute as before. Groups
of numbers that share a scale run along a kernel's input features, as in Dettmers et al. 2022,
arXiv:2208.07339 (one group a column, section 3), and Dettmers et al. 2023, "QLoRA",
arXiv:2305.14314 (blocks of 64, whose NF4 is ``normal=True`` here); along the width of tables.

What is quantised does not train. For QLoRA add adapters with `fmjax.methods.lora` and train these;
`is_float` tells what else can. `fmjax.save` takes plain arrays alone
(`fmjax.nn.compact.whole_arrays`); `fmjax.methods.compressed_files` writes the integers.

Activations stay in floating point. For products of int8 or float8 in training see
`fmjax.train.quantized_products`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.weight_matrices import HEAD, KERNELS, matrices
from fmjax.nn.compact import Quantized, in_groups, normal_levels, packed
from fmjax.tree import flatten, unflatten
from fmjax.types import Aux, Batch, LossFn, Variables

ATTACHES = ("variables", "loss")


def quantize(
    variables: Variables,
    *,
    bits: int,
    group: int | None = None,
    normal: bool = False,
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> Variables:
    """Variables with some leaves as integers: each number is rounded to its group's nearest level.

    Levels are ``-(2 ** (bits - 1) - 1) ... 2 ** (bits - 1) - 1`` times the scale, at which the
    group's largest magnitude has the last one: no number is further off than half the scale.

    Args:
        variables: of a model; scanned or not.
        bits: 8 or 4.
        group: how many numbers share a scale, 32, 64 or 128 usually; None is a whole column of a
            kernel, or row of a table.
        normal: 16 levels that are even in probability for normally distributed weights (NF4); then
            `bits` is 4.
        targets: globs over paths of leaves, such as "params/*/kernel" and "params/embed/*".
        but: globs of those that stay as they are; by default the head.

    Raises:
        ValueError: numbers that do not fit, or targets that cannot be quantised; all are listed.
    """
    problems = [] if bits in (4, 8) else [f"bits={bits} must be 8 or 4"]
    if normal and bits != 4:
        problems.append(f"normal=True has 16 levels: bits={bits} must be 4")
    chosen = _targets(variables, targets, but, group, problems, even=bits == 4)
    return unflatten(
        flatten(variables)
        | {path: _quantized(path, leaf, bits, group, normal) for path, leaf in chosen.items()}
    )


def _targets(
    variables: Variables,
    targets: Sequence[str],
    but: Sequence[str],
    group: int | None,
    problems: Sequence[str] = (),
    *,
    even: bool = False,
) -> dict[str, Any]:
    """The leaves that match, by path; raises `problems` and its own."""
    chosen, wrong = matrices(variables, targets, but)
    wrong = [*problems, *wrong]
    for path, leaf in () if wrong else chosen.items():
        count = leaf.shape[_axis(path)]
        size = count if group is None else group
        if size < 2 or count % size or (even and count % 2):
            wrong.append(
                f"{path} {leaf.shape}: groups of {size} do not fill its {count} features"
                + (", of which 4 bits need an even number" if even else "")
                + "; choose another group, or leave it out by but="
            )
    if wrong:
        raise ValueError("quantisation:\n  " + "\n  ".join(wrong))
    return chosen


def _axis(path: str) -> int:
    return -1 if path.endswith("/embedding") else -2


def _quantized(path: str, leaf: Array, bits: int, group: int | None, normal: bool) -> Quantized:
    axis = _axis(path)
    groups = in_groups(leaf, _count(leaf, axis, group), axis).astype(jnp.float32)
    scales = _scales(groups, axis, 1.0 if normal else _highest(bits)).astype(leaf.dtype)
    # Rounded to what the scale became in the leaf's own precision.
    units = _divided(groups, jnp.expand_dims(scales, axis).astype(jnp.float32))
    if normal:
        levels = jnp.asarray(normal_levels())
        codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, units) - 8
    else:
        codes = jnp.clip(jnp.round(units), -_highest(bits), _highest(bits))
    codes = codes.reshape(leaf.shape).astype(jnp.int8)
    return Quantized(codes if bits == 8 else packed(codes, axis), scales, bits, axis, normal)


def _count(leaf: Array, axis: int, group: int | None) -> int:
    return 1 if group is None else leaf.shape[axis] // group


def _highest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _scales(groups: Array, axis: int, highest: float) -> Array:
    return jnp.max(jnp.abs(groups), axis=axis) / highest


def _divided(values: Array, scales: Array) -> Array:
    """Multiples of the scales; 0 in a group of zeros."""
    return values / jnp.where(scales == 0, 1.0, scales)


def is_float(variables: Variables) -> Callable[[str], bool]:
    """What can train: ``is_trainable`` of `fmjax.train.init_state`, of parameters alone."""
    flat = flatten(variables)
    return lambda path: path.startswith("params/") and not isinstance(flat[path], Quantized)


def sizes(variables: Variables) -> Mapping[str, int]:
    """Bytes of what is quantised, of the other leaves, and of all as they were ("before")."""
    leaves = flatten(variables).values()
    small = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    kept = sum(leaf.nbytes for leaf in small)
    other = sum(leaf.nbytes for leaf in leaves) - kept
    before = other + sum(leaf.size * leaf.dtype.itemsize for leaf in small)
    return {"quantised": kept, "other": other, "before": before}


def straight_through(weights: Array, *, bits: int, group: int | None = None, axis: int = -2):
    """The weights as `quantize` rounds them, with the gradient of the weights themselves.

    Bengio et al. 2013, arXiv:1308.3432: rounding counts as the identity. As scales are
    the largest magnitudes, no weight lies outside the levels, where Jacob et al. 2018 (eq. 12)
    would clip.

    Args:
        weights: [..., I, O].
        bits: 2 to 16.
        group: as in `quantize`.
        axis: along which groups run.
    """
    groups = in_groups(weights, _count(weights, axis, group), axis).astype(jnp.float32)
    scales = jnp.expand_dims(_scales(groups, axis, _highest(bits)), axis)
    rounded = (jnp.round(_divided(groups, scales)) * scales).reshape(weights.shape)
    # Exactly what is rounded, and a 0 whose gradient is that of the weights.
    rounded = jax.lax.stop_gradient(rounded.astype(weights.dtype))
    return rounded + (weights - jax.lax.stop_gradient(weights))


def quantization_aware(
    loss: LossFn,
    *,
    bits: int,
    group: int | None = None,
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> LossFn:
    """The loss of the weights as they will be rounded, by which the weights themselves train.

    Jacob et al. 2018, arXiv:1712.05877, section 3, for weights: "simulated quantization" in the
    forward pass, by `straight_through`. `quantize` with the same arguments makes what was trained.

    Args:
        loss: any; computed in float32 or, `cast` outside of this, in less.
        bits: 2 to 16.
        group, targets, but: as in `quantize`.

    Raises:
        ValueError: numbers out of range; when called, targets that cannot be quantised.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits} must be 2 to 16")

    def aware(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        chosen = _targets(variables, targets, but, group)
        rounded = {
            path: straight_through(leaf, bits=bits, group=group, axis=_axis(path))
            for path, leaf in chosen.items()
        }
        return loss(unflatten(flatten(variables) | rounded), batch, rng)

    return aware
