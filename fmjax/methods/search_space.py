"""What a search of hyper-parameters draws from, written as data: a range or choices by name.

See `fmjax.methods.hyper_parameter_search`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmjax.data.files import raise_problems
from fmjax.metrics.optional import optional_library

if TYPE_CHECKING:
    import optuna

ATTACHES = ("program",)

Space = Mapping[str, Mapping[str, Any]]
"""By name ``{"low": 1e-5, "high": 1e-3, "log": True}``, of whole numbers if both ends are, perhaps
with a ``step``; or ``{"choices": [16, 32]}``. Plain JSON."""


def optuna_library(module: str = "") -> Any:
    """Optuna, or a module of it: ".samplers"."""
    return optional_library("optuna" + module, "Optuna", "search")


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _problems_of(name: str, said: Mapping[str, Any]) -> list[str]:
    """What is wrong with one entry of a space."""
    if "choices" in said:
        choices = list(said["choices"])
        problems = [f"{name}: {key!r} is not for choices" for key in said if key != "choices"]
        if not choices or len({repr(choice) for choice in choices}) < len(choices):
            problems.append(f"{name}: choices {choices} must be one or more, each once")
        if odd := [c for c in choices if not (c is None or isinstance(c, (bool, int, float, str)))]:
            problems.append(f"{name}: choices {odd} are not numbers, words, truth values or None")
        return problems
    known = ("low", "high", "log", "step")
    problems = [f"{name}: {key!r} is not one of {known}" for key in said if key not in known]
    low, high, log, step = (said.get(key) for key in known)
    if not (_is_number(low) and _is_number(high)):
        problems.append(f"{name}: low={low!r} and high={high!r} must be numbers; or give choices")
        return problems
    assert low is not None
    assert high is not None
    if low >= high:
        problems.append(f"{name}: low={low} must be below high={high}")
    if log not in (None, True, False):
        problems.append(f"{name}: log={log!r} must be true or false")
    elif log and low <= 0:
        problems.append(f"{name}: low={low} must be positive on a logarithmic scale")
    if step is not None:
        whole = isinstance(low, int) and isinstance(high, int)
        if not _is_number(step) or step <= 0 or (whole and not isinstance(step, int)):
            kind = "a positive whole number" if whole else "a positive number"
            problems.append(f"{name}: step={step!r} must be {kind}")
        elif step > high - low:
            problems.append(f"{name}: step={step} is wider than the range")
        if log:
            problems.append(f"{name}: a logarithmic scale has no step")
    return problems


def distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """A space in Optuna's words.

    Raises:
        ValueError: entries that do not fit `Space`; all of them are listed.
        ImportError: Optuna is not installed.
    """
    problems = [problem for name, said in space.items() for problem in _problems_of(name, said)]
    if not space:
        problems.append("it is empty: give at least one name with a range or choices")
    raise_problems("search space", problems)
    kinds = optuna_library(".distributions")
    found = {}
    for name, said in space.items():
        options = {key: value for key, value in said.items() if value is not None}
        if "choices" in said:
            found[name] = kinds.CategoricalDistribution(said["choices"])
        elif isinstance(said["low"], int) and isinstance(said["high"], int):
            found[name] = kinds.IntDistribution(**options)
        else:
            found[name] = kinds.FloatDistribution(**options)
    return found


def holds(said: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is in an entry of a space."""
    if "choices" in said:
        return value in said["choices"]
    return _is_number(value) and said["low"] <= value <= said["high"]
