"""Bottleneck adapters: a small feed-forward layer with a residual connection behind sublayers.

Houlsby et al. 2019, arXiv:1902.00751, section 2.1, figure 2: behind the last projection of
attention and of feed-forward, before the skip connection is added. Pfeiffer et al. 2021,
arXiv:2005.00247, section 3: behind the feed-forward alone (`PFEIFFER`), there after the norm that
follows, here before the skip connection as well. Dropout of the sublayer comes after it here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.adapted_layers import dense_kernels, draw, with_adapters
from fmjax.nn.activation import activation
from fmjax.types import Variables

ATTACHES = ("variables",)

HOULSBY = ("*/attn/out", "*/mlp/down")
PFEIFFER = ("*/mlp/down",)


def add(
    variables: Variables,
    rng: Array,
    *,
    width: int,
    targets: Sequence[str] = HOULSBY,
    act: str = "gelu",
    deviation: float = 0.01,
) -> Variables:
    """Variables with ``y + up(act(down(y)))`` behind each target's output y.

    Args:
        variables: of a model.
        rng: a typed key; the same one gives the same leaves, scanned or not.
        width: R, of the small layer.
        targets: globs over paths of dense layers.
        act: name of the activation, as in config.json.
        deviation: of the kernels' normal distribution, cut off at two (Houlsby et al., section
            3.6): nearly the base model at first. Biases are zero.

    Raises:
        ValueError: numbers out of range, an unknown activation, targets that are no dense layers.
    """
    if width < 1 or deviation <= 0:
        raise ValueError(
            f"bottleneck adapters: width={width} must be at least 1 and deviation={deviation} "
            "above 0"
        )
    activation(act)

    def normal(key: Array, shape: tuple[int, ...]) -> Array:
        return deviation * jax.random.truncated_normal(key, -2.0, 2.0, shape)

    down_rng, up_rng = jax.random.split(rng)
    modules = {}
    for path, kernel in dense_kernels(variables, targets).items():
        *layers, _, outputs = kernel.shape
        modules[path] = {
            f"after/{act}/down": draw(down_rng, path, (*layers, outputs, width), normal),
            f"after/{act}/down_bias": jnp.zeros((*layers, width)),
            f"after/{act}/up": draw(up_rng, path, (*layers, width, outputs), normal),
            f"after/{act}/up_bias": jnp.zeros((*layers, outputs)),
        }
    return with_adapters(variables, modules)
