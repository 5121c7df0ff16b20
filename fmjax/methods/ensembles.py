"""Ensembles: several models as one, trained in one program, and how unsure they are together.

Deep ensembles (Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474), whose members differ
in their initial weights, random numbers and order of data; dropout at prediction as an ensemble
(Gal & Ghahramani 2016, arXiv:1506.02142); weights of members that fit validation data: stacking
(Wolpert 1992, "Stacked generalization"; Breiman 1996, "Stacked regressions"; of distributions, Yao
et al. 2018, arXiv:1704.02030) and greedy selection (Caruana et al. 2004, "Ensemble selection from
libraries of models")::

    states = member_states(lambda rng: init_state(new_weights(rng), tx, rng), keys)
    step = jit_step(member_step(make_train_step(gradient(loss), tx), see=own_batch))
    states = fit(states, step, SideBySide(streams), steps=steps)
    members = jax.jit(of_members(log_probabilities(model), axis=-2))
    unsure = uncertainty(members(states, batch))

What is frozen is there once, whatever the number of members: adapters of one base are an ensemble
at the price of their own size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tasks.apply import apply_fn
from fmjax.tree import flatten, is_running, map_with_path, merge, split
from fmjax.types import Batch, Mean, Output, PyTree, StepFn, TrainState, Variables

ATTACHES = ("program",)


def member_states(make: Callable[[Array], TrainState], rngs: Array) -> TrainState:
    """K states side by side: trainable leaves, running statistics and optimizers [K, ...].

    What is frozen is there once.

    Args:
        make: a key -> the state of one member, by `init_state`; what it freezes must not depend on
            the key.
        rngs: typed keys [K].
    """
    axes = TrainState(
        step=None,  # pyright: ignore[reportArgumentType]
        trainable=0,  # pyright: ignore[reportArgumentType]
        non_trainable=map_with_path(
            lambda path, _: 0 if is_running(path) else None,
            jax.eval_shape(make, rngs[0]).non_trainable,
        ),
        opt_state=0,  # pyright: ignore[reportArgumentType]
        rng=0,  # pyright: ignore[reportArgumentType]
    )
    return jax.vmap(make, out_axes=axes)(rngs)


def member_state(states: TrainState, number: int) -> TrainState:
    """One member's own state, to go on with, or to save.

    Raises:
        ValueError: there is no such member.
    """
    count = states.rng.shape[0]
    if not 0 <= number < count:
        raise ValueError(f"number={number} is none of the {count} members, from 0")
    running, frozen = split(states.non_trainable, is_running)
    own = jax.tree.map(lambda x: x[number], (states.trainable, running, states.opt_state))
    return TrainState(states.step, own[0], merge(own[1], frozen), own[2], states.rng[number])


def same_batch(batch: Batch, member: Array) -> Batch:
    """Every member sees every batch."""
    return batch


def own_batch(batch: Batch, member: Array) -> Batch:
    """Leaves are [K, B, ...], each member's own: see `fmjax.data.side_by_side.SideBySide`."""
    return {name: jnp.asarray(leaf)[member] for name, leaf in batch.items()}


def member_step(
    step: StepFn,
    *,
    see: Callable[[Batch, Array], Batch] = same_batch,
    at_once: int | None = None,
) -> StepFn:
    """The step of K members in one program, compiled once for all of them.

    For `jit_step` and `fit`; its metrics are means over all members.

    Args:
        step: from `make_train_step`, not compiled.
        see: (batch, a member's number, int32 []) -> what that member sees of it.
        at_once: members that are computed side by side; None for all. On CPUs convolutions of
            several members' kernels are slow, and 1 is faster.

    Raises:
        ValueError: `at_once` is below 1; when called, a step that moves frozen leaves which are
            not running statistics.
    """
    _check_at_once(at_once)

    def together(states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        running, frozen = split(states.non_trainable, is_running)

        def one(own: Any) -> Any:
            trainable, running, opt_state, rng, number = own
            state = TrainState(states.step, trainable, merge(running, frozen), opt_state, rng)
            state, metrics = step(state, see(batch, number))
            running, others = split(state.non_trainable, is_running)
            before = flatten(frozen)
            if moved := [path for path, x in flatten(others).items() if x is not before[path]]:
                raise ValueError(
                    f"the step moves {moved}, which all members have in common; give it an "
                    "uncompiled step that moves nothing but what trains and running statistics"
                )
            return (state.trainable, running, state.opt_state, state.rng), metrics

        numbers = jnp.arange(states.rng.shape[0])
        own = (states.trainable, running, states.opt_state, states.rng, numbers)
        (trainable, running, opt_state, rng), metrics = _each(one, own, at_once)
        non_trainable = merge(running, frozen)
        states = TrainState(states.step + 1, trainable, non_trainable, opt_state, rng)
        return states, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    return together


def of_members(
    fn: Callable[[Variables, Batch], Array], *, axis: int = 1, at_once: int | None = None
) -> Callable[[TrainState, Batch], Array]:
    """``(states, batch) -> results`` of all K members, which are along `axis`.

    Args:
        fn: ``(variables, batch) -> [B, ...]``, such as `log_probabilities`.
        axis: of the results; -2 for what `uncertainty` reads.
        at_once: as in `member_step`.
    """
    _check_at_once(at_once)

    def all_of(states: TrainState, batch: Batch) -> Array:
        running, frozen = split(states.non_trainable, is_running)

        def one(own: tuple[Variables, Variables]) -> Array:
            return fn(merge(merge(own[0], own[1]), frozen), batch)

        return jnp.moveaxis(_each(one, (states.trainable, running), at_once), 0, axis)

    return all_of


def _check_at_once(at_once: int | None) -> None:
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once} must be at least 1, or None for all side by side")


