"""Which matrices of weights a method of compression takes, by globs over the paths of leaves."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp

from fmjax.nn.compact import Compact
from fmjax.tree import flatten
from fmjax.types import Variables, one_text

ATTACHES = ("variables",)

KERNELS = ("params/*/kernel",)
HEAD = ("params/head/*",)
"""What usually stays as it is: little, new, and every output passes it."""


def matrices(
    variables: Variables, targets: Sequence[str], but: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The leaves that match by path, and what is wrong with them.

    Args:
        variables: of a model, or what of them trains.
        targets: globs over paths of leaves; ``*`` matches any part of a path.
        but: globs of those that are not meant.
    """
    if wrong := [*one_text("targets", targets), *one_text("but", but)]:
        return {}, wrong
    flat = flatten(variables)
    problems = [
        f"{target!r} matches no leaf; paths are like {next(iter(flat), '(none)')!r}"
        for target in targets
        if not any(fnmatchcase(path, target) for path in flat)
    ]
    chosen = {
        path: leaf
        for path, leaf in flat.items()
        if any(fnmatchcase(path, target) for target in targets)
        and not any(fnmatchcase(path, no) for no in but)
    }
    if not chosen and not problems:
        problems.append(f"nothing is left of targets={list(targets)} without {list(but)}")
    for path, leaf in chosen.items():
        if isinstance(leaf, Compact):
            problems.append(f"{path} is no plain array any more, but {type(leaf).__name__}")
        elif leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{path} is {leaf.dtype} {leaf.shape}, no matrix of weights")
    return chosen, problems
