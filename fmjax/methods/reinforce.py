"""REINFORCE with a baseline (Williams 1992, "Simple statistical gradient-following algorithms for
connectionist reinforcement learning"; Sutton & Barto 2018, 13.4).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.environments import VectorEnvironment
from fmjax.methods.advantages import discounted_returns, standardised
from fmjax.methods.policies import ActorCritic, entropy, log_probability
from fmjax.methods.rollouts import Learner, begin, collect
from fmjax.tree import merge
from fmjax.types import Aux, Batch, LossFn, Mean, StepFn, Variables

ATTACHES = ("loss", "program")


def loss(
    policy: ActorCritic,
    *,
    baseline: bool = True,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.0,
    normalise: bool = False,
) -> LossFn:
    """``-log pi(action) * (return - baseline)``, and the baseline's squared error.

    Batches have ``observations`` [B, ...], ``actions`` int [B], ``returns`` [B] and ``weight`` [B],
    0 for steps that do not count.

    Args:
        policy: gives logits and values; the values are the baseline.
        baseline: whether it is used; without one the values do not train, and `iteration` is to
            take none either (``bootstrap=False``).
        value_coefficient: of half the squared error of the baseline.
        entropy_coefficient: of the policy's entropy, taken from the loss (Williams & Peng 1991).
        normalise: whether advantages are standardised over the batch, as in `fmjax.methods.ppo`.

    Raises:
        ValueError: coefficients below 0.
    """
    check_coefficients(value_coefficient, entropy_coefficient)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, values = policy(variables, jnp.asarray(batch["observations"]))
        returns = jnp.asarray(batch["returns"])
        weight = jnp.asarray(batch.get("weight", jnp.ones_like(returns)))
        advantages = returns - jax.lax.stop_gradient(values) if baseline else returns
        if normalise:
            advantages = standardised(advantages, weight)
        actor = Mean.of(
            -log_probability(logits, jnp.asarray(batch["actions"])) * advantages, weight
        )
        spread = Mean.of(entropy(logits), weight)
        total = actor.value - entropy_coefficient * spread.value
        metrics = {"policy_loss": actor, "entropy": spread}
        if baseline:
            critic = Mean.of(0.5 * jnp.square(values - returns), weight)
            total = total + value_coefficient * critic.value
            metrics["value_loss"] = critic
        return total, Aux(actor.weight, metrics, {})

    return loss_fn


def check_coefficients(value_coefficient: float, entropy_coefficient: float) -> None:
    """Refuses coefficients that turn a term around.

    Raises:
        ValueError: one is negative.
    """
    if value_coefficient < 0 or entropy_coefficient < 0:
        raise ValueError(
            f"value_coefficient={value_coefficient} and entropy_coefficient={entropy_coefficient} "
            "must not be negative"
        )


def iteration(
    environment: VectorEnvironment,
    policy: ActorCritic,
    step: StepFn,
    *,
    steps: int,
    discount: float = 0.99,
    bootstrap: bool = True,
) -> Callable[[Learner], tuple[Learner, dict[str, Mean]]]:
    """One episode in each environment, from its beginning, and one train step on all of them.

    An episode that is cut off, or longer than `steps`, is followed by its last value, or by none.

    Args:
        environment: B copies.
        policy: what acts.
        step: from `make_train_step` over `loss`.
        steps: T, the most steps of an episode; those after its end do not count.
        discount: gamma.
        bootstrap: whether the last value follows; False belongs to ``loss(..., baseline=False)``,
            whose values do not train.

    Returns:
        ``(learner) -> (learner, metrics)``, to be compiled; see `fmjax.methods.rollouts.learner`.
    """

    def run(learner: Learner) -> tuple[Learner, dict[str, Mean]]:
        first, later = jax.random.split(jax.random.fold_in(learner.rng, learner.step))
        variables = merge(learner.train.trainable, learner.train.non_trainable)

        def act(observations: Array, rng: Array) -> Array:
            return jax.random.categorical(rng, policy(variables, observations)[0])

        worlds = begin(environment, first)
        worlds, done, _ = collect(environment, act, worlds, later, steps)
        ends = (~done.continues).astype(jnp.int32)
        counts = (jnp.cumsum(ends, axis=0) - ends == 0).astype(jnp.float32)
        final_values = jnp.zeros_like(done.rewards)
        if bootstrap:
            final_values = jax.vmap(lambda x: policy(variables, x)[1])(done.final_observations)
        # Of an episode longer than T the last row is a cut, too.
        goes_on = done.continues.at[-1].set(False)
        returns = discounted_returns(
            done.rewards, discount * (1.0 - done.terminated),
            continues=goes_on, final_values=final_values,
        )  # fmt: skip
        batch = {
            "observations": done.observations,
            "actions": done.actions,
            "returns": returns,
            "weight": counts,
        }
        batch = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
        train, metrics = step(learner.train, batch)
        whole = jnp.sum(done.rewards * counts, 0)
        metrics["episode_return"] = Mean.of(whole, jnp.ones_like(whole))
        metrics["steps"] = Mean(counts.sum(), jnp.ones(()))
        return Learner(learner.step + 1, train, worlds, learner.rng), metrics

    return run
