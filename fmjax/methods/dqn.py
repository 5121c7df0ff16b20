"""Deep Q-networks (Mnih et al. 2015, "Human-level control through deep reinforcement learning").

With the target's action chosen by the online network (van Hasselt, Guez & Silver 2016,
arXiv:1509.06461), prioritised replay (`fmjax.methods.replay`), returns of several steps, and
dueling streams where the network has them (`fmjax.methods.policies.dueling`).

The target network is a collection beside the weights, ``target``, moved by the loss's updates: the
train step is the ordinary one, and the temporal differences come out of it the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.environments import VectorEnvironment
from fmjax.methods import replay as memory
from fmjax.methods.policies import Network, epsilon_greedy
from fmjax.methods.replay import Replay
from fmjax.methods.rollouts import Trajectory, Worlds, advance, begin, summed
from fmjax.tree import merge
from fmjax.types import Aux, Batch, LossFn, Mean, StepFn, TrainState, Variables

ATTACHES = ("variables", "loss", "program")


def with_target(variables: Variables, batch_size: int) -> Variables:
    """The variables with a target network, which begins as a copy, and room for the last errors.

    Args:
        variables: of the network; everything in ``params`` is copied.
        batch_size: B, of the train step.

    Returns:
        The variables and the collections ``target`` and ``temporal_difference``; only ``params``
        trains, as `init_state` has it.
    """
    return {
        **variables,
        "target": jax.tree.map(jnp.copy, variables["params"]),
        "temporal_difference": {
            "updates": jnp.zeros((), jnp.int32),
            "errors": jnp.zeros(batch_size),
        },
    }


def loss(
    q_values: Network,
    *,
    double: bool = True,
    delta: float = 1.0,
    period: int | None = None,
    polyak: float | None = None,
) -> LossFn:
    """Huber's loss of the temporal differences.

    ``reward + discount * Q_target(next, argmax Q(next))``; without `double` the maximum of
    Q_target. Batches have the rows of `fmjax.methods.replay.several_steps`; ``importance`` [B]
    scales each row's loss (Schaul et al. 2016, algorithm 1), ``weight`` [B] marks padding by 0.

    Args:
        q_values: the network; its variables have `with_target`'s collections.
        double: whether the online network chooses the target's action.
        delta: where the loss becomes linear; Mnih et al. clip the error to 1.
        period: the target becomes the online network at every so many steps.
        polyak: or moves to it by this share at every step (Lillicrap et al. 2015,
            arXiv:1509.02971, section 3). One of the two must be given.

    Returns:
        A LossFn; its updates hold the target network, and the errors [B] of the batch.

    Raises:
        ValueError: both or none of `period` and `polyak`, or values out of range.
    """
    problems = []
    if (period is None) == (polyak is None):
        problems.append(f"period={period} and polyak={polyak}: give one of the two")
    if period is not None and period < 1:
        problems.append(f"period={period} must be at least 1")
    if polyak is not None and not 0 < polyak <= 1:
        problems.append(f"polyak={polyak} must be above 0 and at most 1")
    if not delta > 0:
        problems.append(f"delta={delta} must be positive")
    if problems:
        raise ValueError("; ".join(problems))

    def moved(old: Array, new: Array, updates: Array) -> Array:
        if polyak is not None:
            return old + polyak * (new - old)
        assert period is not None  # one of the two is given
        return jnp.where(updates % period == 0, new, old)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if not {"target", "temporal_difference"} <= variables.keys():
            raise ValueError(
                f"the variables have the collections {sorted(variables)}, no target network; make "
                "them by with_target"
            )
        known = variables["temporal_difference"]
        if known["errors"].shape != (len(batch["actions"]),):
            raise ValueError(
                f"the batch has {len(batch['actions'])} rows, and with_target was told "
                f"{known['errors'].shape[0]}; they must be the same, and a batch in one piece"
            )
        frozen = jax.lax.stop_gradient(variables)
        target = jax.tree.map(
            lambda old, new: moved(old, new, known["updates"]), frozen["target"], frozen["params"]
        )
        after = jnp.asarray(batch["next_observations"])
        targets = q_values({**frozen, "params": target}, after)
        online = q_values(frozen, after) if double else targets
        following = _at(targets, jnp.argmax(online, -1))
        discounts = jnp.asarray(batch["discounts"])
        # What follows a terminated step means nothing, even nan.
        rest = jnp.where(discounts == 0, 0.0, discounts * following)
        values = _at(
            q_values(variables, jnp.asarray(batch["observations"])), jnp.asarray(batch["actions"])
        )
        wanted = batch["rewards"] + rest
        errors = wanted - values
        weight = batch.get("weight", jnp.ones_like(errors))
        each = optax.losses.huber_loss(values, wanted, delta=delta) * batch.get("importance", 1.0)
        mean = Mean.of(each, weight)
        metrics = {
            "q_value": Mean.of(values, weight),
            "absolute_error": Mean.of(jnp.abs(errors), weight),
        }
        updates = {
            "target": target,
            "temporal_difference": {
                "updates": known["updates"] + 1,
                "errors": jax.lax.stop_gradient(errors),
            },
        }
        return mean.value, Aux(mean.weight, metrics, updates)

    return loss_fn


def _at(values: Array, actions: Array) -> Array:
    """[B, A], [B] -> [B]."""
    return jnp.take_along_axis(values, actions[:, None], axis=-1)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the agent acts and replays.

    Args:
        epsilon: step of the agent -> chance of a random action.
        discount: gamma.
        num_steps: n, of the returns.
        capacity: N, transitions that are kept.
        batch_size: B of the train step.
        warm_up: transitions before the first train step.
        updates: train steps after each step of the environments.
        priority_exponent: alpha; 0 replays uniformly.
        beta: step of the agent -> beta, which Schaul et al. anneal to 1.
    """

    epsilon: optax.Schedule
    discount: float = 0.99
    num_steps: int = 1
    capacity: int = 10_000
    batch_size: int = 64
    warm_up: int = 1_000
    updates: int = 1
    priority_exponent: float = 0.0
    beta: optax.Schedule = lambda step: 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("num_steps", "capacity", "batch_size", "warm_up", "updates")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.discount <= 1:
            problems.append(f"discount={self.discount} must be from 0 to 1")
        if self.priority_exponent < 0:
            problems.append(f"priority_exponent={self.priority_exponent} must not be negative")
        if self.warm_up > self.capacity:
            problems.append(
                f"warm_up={self.warm_up} is never reached with capacity={self.capacity}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Agent:
    """Everything a run needs to go on, as arrays; checkpoints take it as it is.

    Args:
        step: steps of the environments done, int32 [].
        train: the state of the train step.
        worlds: where the environments stand.
        window: the last n steps, [n, B, ...].
        replay: past transitions.
        rng: the key; it never changes: step t uses ``fold_in(rng, t)``.
    """

    step: Array
    train: TrainState
    worlds: Worlds
    window: Trajectory
    replay: Replay
    rng: Array


def agent(
    environment: VectorEnvironment, train: TrainState, settings: Settings, rng: Array
) -> Agent:
    """The agent before its first step.

    Args:
        environment: what it will act in.
        train: from `init_state` over `with_target`'s variables.
        settings: see there.
        rng: a typed key.

    Raises:
        ValueError: the replay holds less than one step of the environments.
    """
    first, later = jax.random.split(rng)
    worlds = begin(environment, first)
    size = (settings.num_steps, environment.num_environments)
    observations = jnp.zeros((*size, *worlds.observation.shape[1:]), worlds.observation.dtype)
    none = jnp.zeros(size, bool)
    window = Trajectory(
        observations, jnp.zeros(size, jnp.int32), jnp.zeros(size), none, none, observations
    )
    rows = jax.eval_shape(lambda: memory.several_steps(window, settings.discount))
    replay = memory.empty(rows, settings.capacity)
    # A copy: states are donated, and a state may be its own observation.
    return jax.tree.map(
        jnp.copy, Agent(jnp.zeros((), jnp.int32), train, worlds, window, replay, later)
    )


def iteration(
    environment: VectorEnvironment, q_values: Network, step: StepFn, settings: Settings, steps: int
) -> Callable[[Agent], tuple[Agent, dict[str, Mean]]]:
    """So many steps of the environments, each followed by train steps, as one program.

    Args:
        environment: B copies.
        q_values: the network that acts.
        step: from `make_train_step` over `loss`.
        settings: see there.
        steps: how many.

    Returns:
        ``(agent) -> (agent, metrics)``, to be compiled (``jax.jit(..., donate_argnums=0)``);
        metrics hold the train step's, and ``episode_return`` and ``episode_length`` of ended
        episodes.
    """

    def learn(agent: Agent, rng: Array) -> tuple[Agent, dict[str, Mean]]:
        def one(carry: tuple[TrainState, Replay], rng: Array):
            train, replay = carry
            places, rows = memory.sample(
                replay, rng, settings.batch_size,
                exponent=settings.priority_exponent, beta=jnp.asarray(settings.beta(agent.step)),
            )  # fmt: skip
            train, metrics = step(train, rows)
            errors = train.non_trainable["temporal_difference"]["errors"]
            return (train, memory.reprioritise(replay, places, errors)), metrics

        (train, replay), metrics = jax.lax.scan(
            one, (agent.train, agent.replay), jax.random.split(rng, settings.updates)
        )
        return dataclasses.replace(agent, train=train, replay=replay), summed(metrics)

    def one(agent: Agent, _: None) -> tuple[Agent, dict[str, Mean]]:
        choose, go, draw = jax.random.split(jax.random.fold_in(agent.rng, agent.step), 3)
        variables = merge(agent.train.trainable, agent.train.non_trainable)
        values = q_values(variables, agent.worlds.observation)
        epsilon = jnp.asarray(settings.epsilon(agent.step))
        actions = epsilon_greedy(values, epsilon, choose).astype(jnp.int32)
        worlds, happened, episodes = advance(environment, agent.worlds, actions, go)
        window = jax.tree.map(
            lambda old, new: jnp.concatenate([old[1:], new[None]]), agent.window, happened
        )
        rows = memory.several_steps(window, settings.discount)
        full = agent.step + 1 >= settings.num_steps
        replay = memory.add(agent.replay, rows, full)
        agent = Agent(agent.step + 1, agent.train, worlds, window, replay, agent.rng)
        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, agent, draw)[1]
        )
        agent, metrics = jax.lax.cond(
            replay.filled >= settings.warm_up, learn, lambda agent, _: (agent, nothing), agent, draw
        )
        return agent, metrics | episodes

    def run(agent: Agent) -> tuple[Agent, dict[str, Mean]]:
        agent, metrics = jax.lax.scan(one, agent, None, length=steps)
        return agent, summed(metrics)

    return run
