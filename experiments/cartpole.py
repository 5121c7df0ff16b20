"""DQN, PPO and REINFORCE hold up the pole of CartPole-v1.

    python experiments/cartpole.py --output runs/cartpole

They learn in our own compiled environment and are judged, acting greedily, over 100 episodes of
gymnasium's. The folder gets results.json, learning curves and each agent as a Hugging Face folder.

Mean returns of 100 episodes, of the default command (2 minutes on 16 cores, about 15 on 2 busy
ones; the settings were chosen on these seeds, on another machine):

|           | seed 0 | seed 1 | seed 2 | with the last weights in the place of those kept |
| ---       | ---    | ---    | ---    | ---                                              |
| DQN       | 500    | 500    | 496.9  | 500, 500, 113.6                                  |
| PPO       | 500    | 500    | 500    | 500, 500, 343.9                                  |
| REINFORCE | 500    | 500    | 499.4  | 500, 500, 492.9                                  |

Another machine's rounding gives other runs: there DQN had 500 with these and 482.8 and 500 with
seeds 3 and 4.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from comparison import Settings as ComparisonSettings
from comparison import compare, table

import fmjax
from fmjax.config import write_json
from fmjax.environments import CartPole, GymnasiumVector, Vectorised, check_environment
from fmjax.methods import dqn, ppo, reinforce
from fmjax.methods.policies import ActorCritic, Network, actor_critic, network
from fmjax.methods.rollouts import Act, first_returns, learner
from fmjax.models import mlp
from fmjax.report.charts import FIRST, Line, line_chart
from fmjax.train import gradient, init_state, make_train_step
from fmjax.tree import together
from fmjax.types import TrainState, Variables

ACTIONS = ("left", "right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ComparisonSettings):
    """Three agents on one task."""

    arms: tuple[str, ...] = ("dqn", "ppo", "reinforce")
    """Which of them."""
    width: int = 64
    """Of each network's two hidden layers."""
    max_steps: int = 500
    """Of an episode; gymnasium's is always 500."""
    episodes: int = 100
    """Of gymnasium's, that judge an agent."""
    dqn_iterations: int = 50
    """Of 250 steps in 8 environments each, with two train steps after each step."""
    ppo_iterations: int = 200
    """Of 128 steps in 8 environments each."""
    reinforce_iterations: int = 150
    """Of 16 episodes each."""


def perceptron(settings: Settings, outputs: tuple[str, ...], seed: int, **options: Any) -> Any:
    """A network of observations and its random variables."""
    config = mlp.Config(hidden_sizes=(settings.width, settings.width), id2label=outputs, **options)
    return fmjax.create("mlp", config, head="classification", rng=jax.random.key(seed))


def falling(peak: float, steps: int, norm: float) -> optax.GradientTransformation:
    """Adam with a learning rate that falls to 0, and gradients of a norm at most."""
    rate = optax.linear_schedule(peak, 0.0, steps)
    return optax.chain(optax.clip_by_global_norm(norm), optax.adam(rate))


class Trained(NamedTuple):
    """What a run leaves: weights at its end, the best ones on the way, and the learning curve."""

    last: Variables
    best: Variables
    curve: list[float]


