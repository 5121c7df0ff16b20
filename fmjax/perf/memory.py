"""What fills a chip's memory in a step, by class."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from fmjax.types import PyTree, TrainState

CLASSES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations and temporaries",
    "other": "batch, results and program",
}
"""The classes of `MemoryUse`, as people read them."""


class MemoryUse(NamedTuple):
    """Bytes on one chip at a step's peak; the classes add up to `total`.

    Args:
        parameters: trained and frozen, and running statistics.
        optimizer: moments and averages.
        gradients: of what trains, in full. They share the compiler's temporaries with activations.
        activations: and other temporaries: the rest of those.
        other: the batch, keys, what the step returns beside the state, the program.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


def bytes_per_chip(tree: PyTree) -> int:
    """What one chip holds of a tree of ``jax.ShapeDtypeStruct`` (or arrays) with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def state_bytes(state: TrainState) -> tuple[int, int]:
    """(parameters, optimizer): what a chip holds of an abstract state with shardings."""
    parameters = bytes_per_chip((state.trainable, state.non_trainable))
    return parameters, bytes_per_chip(state.opt_state)


def memory_use(compiled: Any, state: TrainState) -> MemoryUse:
    """The classes of a compiled step's memory.

    The total is the compiler's: arguments, results that do not take an argument's place,
    temporaries and the program. Of its temporaries, which overlap in time, as much as the gradients
    take is named theirs.

    Args:
        compiled: a step, ``jit_step(step).lower(state, batch).compile()``.
        state: what it was lowered with.

    Raises:
        ValueError: the backend does not say what memory the program needs.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError("this backend's compiler does not say what memory a program needs")
    parameters, optimizer = state_bytes(state)
    gradients = min(bytes_per_chip(state.trainable), found.temp_size_in_bytes)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    total = (
        found.argument_size_in_bytes
        + results
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    activations = found.temp_size_in_bytes - gradients
    other = total - parameters - optimizer - gradients - activations
    return MemoryUse(parameters, optimizer, gradients, activations, other)


def host_bytes(compiled: Any) -> int:
    """What a step keeps of a chip's temporaries in the host's memory, as `offload` does.

    Args:
        compiled: as `memory_use` takes it.
    """
    found = compiled.memory_analysis()
    return 0 if found is None else found.host_temp_size_in_bytes
