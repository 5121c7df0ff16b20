"""The way out of a maze: planned by value iteration, learnt by Q-learning and SARSA.

    python experiments/maze.py --output runs/maze

Value iteration knows the maze; learning only acts in it, and is judged by its regret: the steps
beyond those that the best policy needs. The folder gets results.json and maze.png, in which the
paths, policies and values are drawn.

Takes 2 minutes on 2 busy CPU cores. Over 5 seeds every learner's greedy path has the 29 steps of
the shortest one. Of 60,000 steps, regret: Q-learning 11,750 with softmax exploration and 12,530
with epsilon-greedy, which still loses 0.33 steps an episode at the end; SARSA 10,850.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import tyro
from comparison import Settings as ComparisonSettings
from comparison import compare, table

from fmjax.environments import FiniteEnvironment, Maze
from fmjax.environments.maze import MOVES, START, WALL
from fmjax.methods import tabular
from fmjax.methods.policies import boltzmann, epsilon_greedy

DRAWING = """
S...#.......#...
.##.#.#####.#.#.
..#...#...#.#.#.
#.#####.#.#.#.#.
..#.....#.#...#.
.##.#####.#####.
....#...#.....#.
.####.#.#####.#.
......#........G
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ComparisonSettings):
    """Planning and learning in one maze."""

    seeds: int = 5
    """Runs of each learner."""
    drawing: str = DRAWING
    """Lines of # wall, . free, S start, G goal."""
    slip: float = 0.0
    """The probability of going at a right angle instead."""
    steps: int = 60_000
    """Of each learner."""
    max_steps: int = 500
    """Of an episode."""
    temperature: float = 1.0
    """Of softmax exploration at first; it falls to a hundredth, as epsilon does from 1."""
    learning_rate: float = 0.5
    """What is learnt of each error."""


LEARNERS = {
    "Q-learning, softmax": (tabular.q_learning, boltzmann),
    "Q-learning, epsilon-greedy": (tabular.q_learning, epsilon_greedy),
    "SARSA, softmax": (tabular.sarsa, boltzmann),
}
DISCOUNT = 1.0  # every step costs 1, and every episode ends: values are steps to go


def planned(maze: Maze) -> tabular.Solution:
    """Value iteration's, with the shortest paths checked by a search where nothing slips.

    Raises:
        ValueError: it disagrees with the search, or did not come to an end.
    """
    solution = tabular.value_iteration(maze.mdp(), DISCOUNT)
    if float(solution.change) > 1e-3:
        raise ValueError(
            f"value iteration did not end: {float(solution.change):g} in the last sweep"
        )
    found = maze.distances()[tuple(zip(*maze.cells, strict=True))]
    reached = found >= 0  # cells without a way to the goal cost ever more
    if not maze.slip and not np.allclose(-np.asarray(solution.values)[reached], found[reached]):
        raise ValueError("value iteration and breadth-first search find different paths")
    return solution


def walk(maze: Maze, q_values: np.ndarray, limit: int) -> list[int]:
    """The states of the greedy path from the first start, by the likeliest transitions."""
    mdp = maze.mdp()
    transitions = np.asarray(mdp.transitions)
    following = transitions if mdp.deterministic else transitions.argmax(-1)
    starts = [i for i, (row, column) in enumerate(maze.cells) if maze.lines[row][column] == START]
    path = [starts[0]]
    while not mdp.terminal[path[-1]] and len(path) <= limit:
        path.append(int(following[path[-1], q_values[path[-1]].argmax()]))
    return path


