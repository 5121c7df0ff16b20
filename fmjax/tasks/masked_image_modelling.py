"""Masked image modelling: the pixels of patches that the model did not see (SimMIM, Xie et al.
2021, arXiv:2111.09886), or the visual tokens that stand for them (BEiT, Bao et al. 2021,
arXiv:2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.data.augment import BatchFn
from fmjax.nn.vision import grid_of, pair, patchify
from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

Size = int | tuple[int, ...]
Shape = tuple[int, ...]


def random_patches(patch_size: Size, *, ratio: float = 0.6, unit: Size = 32) -> BatchFn:
    """Masks squares of the image, drawn alike and without order (SimMIM, section 3.2).

    Args:
        patch_size: pixels of the model's patches, one number or rows and columns.
        ratio: share of the squares that are masked, rounded up.
        unit: pixels of a square, whole patches.

    Returns:
        ``(key, batch) -> batch`` with ``bool_masked_pos`` bool [B, N].

    Raises:
        ValueError: a ratio or squares that cannot be; of the function, images that are not of
            whole squares.
    """
    patch, square = pair(patch_size), pair(unit)
    problems = _ratio_problems(ratio)
    if any(large % small for large, small in zip(square, patch, strict=True)):
        problems.append(f"unit={unit} must be a multiple of patch_size={patch_size}")
    _refuse(problems)

    @partial(jax.jit, static_argnums=1)
    def draw(rng: Array, shape: Shape) -> Array:
        rows, columns = grid_of((shape[1], shape[2]), square)
        if (rows * square[0], columns * square[1]) != shape[1:3]:
            raise ValueError(f"images of {shape[1:3]} are not of whole squares, unit={unit}")
        noise = jax.random.uniform(rng, (shape[0], rows * columns))
        rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
        masked = rank < math.ceil(ratio * rows * columns)
        masked = masked.reshape(-1, rows, columns)
        for axis in (0, 1):
            masked = jnp.repeat(masked, square[axis] // patch[axis], axis=axis + 1)
        return masked.reshape(shape[0], -1)

    return _masks(draw)


def blocks(
    patch_size: Size, *, ratio: float = 0.4, smallest: int = 16, aspect: float = 0.3
) -> BatchFn:
    """Masks rectangles one after another until enough is masked (BEiT, algorithm 1).

    Their sides' ratio is drawn evenly in its logarithm, as the paper's code does, so that none
    lies more often than it stands; a side that is longer than the image's is the image's.

    Args:
        patch_size: pixels of the model's patches, one number or rows and columns.
        ratio: more than this share of the patches is masked.
        smallest: patches of a rectangle at least, but for the last ones, where fewer are missing.
        aspect: the smallest ratio of sides; its inverse is the largest.

    Returns:
        ``(key, batch) -> batch`` with ``bool_masked_pos`` bool [B, N].

    Raises:
        ValueError: numbers that cannot be; of the function, images with too few patches.
    """
    problems = _ratio_problems(ratio)
    if smallest < 1:
        problems.append(f"smallest={smallest} must be positive")
    if not 0 < aspect <= 1:
        problems.append(f"aspect={aspect} must be above 0 and at most 1")
    _refuse(problems)

    def of_image(rng: Array, rows: int, columns: int) -> Array:
        goal = ratio * rows * columns

        def add(state: tuple[Array, Array]) -> tuple[Array, Array]:
            rng, masked = state
            rng, of_area, of_aspect, of_top, of_left = jax.random.split(rng, 5)
            missing = goal - jnp.sum(masked)
            area = smallest + jax.random.uniform(of_area) * (missing - smallest)
            bound = -math.log(aspect)
            tall = jnp.exp(jax.random.uniform(of_aspect, minval=-bound, maxval=bound))
            height = jnp.clip(jnp.round(jnp.sqrt(area * tall)), 1, rows).astype(jnp.int32)
            width = jnp.clip(jnp.round(jnp.sqrt(area / tall)), 1, columns).astype(jnp.int32)
            top = jax.random.randint(of_top, (), 0, rows - height + 1)
            left = jax.random.randint(of_left, (), 0, columns - width + 1)
            x, y = jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]
            inside = (x >= top) & (x < top + height) & (y >= left) & (y < left + width)
            return rng, masked | inside

        state = (rng, jnp.zeros((rows, columns), bool))
        return jax.lax.while_loop(lambda state: jnp.sum(state[1]) <= goal, add, state)[1]

    @partial(jax.jit, static_argnums=1)
    def draw(rng: Array, shape: Shape) -> Array:
        rows, columns = grid_of((shape[1], shape[2]), pair(patch_size))
        if smallest > ratio * rows * columns:
            raise ValueError(
                f"smallest={smallest} is more than the {ratio * rows * columns:g} patches that are "
                f"to be masked of {rows} x {columns}; give a smaller one"
            )
        keys = jax.random.split(rng, shape[0])
        return jax.vmap(lambda key: of_image(key, rows, columns))(keys).reshape(shape[0], -1)

    return _masks(draw)


def _ratio_problems(ratio: float) -> list[str]:
    return [] if 0 < ratio < 1 else [f"ratio={ratio} must be between 0 and 1"]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("masks of patches: " + "; ".join(problems))


def _masks(draw: Callable[[Array, Shape], Array]) -> BatchFn:
    def of_batch(rng: Array, batch: Batch) -> Batch:
        return {**batch, "bool_masked_pos": draw(rng, tuple(batch["pixel_values"].shape))}

    return of_batch


def loss(model: Any, *, masking: BatchFn | None = None, train: bool = True) -> LossFn:
    """How far off the model is in the patches it did not see, averaged over them.

    Of a head that draws pixels the mean absolute error of these; of one that names visual tokens
    the cross-entropy in nats of the batch's ``labels`` int [B, N], a token a patch, of which those
    of masked patches count, and with it ``masked_accuracy``.

    Batches have ``pixel_values`` float [B, X, Y, C], perhaps ``bool_masked_pos`` [B, N], 1 for
    patches that the model does not see, and perhaps ``weight`` [B], 0 for padding rows.

    Args:
        model: with the head ``masked_image_modeling``.
        masking: masks batches without ``bool_masked_pos``, by the loss's key: `random_patches` or
            `blocks`.
        train: whether dropout is on.

    Raises:
        ValueError: the model has another head; of the loss, a batch that lacks something.
    """
    if model.head != "masked_image_modeling":
        raise ValueError(f"the model's head is {model.head!r}; load it as 'masked_image_modeling'")
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if "bool_masked_pos" not in batch:
            if masking is None or rng is None:
                raise ValueError(
                    "which patches are masked is random: give masking and a key, or batches with "
                    "bool_masked_pos"
                )
            rng, key = jax.random.split(rng)
            batch = masking(key, batch)
        output, updates = apply(variables, batch, rng, train=train)
        weights = jnp.asarray(batch["bool_masked_pos"]).astype(jnp.float32)
        weights = weights * row_weights(batch)[:, None]
        if output.reconstruction is not None:
            patch = pair(model.config.patch_size)
            errors = pixel_errors(output.reconstruction, batch["pixel_values"], patch)
            mean, metrics = Mean.of(errors, weights), {}
        else:
            assert output.logits is not None
            mean, metrics = _token_loss(output.logits, batch, weights)
        return mean.value, Aux(mean.weight, metrics, updates)

    return loss_fn


def pixel_errors(reconstruction: Array, pixel_values: Any, patch: tuple[int, int]) -> Array:
    """The mean absolute error of each patch's pixels: [B, N].

    Raises:
        ValueError: the model draws an image of another size.
    """
    pixels = jnp.asarray(pixel_values)
    if reconstruction.shape != pixels.shape:
        raise ValueError(
            f"the model draws images {reconstruction.shape} of images {pixels.shape}; their sides "
            "must be multiples of the config's encoder_stride, which must be that of its last "
            "hidden states"
        )
    errors = jnp.abs(reconstruction.astype(jnp.float32) - pixels.astype(jnp.float32))
    return patchify(errors, patch).mean(axis=-1)


def _token_loss(logits: Array, batch: Batch, weights: Array) -> tuple[Mean, dict[str, Mean]]:
    if "labels" not in batch or batch["labels"].shape != weights.shape:
        raise ValueError(
            f"this head predicts visual tokens: the batch needs labels {weights.shape}, the token "
            "of each patch"
        )
    labels = jnp.asarray(batch["labels"])
    weights = jnp.where(labels < 0, 0.0, weights)  # -100 is of no token, as in PyTorch
    labels = jnp.maximum(labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [B, N]
    right = jnp.argmax(logits, axis=-1) == labels
    return Mean.of(losses, weights), {"masked_accuracy": Mean.of(right, weights)}


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch with bool_masked_pos) ->`` images [B, X, Y, C], seen pixels drawn too, or
    the likeliest visual token of each patch, int [B, N].
    """
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        output, _ = apply(variables, batch, None, train=False)
        if output.reconstruction is not None:
            return output.reconstruction
        assert output.logits is not None
        return jnp.argmax(output.logits, axis=-1)

    return predict_fn


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    masking: BatchFn | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The loss and its metrics over a whole set, each batch masked alike in every evaluation.

    Args:
        model: see `loss`.
        variables: its variables.
        batches: one epoch.
        masking: of batches without ``bool_masked_pos``.
        seed: of the masks.
    """

    def masked() -> Iterable[Batch]:
        for number, batch in enumerate(batches):
            if masking is not None and "bool_masked_pos" not in batch:
                batch = masking(jax.random.fold_in(jax.random.key(seed), number), batch)
            yield batch

    totals = means(once(loss, model, train=False), variables, masked())
    return {name: total.value for name, total in totals.items()}