def run(
    settings: Settings, iteration: Callable[[Any], Any], state: Any, count: int, acting: Network
) -> Trained:
    """Iterations of a compiled program; the weights are kept that did best when tried greedily.

    Agents that have solved the task go on changing and may lose it again. They are tried after
    every 25th part of the run, in our own environment and with a key of their own: gymnasium's
    episodes, which judge, choose nothing. Of equally good weights the latest are kept.
    """
    copies = Vectorised(CartPole(settings.max_steps), 100)
    compiled, curve = jax.jit(iteration, donate_argnums=0), []
    tried = jax.jit(
        lambda variables, rng: first_returns(
            copies, greedy(acting, variables), rng, settings.max_steps
        ).mean()
    )
    best, highest = variables_of(state.train), -np.inf
    for number in range(1, count + 1):
        state, metrics = compiled(state)
        mean = metrics["episode_return"]
        curve.append(float(mean.value) if float(mean.weight) else float("nan"))
        if number % max(1, count // 25) == 0 or number == count:
            variables = variables_of(state.train)
            reached = float(tried(variables, jax.random.key(20_000 + number)))
            if reached >= highest:
                # A copy: the state is donated.
                best, highest = jax.tree.map(jnp.copy, variables), reached
    return Trained(variables_of(state.train), best, curve)


def greedy(acting: Network, variables: Variables) -> Act:
    """The action of the highest logit."""
    return lambda observations, rng: jnp.argmax(acting(variables, observations), axis=-1)


def variables_of(train: TrainState) -> Variables:
    """What trained; these networks read nothing besides."""
    return train.trainable


def judge(settings: Settings, trained: Trained, acting: Network, seed: int) -> dict[str, float]:
    """Returns of greedy episodes in gymnasium's CartPole-v1."""
    environment = GymnasiumVector.make("CartPole-v1", settings.episodes)
    judged = jax.jit(
        lambda variables: first_returns(
            environment, greedy(acting, variables), jax.random.key(10_000 + seed), 500
        )
    )
    best, last = (np.asarray(judged(variables)) for variables in (trained.best, trained.last))
    environment.vector.close()
    return {
        "mean return": float(best.mean()),
        "lowest return": float(best.min()),
        "mean return, last weights": float(last.mean()),
    }


def train_dqn(settings: Settings, seed: int) -> dict[str, float]:
    """Double DQN with prioritised replay and returns of 3 steps."""
    environment, steps = Vectorised(CartPole(settings.max_steps), 8), 250
    whole = settings.dqn_iterations * steps
    options = dqn.Settings(
        epsilon=optax.linear_schedule(1.0, 0.02, whole // 5),
        num_steps=3,
        capacity=100_000,
        batch_size=128,
        warm_up=1_000,
        updates=2,
        priority_exponent=0.6,
        beta=optax.linear_schedule(0.4, 1.0, whole),
    )
    model, variables = perceptron(settings, ACTIONS, seed, hidden_act="relu")
    q_values, tx = network(model), falling(1e-3, whole * options.updates, norm=10.0)
    step = make_train_step(gradient(dqn.loss(q_values, polyak=0.02)), tx)
    first, second = jax.random.split(jax.random.key(seed))
    state = init_state(dqn.with_target(variables, options.batch_size), tx, first)
    agent = dqn.agent(environment, state, options, second)
    iteration = dqn.iteration(environment, q_values, step, options, steps)
    trained = run(settings, iteration, agent, settings.dqn_iterations, q_values)
    save(settings, "dqn", seed, model, trained, trained.best["params"])
    return judge(settings, trained, q_values, seed) | {"steps": 8 * whole}


def actor_and_critic(settings: Settings, seed: int) -> tuple[Any, ActorCritic, Network, Variables]:
    """(the acting model, the function of both, that of the actor alone, their variables)."""
    actor, actor_variables = perceptron(settings, ACTIONS, 2 * seed, head_gain=0.01)
    critic, critic_variables = perceptron(settings, ("value",), 2 * seed + 1)
    variables = together(policy=actor_variables, value=critic_variables)
    policy = actor_critic(actor, critic)
    return actor, policy, lambda variables, x: policy(variables, x)[0], variables


def train_ppo(settings: Settings, seed: int) -> dict[str, float]:
    """PPO with generalised advantages."""
    environment, options = Vectorised(CartPole(settings.max_steps), 8), ppo.Settings()
    model, policy, acting, variables = actor_and_critic(settings, seed)
    tx = falling(1e-3, settings.ppo_iterations * options.epochs * options.minibatches, norm=0.5)
    step = make_train_step(gradient(ppo.loss(policy, entropy_coefficient=0.01)), tx)
    first, second = jax.random.split(jax.random.key(seed))
    state = learner(environment, init_state(variables, tx, first), second)
    iteration = ppo.iteration(environment, policy, step, options)
    trained = run(settings, iteration, state, settings.ppo_iterations, acting)
    save(settings, "ppo", seed, model, trained, trained.best["params"]["policy"])
    return judge(settings, trained, acting, seed) | {
        "steps": settings.ppo_iterations * options.steps * 8
    }


def train_reinforce(settings: Settings, seed: int) -> dict[str, float]:
    """REINFORCE on whole episodes, with a baseline."""
    environment = Vectorised(CartPole(settings.max_steps), 16)
    model, policy, acting, variables = actor_and_critic(settings, seed)
    tx = falling(5e-3, settings.reinforce_iterations, norm=0.5)
    loss = reinforce.loss(policy, normalise=True, entropy_coefficient=0.01)
    step = make_train_step(gradient(loss), tx)
    first, second = jax.random.split(jax.random.key(seed))
    state = learner(environment, init_state(variables, tx, first), second)
    iteration = reinforce.iteration(environment, policy, step, steps=settings.max_steps)
    trained = run(settings, iteration, state, settings.reinforce_iterations, acting)
    save(settings, "reinforce", seed, model, trained, trained.best["params"]["policy"])
    return judge(settings, trained, acting, seed) | {
        "steps": settings.reinforce_iterations * settings.max_steps * 16
    }


def save(
    settings: Settings, name: str, seed: int, model: Any, trained: Trained, params: Variables
) -> None:
    """The acting network as a Hugging Face folder, and the learning curve."""
    folder = settings.output / name / f"seed-{seed}"
    fmjax.save(folder, model, {"params": params})
    write_json(folder / "curve.json", trained.curve)


TRAINERS = {"dqn": train_dqn, "ppo": train_ppo, "reinforce": train_reinforce}


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints its table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    if unknown := sorted(set(settings.arms) - TRAINERS.keys()):
        raise ValueError(f"arms {unknown} are not known; choose from {list(TRAINERS)}")
    check_environment(CartPole(settings.max_steps))

    arms = {name: partial(TRAINERS[name], settings) for name in settings.arms}
    results = compare(settings, arms)
    draw(settings)
    print(table(results))


def draw(settings: Settings) -> None:
    """Each agent's learning curves, seed by seed, as an SVG file."""
    for name in settings.arms:
        lines = []
        for seed in range(settings.seeds):
            file = settings.output / name / f"seed-{seed}" / "curve.json"
            curve = np.array(json.loads(file.read_text("utf-8")), float)
            there = np.isfinite(curve)
            lines.append(
                Line(f"seed {seed}", np.flatnonzero(there), curve[there], FIRST, noisy=False)
            )
        chart = line_chart(
            f"cartpole-{name}",
            lines,
            y_label="mean return of ended episodes",
            description=f"{name}: return over the iterations of training, one curve a seed",
        )
        (settings.output / f"{name}.svg").write_text(chart, "utf-8")


if __name__ == "__main__":
    main()
