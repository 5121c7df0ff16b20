"""Averages and sums of weights: one model made of several, at the price of one when it predicts.

Stochastic weight averaging (SWA; Izmailov et al. 2018, arXiv:1803.05407) of one run's weights;
model soups (Wortsman et al. 2022, arXiv:2203.05482) of several fine-tuned models; task arithmetic
(Ilharco et al. 2023, arXiv:2212.04089) and TIES merging (Yadav et al. 2023, arXiv:2306.01708) of
what fine-tuning has changed. Exponential moving averages are `fmjax.train.track_ema`::

    rate = cyclical_rate(warm, start=3000, period=300, high=0.05, low=0.001)
    tx = optax.chain(optax.sgd(rate, 0.9), track_swa(start=3000, period=300))
    ...  # train
    state = averaged(state)
    variables = with_statistics(loss, state.trainable | state.non_trainable, batches, rng=rng)

Weights that did not come from a common start are not averaged to anything useful. Running
statistics of batch normalisation fit no average of weights: `with_statistics` makes them anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.tasks.apply import row_weights
from fmjax.train.optim import tracked, tracking
from fmjax.tree import cast_as, flatten, is_running, override, unflatten
from fmjax.types import Batch, LossFn, PyTree, TrainState, Variables

ATTACHES = ("update", "variables")


class SwaState(NamedTuple):
    """What stochastic weight averaging keeps.

    Args:
        count: steps so far, int32 [].
        averaged: how many weights are in the mean, int32 [].
        mean: of the trainable leaves, float32; until there is one, the weights as they are.
    """

    count: Array
    averaged: Array
    mean: Variables


def track_swa(*, start: int, period: int = 1) -> optax.GradientTransformation:
    """The mean of the weights after `start` steps and after every `period` more (Algorithm 1).

    It must come last in the chain; it changes nothing itself. See `averaged`.

    Args:
        start: steps after which the first weights are taken, the paper's pretrained ones; about
            three quarters of an ordinary run (section 4.1).
        period: c there, the steps of a cycle of `cyclical_rate`; with a constant rate an epoch's.

    Raises:
        ValueError: numbers out of their ranges.
    """
    _check_cycle(start, period)

    def init(params: PyTree) -> SwaState:
        # Of one dtype they would be the same buffer, which must not be donated twice.
        mean = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return SwaState(jnp.zeros((), jnp.int32), jnp.int32(start == 0), mean)

    def follow(state: SwaState, params: PyTree) -> SwaState:
        count = state.count + 1
        taken = (count >= start) & ((count - start) % period == 0)
        share = 1 / (state.averaged + 1)

        def mean(before: Array, now: Array) -> Array:
            now = now.astype(jnp.float32)
            after = jnp.where(taken, before + (now - before) * share, before)
            return jnp.where(state.averaged == 0, now, after)

        means = jax.tree.map(mean, state.mean, params)
        return SwaState(count, state.averaged + taken, means)

    return tracking(init, follow)


def averaged(state: TrainState) -> TrainState:
    """The state with `track_swa`'s mean as its weights, in their own dtypes.

    Running statistics are those of the last weights: give it to `with_statistics`.

    Raises:
        ValueError: the optimizer tracks no such mean, or several.
    """
    mean = tracked(state.opt_state, SwaState, "means of weights", "track_swa").mean
    return dataclasses.replace(state, trainable=cast_as(mean, state.trainable))


def cyclical_rate(
    before: optax.Schedule, *, start: int, period: int, high: float, low: float
) -> optax.Schedule:
    """`before` for `start` steps, then cycles, on a line from `high` to `low` (equation 1 of SWA).

    `track_swa` with the same numbers takes the weights where the rate is lowest. With `high` equal
    to `low` the rate is constant (section 3.2 has both).

    Args:
        before: the rate until then.
        start, period: steps.
        high, low: a1 and a2 there.

    Raises:
        ValueError: numbers out of their ranges.
    """
    _check_cycle(start, period)
    if not 0 < low <= high:
        raise ValueError(f"low={low} must be above 0 and at most high={high}")

    def schedule(count):
        share = ((count - start) % period + 1) / period
        return jnp.where(count < start, before(count), (1 - share) * high + share * low)

    return schedule


def _check_cycle(start: int, period: int) -> None:
    if start < 0 or period < 1:
        raise ValueError(f"start={start} must be at least 0 and period={period} at least 1 step")


def with_statistics(
    loss_fn: LossFn, variables: Variables, batches: Iterable[Batch], *, rng: Array | None = None
) -> Variables:
    """The variables with running statistics that are their own, by a pass over data.

    Of each batch normalisation the means over all examples of the batches' means and variances
    (arXiv:1803.05407, section 3.2), whatever its momentum is; rows of weight 0 are left out, not
    only weighed so, as they would count in the batch's statistics. Models without running
    statistics come back as they are.

    Args:
        loss_fn: as it is trained on, built with ``train=True``.
        variables: whose weights have been averaged, or changed otherwise.
        batches: host arrays, an epoch or a good part of it.
        rng: of dropout and the like.

    Raises:
        ValueError: there are no batches with a row that counts, or the loss moves no statistics.
    """
    old = {path: leaf for path, leaf in flatten(variables).items() if is_running(path)}
    if not old:
        return variables

    def statistics_of(
        running: dict[str, Array], variables: Variables, batch: Batch, rng: Array | None
    ) -> dict[str, Array]:
        begun = override(variables, unflatten(running))
        return running | flatten(loss_fn(begun, batch, rng)[1].updates)

    @jax.jit
    def measure(
        variables: Variables, batch: Batch, rng: Array | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        start = {path: jnp.zeros_like(old[path]) for path in moving}
        floats = {path: leaf for path, leaf in start.items() if _is_floating(leaf)}
        counts = {path: leaf for path, leaf in start.items() if path not in floats}

        def statistics(floats: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
            new = statistics_of(floats | counts, variables, batch, rng)
            return {path: new[path] for path in floats}, {path: new[path] for path in counts}

        # They become (1 - m) * old + m * the batch's, which do not depend on the old ones: from
        # zero that is m times what is sought, and its derivative 1 - m.
        ones = jax.tree.map(jnp.ones_like, floats)
        new, kept, added = jax.jvp(statistics, (floats,), (ones,), has_aux=True)
        return jax.tree.map(lambda x, k: x / (1 - k), new, kept), added

    moving: list[str] = []
    sums, added, total = {}, {}, 0.0
    for number, batch in enumerate(batches):
        counted = np.asarray(row_weights(batch)) > 0
        if not counted.any():
            continue
        rows = {name: np.asarray(leaf)[counted] for name, leaf in batch.items()}
        key = None if rng is None else jax.random.fold_in(rng, number)
        if not moving:
            moving = _moving(statistics_of, old, variables, rows, key)
        values, more = measure(variables, rows, key)
        weight = float(counted.sum())
        sums = {path: sums.get(path, 0.0) + weight * leaf for path, leaf in values.items()}
        added = {path: added.get(path, 0) + leaf for path, leaf in more.items()}
        total += weight
    if not total:
        raise ValueError("there are no batches with rows of weight above 0 to take statistics of")
    means = {path: (leaf / total).astype(old[path].dtype) for path, leaf in sums.items()}
    return override(variables, unflatten(means | added))


def _moving(fn: Callable[..., Any], old: dict[str, Array], *rest: Any) -> list[str]:
    """The statistics that a pass changes: not those that come out as they went in."""
    traced = jax.make_jaxpr(fn)(old, *rest).jaxpr
    pairs = zip(sorted(old), traced.invars, traced.outvars, strict=False)  # further inputs follow
    if moving := [path for path, before, after in pairs if before is not after]:
        return moving
    raise ValueError("the loss moves no running statistics: build it with train=True")


def _is_floating(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def uniform_soup(ingredients: Sequence[Variables]) -> Variables:
    """The mean of several models' weights (arXiv:2203.05482, table 2): theirs is a common start.

    Leaves that are no floating-point numbers are the first one's.

    Args:
        ingredients: variables of the same form.

    Raises:
        ValueError: none, or trees that differ; all paths are listed.
    """
    if not ingredients:
        raise ValueError("there are no ingredients; give the variables of at least one model")
    _check_alike([f"ingredient {number}" for number in range(len(ingredients))], ingredients)

    def mean(first: Array, *others: Array) -> Array:
        if not _is_floating(first):
            return first
        total = first.astype(jnp.float32)
        for other in others:
            total = total + other.astype(jnp.float32)
        return (total / len(ingredients)).astype(first.dtype)

    return jax.tree.map(mean, *ingredients)


def greedy_soup(
    ingredients: Sequence[Variables], measure: Callable[[Variables], float]
) -> tuple[Variables, list[int]]:
    """The mean of those models that make it no worse, from the best on.

    Recipe 1 of arXiv:2203.05482.

    Args:
        ingredients: variables of the same form.
        measure: the higher the better, on validation data, such as the accuracy; it may make
            running statistics anew first (`with_statistics`).

    Returns:
        The soup, and the places of what is in it, in the order of their own measures.

    Raises:
        ValueError: as `uniform_soup`, or a measure that is nan.
    """
    uniform_soup(ingredients[:1])
    _check_alike([f"ingredient {number}" for number in range(len(ingredients))], ingredients)
    scores = [float(measure(variables)) for variables in ingredients]
    if any(np.isnan(scores)):
        raise ValueError(f"the measures are {scores}; nan is better or worse than nothing")
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    chosen, best = order[:1], scores[order[0]]
    for number in order[1:]:
        score = float(measure(uniform_soup([ingredients[i] for i in [*chosen, number]])))
        if score >= best:
            chosen, best = [*chosen, number], score
    return uniform_soup([ingredients[i] for i in chosen]), chosen


def task_vector(tuned: Variables, base: Variables) -> Variables:
    """What fine-tuning has changed: ``tuned - base``, float32 (arXiv:2212.04089, section 2).

    Without running statistics, which are nothing to be added up. Negated, scaled and added by
    `combined`.

    Args:
        tuned, base: of the same form; leave out heads that differ (`fmjax.tree.split`).

    Raises:
        ValueError: trees that differ; all paths are listed.
    """
    _check_alike(("tuned", "base"), (tuned, base))
    before = flatten(base)
    return unflatten(
        {
            path: leaf.astype(jnp.float32) - before[path].astype(jnp.float32)
            for path, leaf in flatten(tuned).items()
            if not is_running(path)
        }
    )


def combined(vectors: Sequence[Variables], scales: Sequence[float]) -> Variables:
    """The sum of task vectors, each times its scale (arXiv:2212.04089, section 2).

    ``[a, b]`` by ``[1, 1]`` adds two tasks, ``[a]`` by ``[-1]`` forgets one, and ``[c, b, a]`` by
    ``[1, 1, -1]`` is what c is to a's b.

    Args:
        vectors: from `task_vector`.
        scales: a number for each.

    Raises:
        ValueError: none, another number of scales, or trees that differ; all paths are listed.
    """
    _check_vectors(vectors)
    if len(scales) != len(vectors):
        raise ValueError(f"{len(scales)} scales for {len(vectors)} vectors: give one for each")

    def total(*leaves: Array) -> Array:
        first, *others = [scale * leaf for scale, leaf in zip(scales, leaves, strict=True)]
        return sum(others, first)

    return jax.tree.map(total, *vectors)


def ties(vectors: Sequence[Variables], *, keep: float = 0.2) -> Variables:
    """Task vectors merged without their interference: TIES (arXiv:2306.01708, Algorithm 1).

    Of each vector the largest numbers are kept; each number's sign is that of the sum of what is
    left; the mean is over those vectors that have the sign.

    Args:
        vectors: from `task_vector`.
        keep: share of each vector's numbers, over all its leaves; 0.2 in the paper.

    Raises:
        ValueError: none, a share outside (0, 1], or trees that differ; all paths are listed.
    """
    _check_vectors(vectors)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be above 0 and at most 1")

    def trimmed(vector: Variables) -> Variables:
        sizes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(vector)])
        count = max(1, round(keep * sizes.size))
        least = jax.lax.top_k(sizes, count)[0][-1]
        return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= least, leaf, 0.0), vector)

    def merged(*leaves: Array) -> Array:
        values = jnp.stack(leaves)  # [K, ...]
        agrees = (jnp.sign(values) == jnp.sign(jnp.sum(values, axis=0))) & (values != 0)
        count = jnp.sum(agrees, axis=0)
        return jnp.sum(jnp.where(agrees, values, 0.0), axis=0) / jnp.maximum(count, 1)

    return jax.tree.map(merged, *map(trimmed, vectors))


def moved(base: Variables, vector: Variables, scale: float = 1.0) -> Variables:
    """The weights with a task vector added: ``base + scale * vector``, in their own dtypes.

    Args:
        base: what the vector is to be added to; running statistics stay: see `with_statistics`.
        vector: from `task_vector`, `combined` or `ties`.
        scale: lambda in the papers, chosen on validation data.

    Raises:
        ValueError: trees that differ; all paths are listed.
    """
    weights = {path: leaf for path, leaf in flatten(base).items() if not is_running(path)}
    _check_alike(("base", "vector"), (unflatten(weights), vector))
    changes = flatten(vector)
    return override(
        base,
        unflatten(
            {
                path: (leaf.astype(jnp.float32) + scale * changes[path]).astype(leaf.dtype)
                for path, leaf in weights.items()
            }
        ),
    )


def _check_vectors(vectors: Sequence[Variables]) -> None:
    if not vectors:
        raise ValueError("there are no task vectors; give at least one")
    _check_alike([f"vector {number}" for number in range(len(vectors))], vectors)


def _check_alike(names: Sequence[str], trees: Sequence[Variables]) -> None:
    """Raises a ValueError that lists every path at which a tree is not as the first."""
    first = flatten(trees[0])
    problems = []
    for name, tree in zip(names[1:], trees[1:], strict=True):
        other = flatten(tree)
        problems += [f"{path} is missing in {name}" for path in first.keys() - other.keys()]
        problems += [f"{path} is missing in {names[0]}" for path in other.keys() - first.keys()]
        problems += [
            f"{path} is {first[path].shape} in {names[0]} and {leaf.shape} in {name}"
            for path, leaf in other.items()
            if path in first and leaf.shape != first[path].shape
        ]
    if problems:
        raise ValueError("the trees differ:\n  " + "\n  ".join(sorted(problems)))
