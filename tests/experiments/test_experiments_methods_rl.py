"""The experiments of reinforcement learning, by their ordinary arguments, for seconds."""

import json

import numpy as np
import pytest
from scripts import experiment

import fmjax


@pytest.mark.slow
def test_maze(tmp_path, capsys):
    """Everything finds the shorter of two ways, which breadth-first search has measured."""
    drawing = "S...\n.##.\n.#..\n...G"
    arguments = [
        *("--output", str(tmp_path), "--drawing", drawing, "--seeds", "1"),
        *("--steps", "6000", "--max-steps", "60"),
    ]
    experiment("maze").main(arguments)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 4
    for name, by_seed in runs.items():
        assert by_seed["0"]["path"] == by_seed["0"]["shortest path"] == 6, name
    softmax = runs["Q-learning, softmax"]["0"]
    assert softmax["regret"] > 10
    assert softmax["regret an episode, last tenth"] < 0.5
    assert (tmp_path / "maze.png").stat().st_size > 10_000
    assert "SARSA, softmax" in capsys.readouterr().out
    with pytest.raises(ValueError, match="results of other settings"):
        experiment("maze").main([*arguments, "--slip", "0.1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    ["dqn", "ppo", "reinforce"],
)
def test_cartpole(arm, tmp_path, capsys):
    """A few iterations, and better than falling at once; the actor is left as a folder."""
    pytest.importorskip("gymnasium")
    experiment("cartpole").main(
        [
            *("--output", str(tmp_path), "--seeds", "1", "--width", "16", "--arms", arm),
            *("--episodes", "4", "--ppo-iterations", "12", "--dqn-iterations", "8"),
            *("--reinforce-iterations", "30", "--max-steps", "200"),
        ]
    )
    run = json.loads((tmp_path / "results.json").read_text())["runs"][arm]["0"]
    assert 8 <= run["lowest return"] <= run["mean return"] <= 500
    curve = np.array(json.loads((tmp_path / arm / "seed-0" / "curve.json").read_text()))
    assert curve[-1] > 1.2 * curve[0]  # at random about 22
    assert "mean return" in capsys.readouterr().out
    assert "<svg" in (tmp_path / f"{arm}.svg").read_text()
    model, variables = fmjax.load(tmp_path / arm / "seed-0")
    assert model.config.id2label == ("left", "right")
    assert model.apply(variables, np.zeros((1, 4), np.float32)).logits.shape == (1, 2)


def test_arms_that_are_not_known_are_refused(tmp_path):
    with pytest.raises(ValueError, match="are not known; choose from"):
        experiment("cartpole").main(["--output", str(tmp_path), "--arms", "a2c"])
