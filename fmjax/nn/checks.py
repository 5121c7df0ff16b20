"""What families refuse alike: configs that no model can have, and heads that theirs has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from fmjax.nn.activation import ACTIVATIONS


def family_of(thing: Any) -> str:
    """The name of the family's file, for errors, of its config or model."""
    return type(thing).__module__.rsplit(".", 1)[-1]


def refuse(config: Any, problems: Sequence[str]) -> None:
    """Raises what is wrong with a config, the rates and activations among its fields included.

    Args:
        config: whose fields with "drop" in their names are rates, or None, and those that end in
            "_act" activations.
        problems: what the family has found.

    Raises:
        ValueError: all that is wrong.
    """
    problems = list(problems)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "drop" in field.name and value is not None and not 0 <= value < 1:
            problems.append(f"{field.name}={value} must be at least 0 and below 1")
        if field.name.endswith("_act") and value not in ACTIVATIONS:
            problems.append(f"{field.name}={value!r} is not known; use one of {list(ACTIVATIONS)}")
    if problems:
        raise ValueError(f"{family_of(config)} config: " + "; ".join(problems))


def check_head(model: Any, heads: Collection[str]) -> None:
    """Refuses a model whose head is none of its family's.

    Raises:
        ValueError: it is not.
    """
    if model.head not in heads:
        raise ValueError(f"{family_of(model)} has no head {model.head!r}; it has {sorted(heads)}")
