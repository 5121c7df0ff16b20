"""Nested dicts of arrays, addressed by leaf path: ``"params/layers_0/attn/query/kernel"``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.types import PyTree, Variables


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path, in the tree's order. Empty dicts vanish.

    >>> flatten({"params": {"head": {"bias": 1}}})
    {'params/head/bias': 1}
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through the leaf {parent!r}")
        node[name] = leaf
    return tree


def split(tree: Variables, predicate: Callable[[str], bool]) -> tuple[Variables, Variables]:
    """(leaves whose path satisfies the predicate, the others), both nested as before."""
    flat = flatten(tree)
    chosen = {path: leaf for path, leaf in flat.items() if predicate(path)}
    others = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(others)


def merge(first: Variables, second: Variables) -> Variables:
    """The union of two trees that share no leaf; the inverse of `split`."""
    left, right = flatten(first), flatten(second)
    if shared := left.keys() & right.keys():
        raise ValueError(f"both trees have {sorted(shared)}; use override() to replace leaves")
    return unflatten(left | right)


def override(tree: Variables, updates: Variables) -> Variables:
    """`tree` with the leaves of `updates` in place of its own; new leaves are refused."""
    flat, new = flatten(tree), flatten(updates)
    if unknown := sorted(new.keys() - flat.keys()):
        raise ValueError(f"updates for {unknown}, which the tree does not have")
    return unflatten(flat | new)


def together(**parts: Variables) -> Variables:
    """Variables of several networks as one tree: ``params/policy/...``, ``params/value/...``."""
    result: Variables = {}
    for name, variables in parts.items():
        for collection, tree in variables.items():
            result.setdefault(collection, {})[name] = tree
    return result


def part(variables: Variables, name: str) -> Variables:
    """The inverse of `together`, for one network."""
    return {
        collection: tree[name] for collection, tree in variables.items() if name in tree
    }  # fmt: skip


def cast_as(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves in the dtypes of another tree's."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), tree, like)


def map_with_path(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`fn(path, leaf)` over any pytree, its dataclass fields and indices joined into the path."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(path_of(keys), leaf), tree)


def path_of(keys: tuple[Any, ...]) -> str:
    """A jax key path as a string: dict keys, attribute names and indices joined by "/"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


_LAYER = re.compile(r"^(.*/)?layers_(\d+)/(.*)$")


def stack_layers(tree: Variables) -> Variables:
    """``layers_{i}/x`` [...] for all i become ``layers/x`` [L, ...], the form a scan reads."""
    flat = flatten(tree)
    groups: dict[str, dict[int, Any]] = {}
    stacked = {}
    for path, leaf in flat.items():
        if place := stacked_place(path):
            name, layer = place
            groups.setdefault(name, {})[layer] = leaf
            stacked[name] = None  # keeps the order of first appearance
        else:
            stacked[path] = leaf
    for name, layers in groups.items():
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"{name}: layers {sorted(layers)} are not 0..{len(layers) - 1}")
        stacked[name] = _stack([layers[i] for i in range(len(layers))])
    return unflatten(stacked)


def stacked_place(path: str) -> tuple[str, int] | None:
    """(``layers/x``, i) of a layer's own leaf ``layers_{i}/x``; None of any other."""
    match = _LAYER.match(path)
    return None if match is None else (f"{match[1] or ''}layers/{match[3]}", int(match[2]))


def unstack_layers(tree: Variables) -> Variables:
    """The inverse of `stack_layers`: one leaf a layer."""
    flat = {}
    for path, leaf in flatten(tree).items():
        layers = layer_paths(path, leaf.shape)
        if layers is None:
            flat[path] = leaf
        else:
            flat |= {layer: _take(leaf, i) for i, layer in enumerate(layers)}
    return unflatten(flat)


_STACKED = re.compile(r"^(.*/)?layers/(.*)$")


def is_stacked(path: str) -> bool:
    """Whether a leaf, or a module's leaves, are of all layers, along their first axis."""
    return _STACKED.match(path) is not None


def layer_paths(path: str, shape: tuple[int, ...]) -> list[str] | None:
    """The layers' own paths of a stacked leaf ``layers/x`` [L, ...]; None of any other."""
    match = _STACKED.match(path)
    if match is None:
        return None
    return [f"{match[1] or ''}layers_{i}/{match[2]}" for i in range(shape[0])]


def _stack(leaves: list[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    # A leaf may be several arrays that stand for one.
    return jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)


def _take(leaf: Any, index: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return jax.tree.map(lambda part: part[index], leaf)


def count(tree: PyTree) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def is_running(path: str) -> bool:
    """Whether a leaf of a model's variables is a running statistic, not a parameter."""
    return path.startswith("batch_stats/")


def count_parameters(variables: Variables) -> int:
    """How many parameters a model has, as published counts have it: running statistics are none."""
    return sum(leaf.size for path, leaf in flatten(variables).items() if not is_running(path))