def _each(fn: Callable[[Any], PyTree], own: PyTree, at_once: int | None) -> PyTree:
    """fn of each of K, side by side or in turns: leaves [K, ...]."""
    if at_once is None:
        return jax.vmap(fn)(own)
    return jax.lax.map(fn, own, batch_size=None if at_once == 1 else at_once)


def log_probabilities(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, ..., C]``: log-probabilities of classes, float32.

    Args:
        model: whose ``logits`` are of classes that exclude each other.
    """
    apply = apply_fn(model)

    def fn(variables: Variables, batch: Batch) -> Array:
        return _of_classes(apply(variables, batch, None, train=False)[0])

    return fn


def _of_classes(output: Output) -> Array:
    if output.logits is None:
        raise ValueError("the model gives no logits; load it with a head for classes")
    return jax.nn.log_softmax(output.logits, axis=-1)


def dropout_log_probabilities(
    model: Any, samples: int, *, at_once: int | None = None
) -> Callable[[Variables, Batch, Array], Array]:
    """``(variables, batch, rng) -> [B, ..., S, C]``: of S passes with dropout, in one program.

    Monte Carlo dropout (Gal & Ghahramani 2016, arXiv:1506.02142, equation 6). Everything that
    drops in training drops; a model that drops nothing gives S times the same.

    Args:
        model: as `log_probabilities`, trained with dropout.
        samples: S.
        at_once: passes that are computed side by side; None for all, which takes the memory of S
            batches.

    Raises:
        ValueError: numbers below 1; when called, a model with batch normalisation.
    """
    _check_at_once(at_once)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    apply = apply_fn(model)

    def fn(variables: Variables, batch: Batch, rng: Array) -> Array:
        if any(map(is_running, flatten(variables))):
            raise ValueError(
                "the model has running statistics: with dropout on, its batch normalisation would "
                "take the batch's own, and an example's prediction depend on the others; use "
                "another model, or a deep ensemble"
            )

        def one(key: Array) -> Array:
            return _of_classes(apply(variables, batch, key, train=True)[0])

        return jnp.moveaxis(_each(one, jax.random.split(rng, samples), at_once), 0, -2)

    return fn


def mean_log_probabilities(log_probabilities: Array | np.ndarray, weights: Any = None) -> Array:
    """The log of the members' mean probabilities: [..., K, C] -> [..., C].

    Args:
        log_probabilities: of each member.
        weights: [K], at least 0 and 1 in all (see `stacking_weights`); None weighs all alike.
    """
    members = jnp.asarray(log_probabilities)
    if weights is None:
        weights = jnp.full(members.shape[-2], 1 / members.shape[-2])
    # Logs of weights of 0 are -inf, whose exponential is the 0 that is meant.
    return jax.nn.logsumexp(members + jnp.log(jnp.asarray(weights))[:, None], axis=-2)


class Uncertainty(NamedTuple):
    """What an ensemble predicts, and how unsure it is of it; entropies in nats.

    Args:
        log_probabilities: [..., C], of the mixture.
        predictive_entropy: [...], of the mixture: all uncertainty.
        expected_entropy: [...], the members' mean: of the data, as members agree on it.
        mutual_information: [...], the difference: of the weights, BALD's score (Houlsby et al.
            2011, arXiv:1112.5745, equation 2).
        disagreement: [...], the share of pairs of members that predict different classes.
    """

    log_probabilities: Array
    predictive_entropy: Array
    expected_entropy: Array
    mutual_information: Array
    disagreement: Array


def uncertainty(log_probabilities: Array | np.ndarray) -> Uncertainty:
    """The mixture of K members of the same weight, and where its uncertainty is from.

    Args:
        log_probabilities: [..., K, C], from `of_members` or `dropout_log_probabilities`.
    """
    members = jnp.asarray(log_probabilities)
    count, classes = members.shape[-2:]
    mixture = mean_log_probabilities(members)
    # The mean divergence from the mixture: unlike the difference of two entropies it loses no
    # digits where members agree.
    information = jnp.mean(_expected(members, members - mixture[..., None, :]), axis=-1)
    votes = jnp.sum(jax.nn.one_hot(jnp.argmax(members, axis=-1), classes), axis=-2)  # [..., C]
    same = jnp.sum(votes * (votes - 1), axis=-1)
    return Uncertainty(
        log_probabilities=mixture,
        predictive_entropy=-_expected(mixture, mixture),
        expected_entropy=-jnp.mean(_expected(members, members), axis=-1),
        mutual_information=jnp.maximum(information, 0.0),
        disagreement=1 - same / (count * (count - 1)) if count > 1 else jnp.zeros_like(same),
    )


def _expected(log_probabilities: Array, values: Array) -> Array:
    """The mean of values over classes; those of probability 0 do not count."""
    probabilities = jnp.exp(log_probabilities)
    return jnp.sum(jnp.where(probabilities > 0, probabilities * values, 0.0), axis=-1)


def stacking_weights(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    tolerance: float = 1e-6,
    steps: int = 10_000,
) -> np.ndarray:
    """Weights of the mixture that held-out labels are likeliest under, float64 [K], 1 in all.

    Stacking of predictive distributions (arXiv:1704.02030, equation 4), a concave problem, by
    expectation maximisation: each weight becomes its member's mean share in the mixture's
    probability of the label. The largest ratio of a member's probability to the mixture's, in the
    mean, less 1, bounds how far the likelihood is from the best.

    Args:
        log_probabilities: [N, K, C], on data that no member was trained on.
        labels: int [N].
        tolerance: nats an example, from the best.
        steps: at most; after t of them the distance is at most ``log(K) / t``.

    Raises:
        ValueError: shapes or labels that do not fit, or labels that all members exclude.
    """
    of_label = _of_label(log_probabilities, labels)  # [N, K]
    # Members are compared within a row alone: its largest probability may be taken as 1.
    scaled = np.exp(of_label - of_label.max(axis=1, keepdims=True))
    weights = np.full(scaled.shape[1], 1 / scaled.shape[1])
    for _ in range(steps):
        ratios = np.mean(scaled / (scaled @ weights)[:, None], axis=0)  # [K]
        if ratios.max() <= 1 + tolerance:
            break
        weights *= ratios
    return weights / weights.sum()


def greedy_weights(
    log_probabilities: np.ndarray, labels: np.ndarray, *, rounds: int = 50
) -> np.ndarray:
    """Weights of members that were added one by one, each time the one that helps most: [K].

    Ensemble selection with replacement (Caruana et al. 2004, sections 2 and 2.1) by the likelihood
    of held-out labels: of the growing ensembles the best one, in which a member counts as often as
    it was chosen.

    Args:
        log_probabilities: [N, K, C], on data that no member was trained on.
        labels: int [N].
        rounds: how many are added.

    Raises:
        ValueError: shapes or labels that do not fit, labels that all members exclude, or no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    of_label = _of_label(log_probabilities, labels)
    scaled = np.exp(of_label - of_label.max(axis=1, keepdims=True))  # [N, K]
    total, counts = np.zeros(len(scaled)), np.zeros(scaled.shape[1])
    best, best_counts = -np.inf, counts
    for number in range(1, rounds + 1):
        with np.errstate(divide="ignore"):
            scores = np.mean(np.log((total[:, None] + scaled) / number), axis=0)  # [K]
        chosen = int(np.argmax(scores))
        total += scaled[:, chosen]
        counts[chosen] += 1
        if number == 1 or scores[chosen] > best:  # a first one may exclude a label, with -inf
            best, best_counts = scores[chosen], counts.copy()
    return best_counts / best_counts.sum()


def _of_label(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each member's log-probability of the label, float64 [N, K]."""
    rows, labels = np.asarray(log_probabilities, np.float64), np.asarray(labels)
    if rows.ndim != 3 or 0 in rows.shape or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"log_probabilities {rows.shape} and labels {labels.shape} must be [N, K, C] and [N]"
        )
    problems = []
    outside = labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= rows.shape[2]
    if outside:
        problems.append(f"labels must be whole numbers from 0 to {rows.shape[2] - 1}")
    if np.isnan(rows).any() or rows.max() > 1e-3:
        problems.append(
            f"log_probabilities are nan or above 0 (at most {rows.max():.3g}): take log_softmax"
        )
    if not problems:
        found = np.take_along_axis(rows, labels[:, None, None], axis=2)[:, :, 0]
        if not (lost := int((~np.isfinite(found).any(axis=1)).sum())):
            return found
        problems.append(f"{lost} labels have probability 0 for every member")
    raise ValueError("; ".join(problems))
