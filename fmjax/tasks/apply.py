"""A model as a function of a batch: what every task's loss and predictions are built on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.types import Batch, LossFn, Output, Variables

# What a batch carries beside the model's inputs.
TARGETS = frozenset(
    {
        "labels",
        "weight",
        "index",
        "special_tokens_mask",  # tokens that are never masked
        "word_ids",  # the word that each token is of
        "next_sentence_label",
        "sentence_order_label",
        "segment_ids",  # the document that each token of a packed row is of
        "start_positions",
        "end_positions",
    }
)
# Collections that a training pass changes.
MUTABLE = ("batch_stats",)


class Apply(Protocol):
    """(variables, batch, rng | None, train=...) -> (output, new values of mutable collections)."""

    def __call__(
        self, variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Output, Variables]: ...


def apply_fn(model: Any, **options: Any) -> Apply:
    """The model applied to a batch's inputs, by their names.

    Args:
        model: from `fmjax.load` or `fmjax.create`.
        options: further arguments of every call, such as ``output_logits=False``.
    """

    def apply(
        variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Output, Variables]:
        inputs = {name: value for name, value in batch.items() if name not in TARGETS}
        mutable = [name for name in MUTABLE if train and name in variables]
        # A key makes layers drop that cannot be told whether they are trained.
        rngs = {"dropout": rng} if train and rng is not None else {}
        return model.apply(variables, **inputs, **options, train=train, rngs=rngs, mutable=mutable)

    return apply


def row_weights(batch: Batch, size: int | None = None) -> Array:
    """float32 [B]: each row's weight, 1 where there are none.

    Args:
        batch: with ``weight`` [B], or not.
        size: B; None is that of the batch's first leaf.
    """
    size = len(next(iter(batch.values()))) if size is None else size
    return jnp.asarray(batch.get("weight", jnp.ones(size)), jnp.float32)


@functools.lru_cache(maxsize=64)
def once(make: Callable[..., Any], model: Any, **options: Any) -> Any:
    """``make(model, **options)``, the same function for the same arguments.

    What jit has compiled of a function it finds by the function: an evaluation every few hundred
    steps must not trace and compile the model each time.

    Args:
        make: a task's ``loss`` or ``predict``.
        model: from `fmjax.load` or `fmjax.create`.
        options: of `make`, hashable.
    """
    return make(model, **options)


class Total(NamedTuple):
    """A mean over a whole set, by its two sums in float64."""

    total: float
    weight: float

    @property
    def value(self) -> float:
        """total / weight; 0 where nothing was weighed."""
        return self.total / self.weight if self.weight else 0.0


def means(loss_fn: LossFn, variables: Variables, batches: Iterable[Batch]) -> dict[str, Total]:
    """The loss and its metrics over a whole set; batches count by their weights.

    Args:
        loss_fn: built with ``train=False``; the same function (see `once`) is compiled once.
        variables: the model's.
        batches: each example once; rows of weight 0 do not count.

    Raises:
        ValueError: there are no batches.
    """
    step = _mean_step(loss_fn)
    sums: dict[str, Total] = {}
    for batch in batches:
        for name, mean in step(variables, batch).items():
            total, weight = (float(part) for part in mean)
            before = sums.get(name, Total(0.0, 0.0))
            sums[name] = Total(before.total + total, before.weight + weight)
    if not sums:
        raise ValueError("there are no batches to evaluate on")
    return sums


@functools.lru_cache(maxsize=64)
def _mean_step(loss_fn: LossFn) -> Callable[[Variables, Batch], dict[str, tuple[Array, Array]]]:
    @jax.jit
    def step(variables: Variables, batch: Batch) -> dict[str, tuple[Array, Array]]:
        loss, aux = loss_fn(variables, batch, None)
        return {"loss": (loss * aux.weight, aux.weight), **aux.metrics}

    return step


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
    _check_each_once(seen)
    assert rows is not None  # some example came
    return rows


def collect_ragged(
    fn: Callable[[Variables, Batch], Iterable[Any]],
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
) -> list[Any]:
    """As `collect`, where examples differ in length or kind.

    Args:
        fn: ``(variables, batch) -> B results``, one for each row.
        variables: the model's.
        batches: each example once; ``index`` [B] is its place, -1 a padding row.
        size: N, how many examples there are.

    Raises:
        ValueError: the batches do not hold each example exactly once.
    """
    rows: list[Any] = [None] * size
    seen = np.zeros(size, np.int64)
    for batch in batches:
        for place, value in zip(np.asarray(batch["index"]), fn(variables, batch), strict=True):
            if place >= 0:
                rows[place] = value
                seen[place] += 1
    _check_each_once(seen)
    return rows


def _check_each_once(seen: np.ndarray) -> None:
    if not len(seen) or (seen != 1).any():
        raise ValueError(
            f"{int((seen != 1).sum())} of {len(seen)} examples did not come exactly once; iterate "
            "over one epoch without shuffling"
        )
