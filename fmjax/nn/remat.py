"""Rematerialisation: what of a block is kept for its gradient, and what is computed again.

Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from fmjax.types import PyTree, Remat

_PRODUCT, _BLOCK_INPUT = "product", "block_input"


def mark_product(y: Array) -> Array:
    """Marks what "dots" keeps; y itself."""
    return checkpoint_name(y, _PRODUCT)


def mark_block_input(hidden: PyTree) -> PyTree:
    """Marks, inside what is recomputed, what "offload" keeps; the hidden state itself."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _BLOCK_INPUT), hidden)


def policy(remat: Remat) -> Callable[..., Any] | None:
    """What ``jax.checkpoint`` is to keep beside the arguments of what it recomputes.

    Names are kept and not all results of `dot_general`: a product may lie in a branch for a
    platform, in float32 there and rounded outside, and the rounded one is enough.

    Args:
        remat: any but "none".

    Raises:
        ValueError: no policy's name.
    """
    match remat:
        case "block":
            return None
        case "dots":
            return jax.checkpoint_policies.save_only_these_names(_PRODUCT)
        case "offload":
            return jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_BLOCK_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
    raise ValueError(f"remat={remat!r}; choose one of {', '.join(map(repr, get_args(Remat)))}")


def recomputed(block: type[nn.Module], remat: Remat, *, scanned: bool = False) -> Any:
    """The module, or the one that recomputes in its gradient what `remat` says.

    Args:
        block: whose first argument is its hidden state.
        remat: the policy.
        scanned: whether it runs in a scan, whose loop itself keeps XLA from merging the
            recomputation away.

    Raises:
        ValueError: no policy's name.
    """
    if remat == "none":
        return block

    class Marked(block):
        def __call__(self, hidden: PyTree, *args: Any) -> Any:
            return super().__call__(mark_block_input(hidden), *args)

    marked = Marked if remat == "offload" else block
    return nn.remat(marked, prevent_cse=not scanned, policy=policy(remat))
