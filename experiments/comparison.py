"""A method beside what it is compared with: every arm with every seed, in one table."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.config import write_json
from fmjax.perf.device import describe_machine
from fmjax.recipes.training import plain_settings
from fmjax.train.recording import writable_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How arms are compared."""

    output: Path
    """The folder of results.json; arms that are in it already are not run again."""
    seeds: int = 3
    """Runs of each arm."""


def drawn(examples: Any, count: int, seed: int) -> Any:
    """So many of the examples (all, if there are no more), drawn by the seed, in their order."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return examples.select(np.sort(order[:count]))


Arm = Callable[[int], Mapping[str, float]]
"""seed -> plain numbers: of one training run, measured on data held out."""


def compare(settings: Settings, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Runs what is missing, seed by seed, and returns what results.json holds.

    Args:
        settings: what the runs depend on, beside the seed.
        arms: by name, in the table's order; the baseline first.

    Returns:
        ``{"settings", "environment", "runs": {arm: {seed: numbers}}}``.

    Raises:
        ValueError: the folder has results of other settings, or there is nothing to run.
    """
    if settings.seeds < 1 or not arms:
        raise ValueError(f"seeds={settings.seeds}, arms={list(arms)}: give at least one of each")
    file = writable_folder(settings.output) / "results.json"
    identity = {
        name: value
        for name, value in plain_settings(settings).items()
        if name not in ("output", "seeds")
    }
    identity = json.loads(json.dumps(identity))  # as it is read back
    results: dict[str, Any] = {"settings": identity, "environment": describe_machine(), "runs": {}}
    if file.exists():
        earlier = json.loads(file.read_text("utf-8"))
        changed = {
            name: (earlier["settings"].get(name), identity.get(name))
            for name in earlier["settings"].keys() | identity.keys()
            if earlier["settings"].get(name) != identity.get(name)
        }
        if changed:
            raise ValueError(
                f"{file} has results of other settings (there, here): {changed}; "
                "choose another --output, or the same settings"
            )
        results["runs"] = earlier["runs"]
    for seed in range(settings.seeds):
        for name, arm in arms.items():
            runs = results["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            begun = time.perf_counter()
            runs[str(seed)] = {**arm(seed), "seconds": time.perf_counter() - begun}
            write_json(file, results)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in runs[str(seed)].items())
            print(f"{name}, seed {seed}: {shown}", flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """The arms' means over seeds, and standard deviations where there are several, as Markdown."""
    runs: Mapping[str, Mapping[str, Mapping[str, float]]] = results["runs"]
    keys = dict.fromkeys(
        key for by_seed in runs.values() for run in by_seed.values() for key in run
    )

    def cell(by_seed: Mapping[str, Mapping[str, float]], key: str) -> str:
        values = [run[key] for run in by_seed.values() if key in run]
        if not values:
            return ""
        mean = f"{statistics.fmean(values):.4g}"
        return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean

    rows = [["", *keys], ["---"] * (1 + len(keys))]
    rows += [[name, *(cell(by_seed, key) for key in keys)] for name, by_seed in runs.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def column(results: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    """One number of every arm, seed by seed."""
    return {
        name: [run[key] for run in by_seed.values() if key in run]
        for name, by_seed in results["runs"].items()
    }
