"""What dense layers read beside their kernel, from the collection "adapters".

The leaves of a layer from I to O features; each group is there or not:

- ``down`` [I, R], ``up`` [R, O], ``scale`` []: a low-rank update of the kernel; with ``dropout`` []
  a share of the inputs is dropped before it wherever the call has a "dropout" key.
- ``magnitude`` [O], beside these: the lengths that the updated kernel's columns are brought to.
- ``in_scale`` [I], ``out_scale`` [O]: factors of the features that come in and go out.
- ``after/{activation}/`` ``down`` [O, R], ``down_bias`` [R], ``up`` [R, O], ``up_bias`` [O]: a
  small feed-forward layer with a residual connection, behind the dense one.
- ``choice`` int [B]: all others have a leading axis N, and each example reads its own of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.compact import Compact, whole
from fmjax.nn.dropout import dropout
from fmjax.nn.product import matmul

Leaves = Mapping[str, Any]
LOW_RANK = ("down", "up", "scale")
# How many axes each leaf has.
AXES = {
    "down": 2, "up": 2, "scale": 0, "dropout": 0, "magnitude": 1, "in_scale": 1, "out_scale": 1,
}  # fmt: skip
AXES_AFTER = {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1}


def adapters(module: nn.Module) -> Leaves | None:
    """The module's own leaves in the collection, or None.

    Raises:
        ValueError: leaves that nothing would read, or that are for several examples and not chosen.
    """
    found = module.variables.get("adapters", {})
    leaves = {name: x for name, x in found.items() if name == "after" or not isinstance(x, Mapping)}
    if not leaves:
        return None
    several = int("choice" in leaves)
    wanted = {name: axes + several for name, axes in AXES.items()}
    given = {name: x.ndim for name, x in leaves.items() if name not in ("after", "choice")}
    for act, layer in leaves.get("after", {}).items():
        wanted |= {f"after/{act}/{name}": axes + several for name, axes in AXES_AFTER.items()}
        given |= {f"after/{act}/{name}": x.ndim for name, x in layer.items()}
    if wrong := {name: axes for name, axes in given.items() if wanted.get(name) != axes}:
        raise ValueError(
            f"adapters of {'/'.join(module.path)} have the leaves and axes {wrong}; what is read "
            f"here is {wanted}" + ("" if several else "; several adapters need a choice")
        )
    return leaves


def adapted(
    leaves: Leaves, x: Array, kernel: Array | Compact, bias: Array | None, rng: Array | None
) -> Array:
    """A dense layer with its adapters.

    Args:
        leaves: see above.
        x: [..., I].
        kernel: [I, O]; it is not copied.
        bias: [O] or None.
        rng: by which inputs of the low-rank update are dropped; None drops nothing.

    Returns:
        [..., O] float32.
    """
    if "choice" in leaves:
        norms = None
        if "magnitude" in leaves:
            norms = jax.vmap(column_norms, (None, 0, 0, 0))(
                kernel, *(leaves[name] for name in LOW_RANK)
            )  # [N, O]
        leaves, norms = _chosen({**leaves}, norms, x.shape[0])
    elif "magnitude" in leaves:
        norms = column_norms(kernel, *(leaves[name] for name in LOW_RANK))
    else:
        norms = None
    if "in_scale" in leaves:
        x = x * _along(leaves["in_scale"], x).astype(x.dtype)
    y = matmul(x, kernel)
    if "down" in leaves:
        dropped = x
        if rng is not None and "dropout" in leaves:
            dropped = dropout(rng, x, _along(leaves["dropout"], x, 0).astype(jnp.float32))
        update = update_of(dropped, leaves["down"], leaves["up"], leaves["scale"])
        if norms is None:
            y = y + update
        else:
            factor = _along(leaves["magnitude"].astype(jnp.float32) / norms, y)
            if dropped is x:
                y = factor * (y + update)
            else:  # what changes the kernel's lengths is dropped with the update's input
                y = y + (factor - 1.0) * matmul(dropped, kernel) + factor * update
    if bias is not None:
        y = y + bias
    if "out_scale" in leaves:
        y = y * _along(leaves["out_scale"], y)
    for act, layer in leaves.get("after", {}).items():
        y = y + feed_forward(y.astype(x.dtype), act, layer)
    return y


def update_of(x: Array, down: Array, up: Array, scale: Array) -> Array:
    """``x @ down @ up * scale``: [..., I] -> [..., O] float32; factors as in `_product`."""
    update = _product(_product(x, down).astype(x.dtype), up)
    return update * _along(scale.astype(jnp.float32), update, 0)


def column_norms(kernel: Array | Compact, down: Array, up: Array, scale: Array) -> Array:
    """Lengths of the columns of ``kernel + scale * down @ up``, which is not formed; [O] float32.

    |w + s d u|^2 = |w|^2 + u (2 s d w + s^2 d d u), column by column. They are constants to
    differentiation.
    """
    array, down, up, scale = jax.lax.stop_gradient((whole(kernel), down, up, scale))
    down, up, scale = (leaf.astype(jnp.float32) for leaf in (down, up, scale))
    squares = jnp.sum(jnp.square(array.astype(jnp.float32)), axis=0)  # [O]
    across = matmul(down.T.astype(array.dtype), array)  # [R, O]
    own = (down.T @ down) @ up  # [R, O]
    changes = jnp.sum(up * (2 * scale * across + jnp.square(scale) * own), axis=0)
    return jnp.sqrt(jnp.maximum(squares + changes, 0.0))


def feed_forward(y: Array, act: str, leaves: Leaves) -> Array:
    """``act(y @ down + down_bias) @ up + up_bias``: [..., O] -> [..., O] float32."""
    hidden = _product(y, leaves["down"])
    hidden = activation(act)(hidden + _along(leaves["down_bias"], hidden)).astype(y.dtype)
    out = _product(hidden, leaves["up"])
    return out + _along(leaves["up_bias"], out)


def _chosen(leaves: dict[str, Any], norms: Array | None, rows: int) -> tuple[Leaves, Array | None]:
    """Each row's own leaves and norms, [rows, ...]: rows of one example lie side by side."""
    choice = leaves.pop("choice")  # [B]
    if rows % choice.shape[0]:
        raise ValueError(
            f"adapters are chosen for {choice.shape[0]} examples, but an adapted layer has inputs "
            f"of {rows} rows: choose for as many examples as the batch has, and adapt no layer "
            "whose inputs all examples share"
        )
    choice = jnp.repeat(choice, rows // choice.shape[0])
    return jax.tree.map(lambda leaf: leaf[choice], (leaves, norms))


def _product(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` in float32 by one kernel [I, O], or by one [B, I, O] for each example."""
    if kernel.ndim == 2:
        return matmul(x, kernel)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    y = jnp.einsum("BNI,BIO->BNO", rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def _along(leaf: Array, x: Array, features: int = 1) -> Array:
    """A leaf of one example, or of each, [B, ...], in a shape that broadcasts to x [B, ..., F].

    Args:
        leaf: with an axis F or without.
        x: what it is to be used with.
        features: how many axes one example's leaf has.
    """
    if leaf.ndim == features:
        return leaf
    return leaf.reshape(leaf.shape[0], *[1] * (x.ndim - 1 - features), *leaf.shape[1:])
