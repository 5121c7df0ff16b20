"""Differentially private training: DP-SGD, whose gradient is clipped example by example.

Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv:1607.00133, Algorithm 1. What a
step tells about any one example is bounded by its clipped gradient and drowned in noise; how much
all steps tell is counted by `fmjax.methods.accounting`, for batches in which every example takes
part independently with the same probability (`fmjax.data.sampled.sampled_batches`).

Only the gradient is private. The loss, the metrics and an evaluation on the training examples are
computed from them without noise: what is published of these is outside the guarantee, and so is an
optimizer that reads the loss (``optax.contrib.reduce_on_plateau``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.tasks.apply import row_weights
from fmjax.train.step import gradient
from fmjax.tree import flatten, unflatten
from fmjax.types import Aux, Batch, GradFn, LossFn, Mean, PyTree, Variables

ATTACHES = ("gradient",)


class Clip(Protocol):
    """(tree, bound) -> (the tree with a global norm of at most `bound`, its norm before)."""

    def __call__(self, tree: Variables, bound: float) -> tuple[Variables, Array]: ...


def clip_by_norm(tree: Variables, bound: float) -> tuple[Variables, Array]:
    """Scales down what is longer than `bound` (arXiv:1607.00133, Algorithm 1, "Clip gradient")."""
    norm = optax.tree.norm(tree)
    return _scaled(tree, jnp.minimum(1.0, bound / jnp.maximum(norm, _TINY))), norm


def clip_per_layer(tree: Variables, bound: float) -> tuple[Variables, Array]:
    """Clips each of m modules (a kernel and its bias) to ``bound / sqrt(m)``.

    McMahan et al. 2018, arXiv:1710.06963, section 3.1, "per-layer clipping": layers with large
    gradients no longer scale down the others.
    """
    groups: dict[str, dict[str, Array]] = {}
    for path, leaf in flatten(tree).items():
        groups.setdefault(path.rpartition("/")[0], {})[path] = leaf
    share = bound / math.sqrt(len(groups))
    flat: dict[str, Array] = {}
    for group in groups.values():
        flat |= clip_by_norm(group, share)[0]
    return unflatten({path: flat[path] for path in flatten(tree)}), optax.tree.norm(tree)


def clip_automatically(
    tree: Variables, bound: float, stability: float = 0.01
) -> tuple[Variables, Array]:
    """Scales every gradient to almost `bound`: ``bound * g / (norm + stability)``.

    Bu et al. 2022, "Automatic Clipping", arXiv:2206.07136, equation 4 (AUTO-S): the bound is then
    no more than a factor of the learning rate, and need not be searched for.

    Raises:
        ValueError: an infinite bound, to which nothing can be scaled.
    """
    if not math.isfinite(bound):
        raise ValueError(f"the bound is {bound}: automatic clipping scales to it, so give a number")
    norm = optax.tree.norm(tree)
    return _scaled(tree, bound / (norm + stability)), norm


_TINY = 1e-30


def private_gradient(
    loss_fn: LossFn,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    microbatch_size: int = 8,
    clip: Clip = clip_by_norm,
    axis_name: str | None = None,
) -> GradFn:
    """The clipped gradients of all examples, summed, with Gaussian noise (Algorithm 1).

    ``(sum_i clip(weight_i * g_i) + noise_multiplier * clip_norm * normal) / expected_batch_size``,
    where ``g_i`` is the gradient of the loss of example i alone. A row of weight 0 adds nothing,
    and neither does one whose gradient is not finite. Divided is by the expected number of
    examples, as the actual one would tell who takes part.

    The noise is drawn from the step's key once, whatever the microbatches; dropout draws from keys
    of each row's own. The noise must come once a step, so this gradient is not to be accumulated,
    and is averaged over devices by itself, by `axis_name`.

    Metrics, beside the loss's own: ``clipped``, the share of examples longer than `clip_norm`, and
    ``example_norm``, their mean norm. They are not private.

    Args:
        loss_fn: a mean over examples, each of which it can be called with alone.
        clip_norm: C, the bound of an example's gradient in global norm over all trainable leaves;
            infinity for none.
        noise_multiplier: standard deviation of the noise in units of `clip_norm`; see
            `fmjax.methods.accounting.noise_for`.
        expected_batch_size: sampling rate times the number of examples.
        microbatch_size: examples whose gradients are in memory at once. Microbatches of padding
            alone are skipped.
        clip: `clip_by_norm`, `clip_per_layer`, `clip_automatically`, or another with their bound.
        axis_name: the mapped axis of pmap or shard_map over which the batch is spread; the noise
            is the same on all devices, and the result that of one device. `pmap_step` takes such a
            gradient, too.

    Raises:
        ValueError: an argument out of its range; when called, a batch smaller than is expected (as
            within `accumulate`) or that microbatches do not divide, a mapped axis that is not
            `axis_name`, no key, or a loss with running statistics.
    """
    problems = [
        f"{name}={value} must be {rule}"
        for name, value, rule, right in [
            ("clip_norm", clip_norm, "above 0", clip_norm > 0),
            ("noise_multiplier", noise_multiplier, "at least 0", noise_multiplier >= 0),
            ("expected_batch_size", expected_batch_size, "above 0", expected_batch_size > 0),
            ("microbatch_size", microbatch_size, "at least 1", microbatch_size >= 1),
        ]
        if not right
    ]
    problems += noise_problems(noise_multiplier, clip_norm)
    if problems:
        raise ValueError("; ".join(problems))
    summed = clipped_sum(loss_fn, clip_norm=clip_norm, microbatch_size=microbatch_size, clip=clip)

    def grad_fn(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        rows, first = next(iter(batch.values())).shape[0], 0
        _check_axes(axis_name)
        noise_key = example_key = None
        if rng is not None:
            noise_key, example_key = jax.random.split(
                rng if axis_name is None else _same(rng, axis_name)
            )
        elif noise_multiplier:
            raise ValueError("rng is None, but noise_multiplier > 0 needs a key: give the step's")
        devices = 1
        if axis_name is not None:
            devices = jax.lax.axis_size(axis_name)
            first = jax.lax.axis_index(axis_name) * rows
        if rows * devices < expected_batch_size:
            raise ValueError(
                f"the batch has {rows * devices} rows, fewer than expected_batch_size="
                f"{expected_batch_size}: a private gradient takes the whole batch at once, so do "
                "not accumulate it (microbatch_size bounds the memory instead)"
            )
        sums, loss, aux = summed(trainable, non_trainable, batch, example_key, first)
        if axis_name is not None:
            sums, loss, aux = jax.lax.psum((sums, loss, aux), axis_name)
        if noise_multiplier:
            assert noise_key is not None
            sums = add_noise(sums, noise_key, noise_multiplier * clip_norm)
        grads = jax.tree.map(
            lambda leaf, x: (x / expected_batch_size).astype(leaf.dtype), trainable, sums
        )
        return grads, loss / jnp.where(aux.weight == 0, 1.0, aux.weight), aux

    return grad_fn


def noise_problems(noise_multiplier: float, clip_norm: float) -> list[str]:
    """What is wrong with noise of so many bounds."""
    if noise_multiplier and not (math.isfinite(noise_multiplier) and math.isfinite(clip_norm)):
        return [
            f"noise_multiplier={noise_multiplier} with clip_norm={clip_norm}: noise is relative to "
            "the bound, so both must be finite"
        ]
    return []


def _check_axes(axis_name: str | None) -> None:
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if axis_name is None and mapped:
        raise ValueError(
            f"a private gradient is mapped over {mapped}, where every device would add noise of "
            f"its own: give private_gradient(axis_name={mapped[0]!r})"
        )


def _same(rng: Array, axis_name: str) -> Array:
    """The first device's key: `all_reduce` (and so `pmap_step`) gives each device one of its own.

    With it the noise, and so the gradient, is the same everywhere, and averaging it once more
    changes nothing.
    """
    data = jax.random.key_data(rng)
    first = jnp.where(jax.lax.axis_index(axis_name) == 0, data, jnp.zeros_like(data))
    return jax.random.wrap_key_data(jax.lax.psum(first, axis_name), impl=jax.random.key_impl(rng))


def clipped_sum(
    loss_fn: LossFn, *, clip_norm: float, microbatch_size: int, clip: Clip = clip_by_norm
) -> Callable[..., tuple[Variables, Array, Aux]]:
    """The sum in `private_gradient`, without noise: one example changes it by `clip_norm` at most.

    Args:
        loss_fn, clip_norm, microbatch_size, clip: as there.

    Returns:
        ``(trainable, non_trainable, batch, rng, first=0) -> (sums, loss, Aux)``: float32, and the
        loss too is a sum, weighted by the examples' `Aux.weight`. Row i draws from
        ``fold_in(rng, first + i)``.
    """
    grad_fn = gradient(loss_fn)

    def summed(
        trainable: Variables,
        non_trainable: Variables,
        batch: Batch,
        rng: Array | None,
        first: Array | int = 0,
    ) -> tuple[Variables, Array, Aux]:
        rows = next(iter(batch.values())).shape[0]
        if rows % microbatch_size:
            raise ValueError(
                f"the batch has {rows} rows, no multiple of microbatch_size={microbatch_size}; "
                "choose a batch size that is"
            )
        weights = row_weights(batch, rows)  # [B]

        def one(row: tuple[Any, Array, Array]) -> tuple[Variables, Array, Aux]:
            example, place, weight = row
            key = None if rng is None else jax.random.fold_in(rng, place)
            alone = {name: leaf[None] for name, leaf in example.items()}
            grads, loss, aux = grad_fn(trainable, non_trainable, alone, key)
            _check_updates(aux)
            counts = weight != 0
            # Weighted before it is clipped: no weight makes an example count for more.
            grads = jax.tree.map(
                lambda g: jnp.where(counts, g.astype(jnp.float32) * weight, 0.0), grads
            )
            clipped, norm = clip(grads, clip_norm)
            clipped = jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g, 0.0), clipped)
            metrics = {
                **aux.metrics,
                "clipped": Mean.of(norm > clip_norm, counts),
                "example_norm": Mean.of(norm, counts),
            }
            loss = jnp.where(counts, loss * aux.weight, 0.0)
            return clipped, loss, Aux(aux.weight, metrics, {})

        places = first + jnp.arange(rows)
        return sum_over(one, (dict(batch), places, weights), weights != 0, microbatch_size)

    return summed


def _check_updates(aux: Aux) -> None:
    if running := sorted(flatten(aux.updates)):
        raise ValueError(
            f"the loss updates {running[:3]}: batch normalisation mixes examples, so what one of "
            "them tells is not bounded by its clipped gradient; take a model with layer or group "
            "normalisation, or a loss with train=False, which leaves the statistics as they are"
        )


def sum_over(fn: Callable[[Any], PyTree], rows: PyTree, active: Array, chunk_size: int) -> PyTree:
    """The sum of ``fn(row)`` over rows, of which `chunk_size` are in memory at once.

    Args:
        fn: of one row, without its leading axis; arrays whose sum is meant.
        rows: leaves [N, ...].
        active: bool [N]; chunks in which no row is are skipped, and count as zeros.
        chunk_size: rows of a vmap, a divisor of N.
    """
    chunks = jax.tree.map(
        lambda x: jnp.reshape(x, (-1, chunk_size, *x.shape[1:])), (rows, active)
    )  # [N / chunk, chunk, ...]

    def total(chunk: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(fn)(chunk))

    abstract = jax.eval_shape(total, jax.tree.map(lambda x: x[0], chunks[0]))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)

    def body(sums: PyTree, chunk: tuple[PyTree, Array]) -> tuple[PyTree, None]:
        some, here = chunk
        more = jax.lax.cond(jnp.any(here), total, lambda _: zeros, some)
        return jax.tree.map(jnp.add, sums, more), None

    return jax.lax.scan(body, zeros, chunks)[0]


def add_noise(tree: Variables, rng: Array, std: float | Array) -> Variables:
    """The tree with independent Gaussian noise of that standard deviation on every number."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(rng, len(leaves))
    noisy = [
        leaf + std * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def _scaled(tree: Variables, factor: Array) -> Variables:
    return jax.tree.map(lambda leaf: leaf * factor, tree)