@functools.cache
def learnt(settings: Settings, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q-values [S, A], returns of the episodes in their order) of one learner."""
    learn, _ = LEARNERS[name]
    environment, explore, rate = learning(settings, name)
    start = tabular.begin(environment, explore, jax.random.key(seed))
    state, trace = learn(
        environment, start, settings.steps,
        discount=DISCOUNT, explore=explore, learning_rate=rate,
    )  # fmt: skip
    ends = np.flatnonzero(trace.ended)
    sums = np.cumsum(np.asarray(trace.rewards, np.float64))[ends]
    return np.asarray(state.q_values), np.diff(sums, prepend=0.0)


@functools.cache
def learning(settings: Settings, name: str) -> tuple[FiniteEnvironment, tabular.Explore, Any]:
    """What a learner's program is compiled for, once for all seeds."""
    _, choose = LEARNERS[name]
    highest = settings.temperature if choose is boltzmann else 1.0
    amount = optax.exponential_decay(highest, settings.steps // 2, 0.01, end_value=highest / 100)
    environment = maze_of(settings).environment(settings.max_steps)
    return environment, tabular.exploring(choose, amount), lambda visits: settings.learning_rate


def maze_of(settings: Settings) -> Maze:
    """The maze that the settings draw."""
    return Maze(settings.drawing, slip=settings.slip)


def best_return(settings: Settings, solution: tabular.Solution) -> float:
    """Of the best policy, from where episodes start."""
    starts = np.asarray(maze_of(settings).environment(settings.max_steps).starts)
    return float(starts @ np.asarray(solution.values))


def run(
    settings: Settings, maze: Maze, solution: tabular.Solution, name: str, seed: int
) -> Mapping[str, float]:
    """One row of the table."""
    best = best_return(settings, solution)
    if name in LEARNERS:
        q_values, returns = learnt(settings, name, seed)
        late = returns[-max(1, len(returns) // 10) :]
        numbers = {
            "regret": float((best - returns).sum()),
            "regret an episode, last tenth": float((best - late).mean()),
            "episodes": len(returns),
        }
    else:
        q_values, numbers = np.asarray(solution.q_values), {"sweeps": int(solution.sweeps)}
    path = walk(maze, q_values, settings.max_steps)
    return {
        "path": len(path) - 1,
        "shortest path": int(maze.distances()[maze.cells[path[0]]]),
        **numbers,
    }


def draw(settings: Settings, maze: Maze, solution: tabular.Solution) -> None:
    """Values as colours, the best action of each cell as an arrow, the path as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    tables = {"value iteration": np.asarray(solution.q_values)}
    name = "Q-learning, softmax"
    tables[name], _ = learnt(settings, name, 0)
    terminal = np.asarray(maze.mdp().terminal)
    for ax, (title, q_values) in zip(axes, tables.items(), strict=False):
        values = np.where(terminal, 0.0, q_values.max(-1))
        image = ax.imshow(maze.drawn(values), cmap="viridis")
        figure.colorbar(image, ax=ax, label="value")
        for cell, row, ends in zip(maze.cells, q_values, terminal, strict=True):
            if not ends and np.ptp(row) > 0:
                down, right = 0.3 * np.array(MOVES[row.argmax()])
                ax.arrow(
                    cell[1] - right, cell[0] - down, right, down, head_width=0.2, color="white"
                )
        path = [maze.cells[i] for i in walk(maze, q_values, settings.max_steps)]
        rows, columns = zip(*path, strict=True)
        ax.plot(columns, rows, color="tab:red", linewidth=2)
        walls = [
            (r, c) for r, line in enumerate(maze.lines) for c, s in enumerate(line) if s == WALL
        ]
        if walls:
            rows, columns = zip(*walls, strict=True)
            ax.scatter(columns, rows, marker="s", color="black", s=60)
        ax.set_title(f"{title}: {len(path) - 1} steps")
        ax.set_axis_off()
    best = best_return(settings, solution)
    for name in LEARNERS:
        _, returns = learnt(settings, name, 0)
        axes[2].plot(np.cumsum(best - returns), label=name)
        axes[3].plot(-returns, label=name, linewidth=0.8)
    axes[2].set(xlabel="episode", ylabel="regret so far", title="steps beyond the best")
    axes[3].set(xlabel="episode", ylabel="steps", yscale="log", title="length of an episode")
    axes[3].axhline(-best, color="black", linestyle=":")
    axes[2].legend()
    figure.savefig(settings.output / "maze.png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints its table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    maze = maze_of(settings)
    solution = planned(maze)
    arms = {
        name: partial(run, settings, maze, solution, name)
        for name in ("value iteration", *LEARNERS)
    }
    results = compare(settings, arms)
    draw(settings, maze, solution)
    print(table(results))


if __name__ == "__main__":
    main()
