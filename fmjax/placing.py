"""Where the weights of a checkpoint go: on devices, whole or in slices, layers stacked or not."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tree import flatten, stacked_place
from fmjax.types import PyTree
from fmjax.weights import Sliceable, Stack, copied, copy_into


class Placer:
    """Puts leaves on devices; for a scanned model, once all layers are there.

    Where there are shardings, leaves are sliced: of a checkpoint, each process reads what its
    devices hold. Several threads may call `place`.

    Args:
        abstract: the variables by path, each layer for itself.
        dtype: floating-point leaves are cast to it; None keeps theirs.
        shardings: a tree like the variables, one for all leaves, or None for the default device.
        scan: whether layers are stacked.

    Attributes:
        placed: what is there, by path.
        order: its paths once all is.

    Raises:
        ValueError: leaves without a sharding.
    """

    def __init__(
        self, abstract: Mapping[str, Any], dtype: Any, shardings: PyTree, scan: bool
    ) -> None:
        self.dtype = dtype
        self.placed: dict[str, Array] = {}
        self.sliced = shardings is not None
        self.views: dict[str, dict[int, Sliceable]] = {}
        self.stacks: dict[str, np.ndarray] = {}
        self.filled: dict[str, int] = {}
        self.layers: dict[str, int] = {}
        self.lock, self.one_stack = threading.Lock(), threading.Lock()
        # A thread does not inherit what the caller has said in a ``with`` statement.
        flags: Any = jax.config
        self.device, self.x64 = flags.jax_default_device, flags.jax_enable_x64
        self.scan = scan
        for path in abstract:
            self.layers[self._stacked(path)[0]] = self.layers.get(self._stacked(path)[0], 0) + 1
        self.order = list(self.layers)
        if shardings is None or isinstance(shardings, jax.sharding.Sharding):
            self.shardings: dict[str, Any] = dict.fromkeys(self.order, shardings)
        else:
            self.shardings = flatten(shardings)
        if missing := sorted(set(self.order) - set(self.shardings)):
            raise ValueError(f"shardings has no leaf for {missing}")

    def _stacked(self, path: str) -> tuple[str, int | None]:
        """The path a leaf ends up under, and its place in the stack of layers if it has one."""
        return (stacked_place(path) if self.scan else None) or (path, None)

    def place(self, path: str, leaf: Sliceable) -> None:
        """Takes a leaf; views need not last any longer, but for a layer's where there are slices.

        Args:
            path: of `abstract`.
            leaf: of any layout.
        """
        final, layer = self._stacked(path)
        with jax.default_device(self.device), jax.enable_x64(self.x64):
            if self.sliced:
                self._place_slices(final, layer, leaf)
            elif layer is not None:
                self._place_layer(final, layer, leaf)
            else:
                dtype = dtype_for(leaf.dtype, self.dtype)
                if isinstance(leaf, Stack):
                    leaf = copied(leaf, dtype)
                self.placed[final] = on_device(leaf.astype(dtype, copy=False))

    def _place_layer(self, final: str, layer: int, leaf: Sliceable) -> None:
        with self.lock:
            if final not in self.stacks:
                shape = (self.layers[final], *leaf.shape)
                self.stacks[final] = np.empty(shape, dtype_for(leaf.dtype, self.dtype))
            stack = self.stacks[final]
        copy_into(stack[layer, ...], leaf)
        with self.lock:
            self.filled[final] = self.filled.get(final, 0) + 1
            if self.filled[final] < self.layers[final]:
                return
            del self.stacks[final]
        with self.one_stack:  # is there twice at a time, for it may be a good part of the model
            self.placed[final] = on_device(stack)

    def _place_slices(self, final: str, layer: int | None, leaf: Sliceable) -> None:
        if layer is not None:
            with self.lock:
                views = self.views.setdefault(final, {})
                views[layer] = leaf
                if len(views) < self.layers[final]:
                    return
                del self.views[final]
            leaf = Stack([views[i] for i in range(len(views))])
        dtype = dtype_for(leaf.dtype, self.dtype)

        def read(at: Any) -> np.ndarray:
            # A copy, because the device may keep it as its own, to be written to.
            return copied(leaf[at], dtype)

        array = jax.make_array_from_callback(leaf.shape, self.shardings[final], read)
        self.placed[final] = array.block_until_ready()


def on_device(leaf: np.ndarray) -> Array:
    """An array on the default device, in memory of its own.

    Args:
        leaf: of any layout; a view, perhaps, of memory that may go once this returns.
    """
    placed = jax.device_put(leaf)
    # Where a CPU finds memory laid out as its own is, it takes that, and never gives it up to a
    # step that donates it.
    if placed.device.platform == "cpu" and placed.unsafe_buffer_pointer() == leaf.ctypes.data:
        placed = jax.device_put(placed, may_alias=False)
    return placed.block_until_ready()


def dtype_for(have: Any, wanted: Any) -> Any:
    """The dtype of a leaf: floating-point ones are cast, where that is wanted."""
    return wanted if wanted is not None and jnp.issubdtype(have, jnp.floating) else have
