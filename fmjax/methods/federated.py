"""Federated learning: a server step whose gradient is what clients' own training has changed.

FedAvg (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1), FedProx (Li et al. 2020,
arXiv:1812.06127), FedAdagrad, FedAdam and FedYogi (Reddi et al. 2021, arXiv:2003.00295,
Algorithm 2). A round is one step of `make_train_step`: its batch is the sampled clients' data,
[clients, steps, batch, ...] (`fmjax.data.clients.client_batches`), its gradient the clients' mean
change with its sign turned, and its optimizer the server's::

    client = client_update(loss, optax.sgd(0.1))
    step = make_train_step(pseudo_gradient(client), optax.sgd(1.0))

is FedAvg; with ``optax.chain(proximal(mu), optax.sgd(0.1))`` for the client it is FedProx, with
``fed_adam(0.01)`` for the server FedAdam.

Only the trainable leaves travel, and running statistics, which are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.methods.privacy import Clip, add_noise, clip_by_norm, noise_problems, sum_over
from fmjax.train.step import gradient, make_train_step
from fmjax.tree import flatten, is_running, split
from fmjax.types import Aux, Batch, GradFn, LossFn, Mean, TrainState, Variables

ATTACHES = ("gradient", "update", "program")


class Update(NamedTuple):
    """What one client's training gives.

    Args:
        change: what was added to the trainable leaves, shaped as they are.
        running: new running statistics; ``{}`` if there are none.
        examples: the weights of all rows that it trained on, float32 []; an example counts once an
            epoch.
        metrics: of its steps: ``loss``, ``grad_norm`` and what the loss reports.
    """

    change: Variables
    running: Variables
    examples: Array
    metrics: dict[str, Mean]


class ClientFn(Protocol):
    """(trainable, non_trainable, batches [steps, batch, ...], rng) -> Update."""

    def __call__(
        self, trainable: Variables, non_trainable: Variables, batches: Batch, rng: Array
    ) -> Update: ...


def client_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    differentiate: Callable[[LossFn], GradFn] = gradient,
) -> ClientFn:
    """One client's training, an ordinary train step over its batches (ClientUpdate of Algorithm 1).

    The optimizer begins anew in every round. Batches without any weight (padding, to make clients'
    steps equal in number) are no steps: neither weights nor momenta nor random numbers move.

    Args:
        loss_fn: over one batch.
        tx: the client's optimizer, such as ``optax.sgd(0.1)``.
        differentiate: LossFn -> GradFn, such as `private_gradient` for privacy at the client.
    """
    step = make_train_step(differentiate(loss_fn), tx)

    def update(
        trainable: Variables, non_trainable: Variables, batches: Batch, rng: Array
    ) -> Update:
        start = TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            non_trainable=non_trainable,
            opt_state=tx.init(trainable),  # pyright: ignore[reportArgumentType]
            rng=rng,
        )
        weights = _weights(batches)  # [S, B]

        def body(state: TrainState, xs: tuple[Batch, Array]):
            batch, weight = xs
            new, metrics = step(state, batch)
            counts = jnp.any(weight != 0)
            state = jax.tree.map(lambda new, old: jnp.where(counts, new, old), new, state)
            return state, jax.tree.map(lambda x: jnp.where(counts, x, 0.0), metrics)

        end, metrics = jax.lax.scan(body, start, (dict(batches), weights))
        return Update(
            change=jax.tree.map(jnp.subtract, end.trainable, trainable),
            running=split(end.non_trainable, is_running)[0],
            examples=jnp.sum(weights),
            metrics=jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics),
        )

    return update


def pseudo_gradient(
    client: ClientFn,
    *,
    clients_at_once: int = 8,
    weigh: Callable[[Array], Array] = lambda examples: examples,
) -> GradFn:
    """The clients' mean change with its sign turned, for any Optax optimizer of the server.

    With ``optax.sgd(1.0)`` this is FedAvg: the new weights are the mean of the clients'. A client
    of no weight (dropped out, or padding) counts for nothing. The loss is the mean over all
    examples, each when it was trained on; so are the metrics.

    Batches have ``weight`` float [clients, steps, batch] and may have ``client`` int [clients]: a
    client's random numbers depend on that number and not on its place.

    Args:
        client: from `client_update`.
        clients_at_once: clients that train at the same time, side by side; a divisor of those in a
            batch. Groups without any weight are skipped.
        weigh: examples of a client -> its weight in the mean; ``jnp.sign`` weighs all alike.

    Raises:
        ValueError: when called, a number of clients that `clients_at_once` does not divide, or
            batches that are not [clients, steps, batch, ...], or no key.
    """
    _check_count(clients_at_once)

    def grad_fn(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        key = _key(rng)

        def one(row: tuple[Any, Array]) -> tuple[Variables, Variables, Array, dict[str, Mean]]:
            update = _trained(client, trainable, non_trainable, row, key)
            weight = jnp.where(update.examples > 0, weigh(update.examples), 0.0)
            return *_weighted((update.change, update.running), weight), weight, update.metrics

        rows, active = _rows(batch, clients_at_once)
        change, running, weight, metrics = sum_over(one, rows, active, clients_at_once)
        divisor = jnp.where(weight == 0, 1.0, weight)
        grads = jax.tree.map(lambda leaf, x: (-x / divisor).astype(leaf.dtype), trainable, change)
        old = split(non_trainable, is_running)[0]
        updates = jax.tree.map(
            lambda leaf, x: jnp.where(weight == 0, leaf, (x / divisor).astype(leaf.dtype)),
            old,
            running,
        )
        return grads, *_reported(metrics, weight, updates)

    return grad_fn


def private_pseudo_gradient(
    client: ClientFn,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_weight: float,
    weigh: Callable[[Array], Array] = jnp.sign,
    clients_at_once: int = 8,
    clip: Clip = clip_by_norm,
) -> GradFn:
    """`pseudo_gradient` with privacy for clients: what all data of one of them tell is bounded.

    DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, with the estimator of a fixed
    denominator): ``-(sum_k clip(weight_k * change_k) + noise) / expected_weight``, the noise of
    standard deviation ``noise_multiplier * clip_norm``. Each client must take part independently
    with the same probability, ``client_batches(..., independent=True)``; epsilon is then
    `fmjax.methods.accounting.epsilon_of`, with clients in the place of examples.

    Args:
        client: from `client_update`; of a loss without running statistics.
        clip_norm: the bound of a client's weighted change in global norm.
        noise_multiplier: standard deviation of the noise in units of `clip_norm`.
        expected_weight: the expected sum of the sampled clients' weights.
        weigh: examples of a client -> its weight; by default all weigh 1. The paper's is
            ``lambda examples: jnp.minimum(examples / cap, 1)``.
        clients_at_once, clip: as elsewhere.

    Raises:
        ValueError: an argument out of its range; when called, as `pseudo_gradient`, running
            statistics, which would travel without noise, or no key.
    """
    _check_count(clients_at_once)
    problems = [
        f"{name}={value} must be {rule}"
        for name, value, rule, right in [
            ("clip_norm", clip_norm, "above 0", clip_norm > 0),
            ("noise_multiplier", noise_multiplier, "at least 0", noise_multiplier >= 0),
            ("expected_weight", expected_weight, "above 0", expected_weight > 0),
        ]
        if not right
    ]
    problems += noise_problems(noise_multiplier, clip_norm)
    if problems:
        raise ValueError("; ".join(problems))

    def grad_fn(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        if running := sorted(flatten(split(non_trainable, is_running)[0])):
            raise ValueError(
                f"the model has running statistics ({running[:3]}), which would leave the clients "
                "without noise; take a model with layer or group normalisation"
            )
        noise_key, client_key = jax.random.split(_key(rng))

        def one(row: tuple[Any, Array]) -> tuple[Variables, Array, dict[str, Mean]]:
            update = _trained(client, trainable, non_trainable, row, client_key)
            weight = jnp.where(update.examples > 0, weigh(update.examples), 0.0)
            clipped, norm = clip(_weighted(update.change, weight), clip_norm)
            clipped = jax.tree.map(lambda x: jnp.where(jnp.isfinite(norm), x, 0.0), clipped)
            metrics = {
                **update.metrics,
                "clipped": Mean.of(norm > clip_norm, weight != 0),
                "change_norm": Mean.of(norm, weight != 0),
            }
            return clipped, weight, metrics

        rows, active = _rows(batch, clients_at_once)
        change, weight, metrics = sum_over(one, rows, active, clients_at_once)
        if noise_multiplier:
            change = add_noise(change, noise_key, noise_multiplier * clip_norm)
        grads = jax.tree.map(
            lambda leaf, x: (-x / expected_weight).astype(leaf.dtype), trainable, change
        )
        return grads, *_reported(metrics, weight, {})

    return grad_fn


def proximal(mu: float) -> optax.GradientTransformation:
    """FedProx's pull towards the weights that the round began with: ``mu * (w - w_round)``.

    The gradient of ``mu / 2 * |w - w_round|^2`` (arXiv:1812.06127, equation 2), first in the chain
    of a client's optimizer. The reported loss is without it.

    Raises:
        ValueError: `mu` is negative.
    """
    if not mu >= 0:
        raise ValueError(f"mu={mu} must be at least 0")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        pulled = jax.tree.map(lambda g, w, w0: g + mu * (w - w0), updates, params, state)
        return pulled, state

    # Copies: outside of a client the state may be donated, and one buffer must not be twice.
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update)


Rate = float | Callable[[Any], Any]
"""A learning rate, or an Optax schedule of the round."""


class Moments(NamedTuple):
    """The state of the adaptive server optimizers, both shaped as the weights."""

    mean: Any
    square: Any


def fed_adagrad(learning_rate: Rate, *, tau: float = 1e-3) -> optax.GradientTransformation:
    """FedAdagrad: ``v += change^2``, without momentum (arXiv:2003.00295, Algorithm 2)."""
    return _adaptive(learning_rate, 0.0, tau, lambda v, square: v + square)


def fed_adam(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """FedAdam: ``v = b2 * v + (1 - b2) * change^2`` (arXiv:2003.00295, Algorithm 2).

    Unlike Adam's its moments are not corrected for how they begin.
    """
    return _adaptive(learning_rate, b1, tau, lambda v, square: b2 * v + (1 - b2) * square)


def fed_yogi(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """FedYogi: ``v -= (1 - b2) * change^2 * sign(v - change^2)`` (Algorithm 2 there)."""
    return _adaptive(
        learning_rate,
        b1,
        tau,
        lambda v, square: v - (1 - b2) * square * jnp.sign(v - square),
    )


def _adaptive(
    learning_rate: Rate, b1: float, tau: float, second: Callable[[Array, Array], Array]
) -> optax.GradientTransformation:
    """Algorithm 2: ``x += learning_rate * m / (sqrt(v) + tau)``; v begins at tau^2, its least."""
    if not (0 <= b1 < 1 and tau > 0):
        raise ValueError(f"b1={b1} must be in [0, 1) and tau={tau} above 0")

    def init(params: Any) -> Moments:
        return Moments(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda x: jnp.full_like(x, tau**2), params),
        )

    def update(updates: Any, state: Moments, params: Any = None) -> tuple[Any, Moments]:
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: second(v, jnp.square(g)), state.square, updates)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), mean, square)
        return steps, Moments(mean, square)

    return optax.chain(
        optax.GradientTransformation(init, update),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate),
    )


def _trained(
    client: ClientFn,
    trainable: Variables,
    non_trainable: Variables,
    row: tuple[Any, Array],
    rng: Array,
) -> Update:
    batches, number = row
    return client(trainable, non_trainable, batches, jax.random.fold_in(rng, number))


def _key(rng: Array | None) -> Array:
    if rng is None:
        raise ValueError("rng is None, but clients draw their random numbers from the step's key")
    return rng


def _rows(batch: Batch, clients_at_once: int) -> tuple[tuple[dict[str, Any], Array], Array]:
    """Each client's batches and number, and which of them take part."""
    batches = {name: leaf for name, leaf in batch.items() if name != "client"}
    weights = _weights(batches)  # [K, S, B]
    if weights.ndim != 3:
        raise ValueError(
            f"weight is {list(weights.shape)}; the batch of a round is [clients, steps, batch, "
            "...], see fmjax.data.clients.client_batches"
        )
    count = len(weights)
    if count % clients_at_once:
        raise ValueError(
            f"the round has {count} clients, no multiple of clients_at_once={clients_at_once}"
        )
    numbers = jnp.asarray(batch.get("client", jnp.arange(count)), jnp.int32)  # [K]
    return (batches, numbers), jnp.any(weights != 0, axis=(1, 2))


def _weights(batch: Batch) -> Array:
    if "weight" not in batch:
        raise ValueError(f"the batch has no 'weight', only {sorted(batch)}")
    return jnp.asarray(batch["weight"], jnp.float32)


def _weighted(tree: Any, weight: Array) -> Any:
    """float32; what was computed without any weight must not count, even nan."""
    return jax.tree.map(lambda x: jnp.where(weight == 0, 0.0, x.astype(jnp.float32) * weight), tree)


def _reported(metrics: dict[str, Mean], weight: Array, updates: Variables) -> tuple[Array, Aux]:
    """The clients' mean loss over their steps, and the rest but their gradients' norms."""
    metrics = dict(metrics)
    loss, norm = metrics.pop("loss"), metrics.pop("grad_norm")
    return loss.value, Aux(weight, metrics | {"client_grad_norm": norm}, updates)


def _check_count(clients_at_once: int) -> None:
    if clients_at_once < 1:
        raise ValueError(f"clients_at_once={clients_at_once} must be at least 1")
