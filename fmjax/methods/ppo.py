"""Proximal policy optimisation (Schulman, Wolski, Dhariwal, Radford & Klimov 2017,
arXiv:1707.06347) with generalised advantages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.environments import VectorEnvironment
from fmjax.methods.advantages import standardised
from fmjax.methods.policies import ActorCritic, entropy, log_probability
from fmjax.methods.policy_gradient import clipped_losses
from fmjax.methods.reinforce import check_coefficients
from fmjax.methods.rollouts import Learner, advantages_of, collect, summed
from fmjax.tree import merge
from fmjax.types import Aux, Batch, LossFn, Mean, StepFn, TrainState, Variables

ATTACHES = ("loss", "program")


def loss(
    policy: ActorCritic,
    *,
    clip: float = 0.2,
    value_clip: float | None = None,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.0,
    normalise: bool = True,
) -> LossFn:
    """The clipped surrogate, the values' squared error and the entropy (equations 7, 9).

    Batches have ``observations`` [B, ...], ``actions`` int [B], ``log_probabilities`` [B] and
    ``values`` [B] as they were when acting, ``advantages`` [B], ``returns`` [B] and, where some
    rows do not count, ``weight`` [B].

    Args:
        policy: gives logits and values.
        clip: epsilon, how far from 1 the ratio of probabilities is followed.
        value_clip: how far the values are followed from what they were; the larger of both errors
            counts. None does not clip: the paper has no such thing, its first implementation did
            (Engstrom et al. 2020, arXiv:2005.12729, section 3).
        value_coefficient: of half the squared error.
        entropy_coefficient: of the entropy, which is taken from the loss.
        normalise: whether advantages are standardised over the batch (a piece of an accumulated
            one, or a device's of a mapped one, by itself).

    Returns:
        A LossFn; among its metrics ``approximate_kl``, the mean of ``ratio - 1 - log ratio``, and
        ``clipped``, the share of ratios beyond `clip`.

    Raises:
        ValueError: clips that are not positive, or negative coefficients.
    """
    check_coefficients(value_coefficient, entropy_coefficient)
    if not clip > 0 or (value_clip is not None and not value_clip > 0):
        raise ValueError(f"clip={clip} and value_clip={value_clip} must be positive")

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, values = policy(variables, jnp.asarray(batch["observations"]))
        advantages, returns = jnp.asarray(batch["advantages"]), jnp.asarray(batch["returns"])
        weight = jnp.asarray(batch.get("weight", jnp.ones_like(returns)))
        if normalise:
            advantages = standardised(advantages, weight)
        log_ratio = log_probability(logits, jnp.asarray(batch["actions"]))
        log_ratio = log_ratio - batch["log_probabilities"]
        ratio = jnp.exp(log_ratio)
        actor = Mean.of(clipped_losses(log_ratio, advantages, clip, clip), weight)
        squares = jnp.square(values - returns)
        if value_clip is not None:
            old = jnp.asarray(batch["values"])
            close = old + jnp.clip(values - old, -value_clip, value_clip)
            squares = jnp.maximum(squares, jnp.square(close - returns))
        critic, spread = Mean.of(0.5 * squares, weight), Mean.of(entropy(logits), weight)
        total = actor.value + value_coefficient * critic.value - entropy_coefficient * spread.value
        metrics = {
            "policy_loss": actor,
            "value_loss": critic,
            "entropy": spread,
            "approximate_kl": Mean.of(ratio - 1 - log_ratio, weight),
            "clipped": Mean.of(jnp.abs(ratio - 1) > clip, weight),
        }
        return total, Aux(actor.weight, metrics, {})

    return loss_fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the agent acts and learns.

    Args:
        steps: T, of each environment in an iteration.
        epochs: how often each step is learnt from.
        minibatches: train steps an epoch.
        discount, decay: gamma and lambda of the advantages.
    """

    steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    decay: float = 0.95

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("steps", "epochs", "minibatches")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={getattr(self, name)} must be from 0 to 1"
            for name in ("discount", "decay")
            if not 0 <= getattr(self, name) <= 1
        ]
        if problems:
            raise ValueError("; ".join(problems))


def iteration(
    environment: VectorEnvironment, policy: ActorCritic, step: StepFn, settings: Settings
) -> Callable[[Learner], tuple[Learner, dict[str, Mean]]]:
    """T steps of B environments, and epochs of train steps on them (algorithm 1), as one program.

    Args:
        environment: B copies.
        policy: what acts.
        step: from `make_train_step` over `loss`.
        settings: see there.

    Returns:
        ``(learner) -> (learner, metrics)``, to be compiled; see `fmjax.methods.rollouts.learner`.

    Raises:
        ValueError: the steps do not divide into the minibatches.
    """
    size = settings.steps * environment.num_environments
    if size % settings.minibatches:
        raise ValueError(
            f"{settings.steps} steps of {environment.num_environments} environments do not divide "
            f"into minibatches={settings.minibatches}; choose a divisor of {size}"
        )

    def run(learner: Learner) -> tuple[Learner, dict[str, Mean]]:
        act_rng, shuffle_rng = jax.random.split(jax.random.fold_in(learner.rng, learner.step))
        variables = merge(learner.train.trainable, learner.train.non_trainable)

        def act(observations: Array, rng: Array) -> Array:
            return jax.random.categorical(rng, policy(variables, observations)[0])

        worlds, done, episodes = collect(environment, act, learner.worlds, act_rng, settings.steps)
        rows = {"observations": _flat(done.observations), "actions": _flat(done.actions)}
        logits, values = policy(variables, rows["observations"])
        _, final_values = policy(variables, _flat(done.final_observations))
        shape = done.rewards.shape
        advantages = advantages_of(
            done, values.reshape(shape), final_values.reshape(shape),
            settings.discount, settings.decay,
        ).reshape(-1)  # fmt: skip
        rows |= {
            "log_probabilities": log_probability(logits, rows["actions"]),
            "values": values,
            "advantages": advantages,
            "returns": advantages + values,
        }

        def epoch(train: TrainState, rng: Array):
            order = jax.random.permutation(rng, size).reshape(settings.minibatches, -1)

            def one(train: TrainState, places: Array):
                return step(train, {name: x[places] for name, x in rows.items()})

            return jax.lax.scan(one, train, order)

        train, metrics = jax.lax.scan(
            epoch, learner.train, jax.random.split(shuffle_rng, settings.epochs)
        )
        metrics = summed(summed(metrics))
        return Learner(learner.step + 1, train, worlds, learner.rng), metrics | episodes

    return run


def _flat(x: Array) -> Array:
    """[T, B, ...] -> [T B, ...]."""
    return x.reshape(-1, *x.shape[2:])
