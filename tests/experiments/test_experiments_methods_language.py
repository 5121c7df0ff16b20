"""Experiments of preferences and of reinforcement, on a few lines and tiny models."""

import json

import pytest
from scripts import experiment


@pytest.fixture
def documents(tmp_path):
    """Arguments that name text files with a sentence a line."""
    words = (
        "the old new red long film story plot scene actor is was good bad quiet and then".split()
    )
    arguments = []
    for number, name in enumerate(("data", "val", "test")):
        lines = [
            " ".join(words[(number + 3 * line + 5 * n + line * n) % 17] for n in range(13))
            for line in range(20)
        ]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(["\n".join(lines)] * 2) + "\n")
        arguments += [f"--{name}", str(tmp_path / f"{name}.txt")]
    return arguments


@pytest.mark.slow
def test_dpo_style(documents, tmp_path, capsys):
    run = tmp_path / "run"
    experiment("dpo_style").main(
        [
            *("--output", str(run), *documents, "--seeds", "1", "--vocab-size", "300"),
            *("--layers", "1", "--width", "16", "--pretraining", "5", "--length", "40"),
            *("--pairs", "8", "--held-out", "8", "--batch-size", "4", "--evaluations", "1"),
            *("--text-batches", "1"),
        ]
    )
    runs = json.loads((run / "results.json").read_text())["runs"]
    assert list(runs) == ["before", "chosen only", "DPO", "ORPO", "KTO"]
    for by_seed in runs.values():
        assert 0 <= by_seed["0"]["accuracy"] <= 1
        assert by_seed["0"]["perplexity"] > 1
    assert runs["before"]["0"]["nats more"] == 0
    assert runs["DPO"]["0"]["nats more"] != 0
    assert runs["KTO"]["0"]["nats more"] != 0
    assert "| DPO" in capsys.readouterr().out
    assert (run / "curves.png").exists()


@pytest.mark.slow
def test_grpo_arithmetic(tmp_path, capsys):
    run = tmp_path / "run"
    experiment("grpo_arithmetic").main(
        [
            *("--output", str(run), "--seeds", "1", "--layers", "1", "--width", "16"),
            *("--labelled", "16", "--warmup-steps", "2", "--turns", "2", "--prompts", "4"),
            *("--group", "2", "--held-out", "16"),
        ]
    )
    runs = json.loads((run / "results.json").read_text())["runs"]
    assert list(runs) == ["before", "own samples", "GRPO", "PPO"]
    for by_seed in runs.values():
        assert 0 <= by_seed["0"]["exact (most probable)"] <= 1
        assert 1 <= by_seed["0"]["tokens"] <= 4
    assert runs["before"]["0"]["nats away"] == pytest.approx(0, abs=1e-6)
    assert "| GRPO" in capsys.readouterr().out
    assert (run / "curves.png").exists()


@pytest.mark.slow
def test_sums_are_encoded():
    module = experiment("grpo_arithmetic")
    prompts = module.prompts_of(module.all_sums()[:3])
    for ids, answer in zip(prompts.input_ids, prompts.examples, strict=True):
        first, second = module.decode(ids[ids != 0]).removesuffix("=").split("+")
        assert int(first) + int(second) == int(answer)
    batch = module.answered(module.all_sums()[:3])
    for labels, answer in zip(batch["labels"], prompts.examples, strict=True):
        assert module.decode(labels[labels != -100]) == answer + "."
    assert len({tuple(pair) for pair in module.all_sums()}) == 10_000
