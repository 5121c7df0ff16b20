"""A model as a function of a batch: what every task's loss and predictions are built on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from jax import Array

from fmjax.types import Batch, Output, Variables

# What a batch carries beside the model's inputs.
TARGETS = frozenset({"labels", "weight", "index"})
# Collections that a training pass changes.
MUTABLE = ("batch_stats",)


class Apply(Protocol):
    """(variables, batch, rng | None, train=...) -> (output, new values of mutable collections)."""

    def __call__(
        self, variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Output, Variables]: ...


def apply_fn(model: Any) -> Apply:
    """The model applied to a batch's inputs, by their names.

    Args:
        model: from `fmjax.load` or `fmjax.create`.
    """

    def apply(
        variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Output, Variables]:
        inputs = {name: value for name, value in batch.items() if name not in TARGETS}
        mutable = [name for name in MUTABLE if train and name in variables]
        rngs = {} if rng is None else {"dropout": rng}
        return model.apply(variables, **inputs, train=train, rngs=rngs, mutable=mutable)

    return apply


def collect(
    predict_fn: Callable[[Variables, Batch], Array],
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
) -> np.ndarray:
    """Rows of `predict_fn` for every example, in the order of the data.

    Args:
        predict_fn: ``(variables, batch) -> [B, ...]``, compiled.
        variables: the model's.
        batches: each example once; ``index`` [B] is its place, -1 a padding row.
        size: N, how many examples there are.

    Raises:
        ValueError: the batches do not hold each example exactly once.
    """
    rows: np.ndarray | None = None
    seen = np.zeros(size, np.int64)
    for batch in batches:
        values = np.asarray(predict_fn(variables, batch))
        index = np.asarray(batch["index"])
        real = index >= 0
        if rows is None:
            rows = np.zeros((size, *values.shape[1:]), values.dtype)
        rows[index[real]] = values[real]
        np.add.at(seen, index[real], 1)
    if rows is None or (seen != 1).any():
        raise ValueError(
            f"{int((seen != 1).sum())} of {size} examples did not come exactly once; iterate over "
            "one epoch without shuffling"
        )
    return rows
