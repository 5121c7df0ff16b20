"""Mazes drawn as text: worlds of cells, walls and a goal (Sutton & Barto 2018, example 8.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque

import jax.numpy as jnp
import numpy as np

from fmjax.environments.finite import FiniteEnvironment, FiniteMDP

WALL, FREE, START, GOAL = "#", ".", "S", "G"
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""What the actions add to row and column: up, right, down, left."""


@dataclasses.dataclass(frozen=True)
class Maze:
    """Cells that are not walls are states, numbered row by row; outside the drawing is wall.

    Args:
        drawing: lines of ``#`` wall, ``.`` free, ``S`` start, ``G`` goal; of several starts each
            episode draws one, and any goal ends it.
        slip: the probability of going at a right angle instead, half of it to either side.
        step_reward: of every step.
        goal_reward: added by a step that reaches a goal.

    Raises:
        ValueError: lines of different lengths, other signs, no start or no goal, a start that no
            goal can be reached from, or a slip that is no probability.
    """

    drawing: str
    slip: float = 0.0
    step_reward: float = -1.0
    goal_reward: float = 0.0

    def __post_init__(self) -> None:
        lines, problems = self.lines, []
        signs = set("".join(lines))
        if len({len(line) for line in lines}) != 1:
            problems.append(f"lines have the lengths {sorted({len(line) for line in lines})}")
        if unknown := signs - {WALL, FREE, START, GOAL}:
            problems.append(f"signs {sorted(unknown)} are not known; use # . S G")
        problems += [f"there is no {sign}" for sign in (START, GOAL) if sign not in signs]
        if not 0 <= self.slip <= 1:
            problems.append(f"slip={self.slip} must be from 0 to 1")
        if not np.isfinite([self.step_reward, self.goal_reward]).all():
            problems.append("rewards are not finite")
        if not problems:
            distances = self.distances()
            problems += [
                f"from the start in row {row}, column {column} no goal can be reached"
                for row, column in self.cells
                if lines[row][column] == START and distances[row, column] < 0
            ]
        if problems:
            raise ValueError("maze: " + "; ".join(problems))

    @functools.cached_property
    def lines(self) -> list[str]:
        """The drawing's lines without empty ones around."""
        return [line.strip() for line in self.drawing.strip().splitlines()]

    @functools.cached_property
    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of each state."""
        return [
            (row, column)
            for row, line in enumerate(self.lines)
            for column, sign in enumerate(line)
            if sign != WALL
        ]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.lines), len(self.lines[0])

    def _neighbour(self, cell: tuple[int, int], move: tuple[int, int]) -> tuple[int, int]:
        """Where a move leads: walls and the edge leave one where one is."""
        row, column = cell[0] + move[0], cell[1] + move[1]
        inside = 0 <= row < self.size[0] and 0 <= column < self.size[1]
        return (row, column) if inside and self.lines[row][column] != WALL else cell

    def distances(self) -> np.ndarray:
        """Fewest moves to a goal, int [rows, columns], by breadth-first search; -1 where none."""
        found = np.full(self.size, -1)
        queue = deque(cell for cell in self.cells if self.lines[cell[0]][cell[1]] == GOAL)
        for cell in queue:
            found[cell] = 0
        while queue:
            cell = queue.popleft()
            for move in MOVES:
                before = self._neighbour(cell, move)
                if found[before] < 0:
                    found[before] = found[cell] + 1
                    queue.append(before)
        return found

    def mdp(self) -> FiniteMDP:
        """The maze as arrays; of next states where nothing slips."""
        number = {cell: i for i, cell in enumerate(self.cells)}
        goal = np.array([self.lines[row][column] == GOAL for row, column in self.cells])
        following = np.array(
            [[number[self._neighbour(cell, move)] for move in MOVES] for cell in self.cells]
        )
        rewards = self.step_reward + self.goal_reward * goal[following]
        if not self.slip:
            transitions = following.astype(np.int32)
        else:
            sure = np.eye(len(self.cells), dtype=np.float32)[following]  # [S, A, S]
            aside = (np.roll(sure, 1, axis=1) + np.roll(sure, -1, axis=1)) / 2
            transitions = (1 - self.slip) * sure + self.slip * aside
            rewards = self.step_reward + self.goal_reward * (transitions @ goal)
        return FiniteMDP(
            jnp.asarray(transitions), jnp.asarray(rewards, jnp.float32), jnp.asarray(goal)
        )

    def environment(self, max_steps: int) -> FiniteEnvironment:
        """Episodes from the starts, each as likely as the others."""
        starts = np.array([self.lines[row][column] == START for row, column in self.cells])
        return FiniteEnvironment(self.mdp(), jnp.asarray(starts / starts.sum()), max_steps)

    def drawn(self, numbers: np.ndarray, elsewhere: float = np.nan) -> np.ndarray:
        """Numbers [S] of the states on the grid [rows, columns]."""
        grid = np.full(self.size, elsewhere)
        for cell, number in zip(self.cells, numbers, strict=True):
            grid[cell] = number
        return grid
