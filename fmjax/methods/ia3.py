"""(IA)^3: a dense layer's features are multiplied by learned factors, one a feature.

Liu et al. 2022, arXiv:2205.05638, section 3.3: the outputs of keys and values, and the inputs of
the feed-forward's last projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from fmjax.methods.adapted_layers import dense_kernels, with_adapters
from fmjax.types import Variables

ATTACHES = ("variables",)


def add(
    variables: Variables,
    *,
    outputs: Sequence[str] = ("*/attn/key", "*/attn/value"),
    inputs: Sequence[str] = ("*/mlp/down",),
) -> Variables:
    """Variables with factors, which are one at first.

    Args:
        variables: of a model.
        outputs: globs over paths of dense layers whose outputs (bias included) get factors [O].
        inputs: the same for inputs, [I].

    Raises:
        ValueError: targets that are no dense layers.
    """
    modules: dict[str, dict] = {}
    for path, kernel in (dense_kernels(variables, outputs) if outputs else {}).items():
        modules[path] = {"out_scale": jnp.ones((*kernel.shape[:-2], kernel.shape[-1]))}
    for path, kernel in (dense_kernels(variables, inputs) if inputs else {}).items():
        modules.setdefault(path, {})["in_scale"] = jnp.ones(kernel.shape[:-1])
    if not modules:
        raise ValueError("neither outputs nor inputs are named: there is nothing to adapt")
    return with_adapters(variables, modules)
