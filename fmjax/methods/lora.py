"""Low-rank adaptation: kernels stay as they are, a product of two thin matrices is added to them.

Hu et al. 2022, "LoRA", arXiv:2106.09685, eq. 3: ``h = W x + alpha / R * B A x``. Kalajdzievski
2023, "rsLoRA", arXiv:2312.03732, eq. 8: alpha / sqrt(R) instead. Liu et al. 2024, "DoRA",
arXiv:2402.09353, eq. 5: the columns of the sum are brought to lengths that train too.

``fmjax.methods.adapted_layers`` has what trains (`is_adapter`), merging, and several at once;
``fmjax.methods.lora_files`` reads and writes those of the library PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.adapted_layers import dense_kernels, draw, lengths, with_adapters
from fmjax.types import Variables

ATTACHES = ("variables",)


def add(
    variables: Variables,
    rng: Array,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("*/attn/query", "*/attn/value"),
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    weight_decomposed: bool = False,
) -> Variables:
    """Variables with a low-rank update for each target, which is zero at first.

    To give layers different ranks call it once for each.

    Args:
        variables: of a model.
        rng: a typed key; the same one gives the same leaves, scanned or not.
        rank: R.
        alpha: of the update's factor alpha / R; other ranks then need no other learning rate.
        targets: globs over paths of dense layers; the default is the paper's (section 4.2).
        dropout: the share of the update's inputs that training drops.
        rank_stabilised: whether the factor is alpha / sqrt(R).
        weight_decomposed: whether columns have lengths of their own (DoRA), at first the kernel's.

    Returns:
        The variables and, for each target, ``down`` (A^T) [I, R], uniform in +-1 / sqrt(I) as
        PEFT draws it (He et al. 2015 with a = sqrt(5)), ``up`` (B^T) [R, O], zero, ``scale`` [] and
        what the options ask for; float32.

    Raises:
        ValueError: numbers out of range, or targets that are no dense layers.
    """
    problems = []
    if rank < 1:
        problems.append(f"rank={rank} must be at least 1")
    if not alpha > 0:
        problems.append(f"alpha={alpha} must be above 0")
    if not 0 <= dropout < 1:
        problems.append(f"dropout={dropout} must be at least 0 and below 1")
    if problems:
        raise ValueError("low-rank adaptation: " + "; ".join(problems))
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
    modules = {}
    for path, kernel in dense_kernels(variables, targets).items():
        *layers, inputs, outputs = kernel.shape
        leaves = {
            "down": draw(rng, path, (*layers, inputs, rank), _uniform),
            "up": jnp.zeros((*layers, rank, outputs)),
            "scale": jnp.full(layers, scale, jnp.float32),
        }
        if weight_decomposed:
            leaves["magnitude"] = lengths(kernel, leaves["down"], leaves["up"], leaves["scale"])
        if dropout:
            leaves["dropout"] = jnp.full(layers, dropout, jnp.float32)
        modules[path] = leaves
    return with_adapters(variables, modules)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    bound = 1.0 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
