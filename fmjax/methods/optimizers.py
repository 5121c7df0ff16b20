"""Optimizers beside AdamW, each as its paper has it and with the settings `adamw` takes.

All clip the gradient's global norm and decay matrices only, so that they can stand in for each
other. What a paper says of a layer is done for each layer of scanned ones, ``layers/...`` [L, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from fmjax.train.moments import Moments, keep_moments
from fmjax.train.optim import clip_gradient, decays, mask_of
from fmjax.tree import is_stacked, map_with_path, merge, split
from fmjax.types import PyTree

ATTACHES = ("update",)
Rate = float | Callable
Predicate = Callable[[str], bool]


def layer_by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, of each layer of scanned leaves by itself.

    What it computes of a whole leaf, a norm or factors, it then computes as for layers that are
    not scanned. It must not look at the whole tree, as the clipping of a global norm does.
    """

    def init(params: PyTree) -> tuple[optax.OptState, optax.OptState]:
        scanned, others = split(params, is_stacked)
        return (jax.vmap(tx.init)(scanned) if scanned else (), tx.init(others))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("layer_by_layer needs the params: tx.update(grads, state, params)")
        scanned, others = split(updates, is_stacked)
        scanned_params, other_params = split(params, is_stacked)
        first, second = state
        of_scanned: Any = ({}, first)
        if scanned:
            of_scanned = jax.vmap(tx.update)(scanned, first, scanned_params)
        of_others: Any = tx.update(others, second, other_params)
        new = merge(of_scanned[0], of_others[0])
        return new, (of_scanned[1], of_others[1])

    return optax.GradientTransformation(init, update)


def lamb(
    learning_rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    decay: Predicate = decays,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2), for batches of thousands.

    Adam's update of each layer is scaled to the norm of its weights.

    Args:
        learning_rate: a number or an Optax schedule of the step.
        max_grad_norm: global norm the gradient is clipped to; infinity for none.
        decay: says by leaf path which weights decay.
        moments: as what they are kept, see `fmjax.train.moments.keep_moments`.
    """
    scaled = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask_of(decay)),
        optax.scale_by_trust_ratio(),
    )
    return optax.chain(
        clip_gradient(max_grad_norm),
        keep_moments(layer_by_layer(scaled), moments),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor(
    learning_rate: Rate,
    *,
    decay_rate: float = 0.8,
    threshold: float = 1.0,
    relative: bool = True,
    min_dim_size_to_factor: int = 128,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    decay: Predicate = decays,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5): squares of gradients
    kept as a row and a column a matrix, which spares the optimizer's memory.

    Args:
        learning_rate: a number or an Optax schedule of the step; with `relative`, as a share of
            each leaf's root mean square (T5 trains at ``1 / sqrt(max(step, 10_000))``).
        decay_rate: c of ``beta2 = 1 - step ** -c``.
        threshold: d, the root mean square that updates are clipped to.
        relative: whether rates are relative to the weights (section 8).
        min_dim_size_to_factor: smaller matrices keep all their squares.
        max_grad_norm: global norm the gradient is clipped to; infinity for none.
        decay: says by leaf path which weights decay, by ``learning_rate * weight_decay``.
        moments: as what factors, and squares of what has none, are kept, see
            `fmjax.train.moments.keep_moments`.
    """
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(threshold),
    ]
    if relative:
        parts.append(optax.scale_by_param_block_rms())
    return optax.chain(
        clip_gradient(max_grad_norm),
        keep_moments(layer_by_layer(optax.chain(*parts)), moments),
        optax.add_decayed_weights(weight_decay, mask_of(decay)),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion(
    learning_rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    decay: Predicate = decays,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of a momentum.

    It keeps half of Adam's memory. Rates are 3 to 10 times lower than AdamW's, and decay as many
    times higher (section 5).

    Args:
        learning_rate: a number or an Optax schedule of the step.
        max_grad_norm: global norm the gradient is clipped to; infinity for none.
        decay: says by leaf path which weights decay.
        moments: as what they are kept, see `fmjax.train.moments.keep_moments`.
    """
    tx = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask_of(decay))
    return optax.chain(clip_gradient(max_grad_norm), keep_moments(tx, moments))


def hidden_matrix(path: str) -> bool:
    """Whether Muon updates a leaf: the kernels inside blocks, not embeddings, heads or biases."""
    *place, name = path.split("/")
    return name == "kernel" and any(part.startswith("layers") for part in place)


def muon(
    learning_rate: Rate,
    *,
    beta: float = 0.95,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    matrix: Predicate = hidden_matrix,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of blocks, and `adamw` for all else.

    The momentum of each matrix is orthogonalised. Updates are scaled to the size of AdamW's (Liu et
    al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        learning_rate: a number or an Optax schedule of the step.
        beta: of the momentum.
        weight_decay: of the matrices, and of what else decays.
        max_grad_norm: global norm the gradient is clipped to; infinity for none.
        matrix: says by leaf path what Muon updates; of a leaf with more than two axes each matrix
            of the last two, as of scanned layers, by itself.
        moments: as what they are kept, see `fmjax.train.moments.keep_moments`.
    """

    def labels(params: PyTree) -> PyTree:
        return map_with_path(lambda path, _: "muon" if matrix(path) else "adamw", params)

    def axes(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), params)

    rest = optax.adamw(learning_rate, weight_decay=weight_decay, mask=mask_of(decays))
    matrices = optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=axes,
    )
    return optax.chain(
        clip_gradient(max_grad_norm),
        keep_moments(optax.partition({"muon": matrices, "adamw": rest}, labels), moments),
    )
