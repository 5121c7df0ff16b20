"""What trains, how fast and from when: by patterns, by biases alone, by depth.

- `matching`, `bitfit` (Ben Zaken et al. 2022, arXiv:2106.10199), `from_layer`: predicates of leaf
  paths for `fmjax.train.init_state`; what they leave out is frozen.
- `layerwise_decay` (Clark et al. 2020, arXiv:2003.10555, section 3.1 and its code; Bao et al. 2022,
  arXiv:2106.08254, appendix; "discriminative fine-tuning" of Howard & Ruder 2018, arXiv:1801.06146,
  section 3.2) and `gradual_unfreezing` (Howard & Ruder 2018, section 3.3): Optax transformations,
  which on stacked layers tell the layers of one leaf apart, as no split can.

Depth is a number of blocks: 0 for embeddings, i + 1 for block i, the number of all blocks + 1 for
what follows them (last norm, pooler, head, tables that all blocks read). Of an encoder-decoder the
encoder's blocks come first, then the decoder's; of stages one after the other, and what a stage has
beside its blocks counts with its first one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.tree import flatten, is_running, layer_paths, map_with_path, path_of
from fmjax.types import PyTree, Variables, one_text

ATTACHES = ("variables", "update")

_HEAD = "params/head/*"


def matching(patterns: Sequence[str], variables: Variables) -> Callable[[str], bool]:
    """What trains, by patterns of leaf paths such as ``"params/layers_0/attn/*/kernel"``.

    A leaf trains that matches one of them and none of those that begin with "!". ``*`` stands for
    anything, slashes too, ``?`` for one character, ``[01]`` for one of several.

    Args:
        patterns: at least one without "!".
        variables: the model's, perhaps abstract; the predicate is for their leaves.

    Raises:
        ValueError: a pattern matches nothing, all together match nothing or everything, or a
            running statistic, which has no gradient.
    """
    if wrong := one_text("patterns", patterns):
        raise ValueError("what trains: " + "; ".join(wrong))
    paths = list(flatten(variables))
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    problems = [
        f"{pattern!r} matches no leaf; {_nearest(pattern, paths)}"
        for pattern in (*wanted, *unwanted)
        if not _matched(pattern, paths)
    ]
    if not wanted:
        problems.append(f"{list(patterns)} name nothing that trains: give a pattern without '!'")
    chosen = {path for pattern in wanted for path in _matched(pattern, paths)}
    chosen -= {path for pattern in unwanted for path in _matched(pattern, paths)}
    if not problems and not chosen:
        problems.append(f"{list(patterns)} leave nothing to train")
    if not problems and chosen == {path for path in paths if not is_running(path)}:
        problems.append(
            f"{list(patterns)} match all {len(chosen)} parameters; to train everything give no "
            "is_trainable"
        )
    if running := sorted(path for path in chosen if is_running(path)):
        problems.append(
            f"{list(patterns)} match running statistics ({_some(running)}), which have no "
            "gradient; add '!batch_stats/*'"
        )
    if problems:
        raise ValueError("what trains:\n  " + "\n  ".join(problems))
    return _member(chosen, paths)


def bitfit(
    variables: Variables, *, of: Collection[str] | None = None, head: Sequence[str] = (_HEAD,)
) -> Callable[[str], bool]:
    """BitFit (Ben Zaken et al. 2022, section 3): biases train, those of norms too, and the head.

    Args:
        variables: the model's.
        of: names of the layers whose biases train, such as ``("query", "up")``, the paper's
            smaller choice (section 4, "fewer bias parameters"); None is all.
        head: patterns of what trains besides; () for biases alone.

    Raises:
        ValueError: there are no such biases, or nothing that `head` matches.
    """
    names = None if of is None else set(of)
    paths = list(flatten(variables))
    biases = {
        path
        for path in paths
        if path.startswith("params/")
        and path.endswith("/bias")
        and not any(fnmatchcase(path, pattern) for pattern in head)
        and (names is None or path.split("/")[-2] in names)
    }
    problems = []
    if not biases:
        where = "" if names is None else f" in layers named {sorted(names)}"
        problems.append(f"the model has no biases{where}: BitFit cannot train it; use adapters")
    elif names and (absent := names - {path.split("/")[-2] for path in biases}):
        problems.append(f"no layer named {sorted(absent)} has a bias")
    problems += [
        f"{pattern!r} matches no leaf; {_nearest(pattern, paths)} (a model without a new head: "
        "head=())"
        for pattern in head
        if not _matched(pattern, paths)
    ]
    if problems:
        raise ValueError("BitFit:\n  " + "\n  ".join(problems))
    return _member(biases | {path for pattern in head for path in _matched(pattern, paths)}, paths)


def from_layer(first: int, variables: Variables) -> Callable[[str], bool]:
    """What trains where the embeddings and the `first` blocks are frozen.

    Leaves of other collections than "params" do not train.

    Args:
        first: how many blocks are frozen; 0 freezes the embeddings alone.
        variables: the model's, its layers not stacked.

    Raises:
        ValueError: there are fewer blocks, or a stacked leaf holds frozen and trained layers.
    """
    depth, blocks = depths(variables)
    if not 0 <= first <= blocks:
        raise ValueError(f"first={first}: the model has {blocks} blocks; give 0 to {blocks}")
    params = {path: at for path, at in depth.items() if path.startswith("params/")}
    both = [path for path, at in params.items() if (at <= first).any() and (at > first).any()]
    if both:
        raise ValueError(
            f"layers are stacked ({_some(both)}): a split takes leaves as wholes and cannot freeze "
            f"{first} of {blocks} layers. Load the model with scan=False (or unstack_layers), or "
            "let updates through by depth: gradual_unfreezing(tx, variables, starts=[...])"
        )
    return _member({path for path, at in params.items() if (at > first).all()}, list(depth))


def layerwise_decay(decay: float, variables: Variables) -> optax.GradientTransformation:
    """Scales updates by ``decay ** (blocks + 1 - depth)``: 1 for the head, least for embeddings.

    To come after the optimizer, whose learning rate it so scales, weight decay included:
    ``optax.chain(adamw(...), layerwise_decay(0.8, variables))``. ELECTRA takes 0.8 (base) and 0.9
    (large), and lets the head be two steps from the last block; here, as in BEiT, it is one. ULMFiT
    takes 1 / 2.6. Leaves outside "params" (adapters) are new and keep their updates.

    Args:
        decay: above 0, at most 1.
        variables: the whole model's, frozen leaves included, perhaps abstract.

    Raises:
        ValueError: `decay` is out of range, or the model's blocks have no order (see `depths`).
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it must be above 0 and at most 1")
    depth, blocks = depths(variables)

    def scaled(path: str, update: Array) -> Array:
        factor = decay ** (blocks + 1 - _of(depth, path)).astype(np.float64)
        return update * jnp.asarray(_along(factor, update), update.dtype)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        return map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class UnfreezingState(NamedTuple):
    """State of `gradual_unfreezing`.

    Args:
        step: updates so far, int32 [].
        inner: the optimizer's; numbers that belong to moments (Adam's count) are [G], one for each
            time at which something is let through.
    """

    step: Array
    inner: PyTree


def gradual_unfreezing(
    tx: optax.GradientTransformation, variables: Variables, *, starts: Sequence[int]
) -> optax.GradientTransformation:
    """Lets blocks train from given steps on, the last ones first (Howard & Ruder 2018, sec. 3.3).

    Until then a leaf stands still bitwise, weight decay or not, its gradient counts as 0 (in a
    norm by which gradients are clipped), and its moments are untouched; Adam's count of steps, by
    which it corrects young moments, starts with each. Schedules count all steps.

    Args:
        tx: the optimizer, with its clipping and schedule.
        variables: the whole model's, perhaps abstract; layers may be stacked.
        starts: from which step on: what follows the blocks (head, last norm), the last block, the
            one before, ..., the embeddings; the last number holds for all deeper ones. ULMFiT's is
            one more block an epoch: ``range(0, epoch * (blocks + 2), epoch)``. ``[0, 10**9]``
            trains the head alone.

    Raises:
        ValueError: `starts` is empty, negative, falls or is too long, or the model's blocks have no
            order (see `depths`).
    """
    depth, blocks = depths(variables)
    starts = list(starts)
    if not starts or starts[0] < 0 or starts != sorted(starts) or len(starts) > blocks + 2:
        raise ValueError(
            f"starts={starts}: give steps from 0 on that do not fall, at most {blocks + 2} "
            f"(head, {blocks} blocks, embeddings)"
        )
    times = sorted(set(starts))
    of_depth = np.array(
        [times.index(starts[min(blocks + 1 - at, len(starts) - 1)]) for at in range(blocks + 2)]
    )

    def groups(path: str) -> np.ndarray:
        """Index into `times` of a leaf, [], or of each of its layers, [L]."""
        return of_depth[_of(depth, path)]

    def own(path: str, values: Sequence[Array]) -> Array:
        """A leaf's value, or each of its layers', from the run of its own group."""
        group = groups(path)
        result = values[int(group.flat[-1])]
        for g in sorted({*group.flat} - {group.flat[-1]}):
            result = jnp.where(_along(group == g, result), values[g], result)
        return result

    def init(params: PyTree) -> UnfreezingState:
        inner = tx.init(params)
        _, counts = _moments(inner, params)

        def repeated(path: str, leaf: Any) -> Any:
            return jnp.stack([jnp.asarray(leaf)] * len(times)) if path in counts else leaf

        return UnfreezingState(jnp.zeros((), jnp.int32), map_with_path(repeated, inner))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any):
        if params is None:
            raise ValueError("gradual_unfreezing needs the params: tx.update(grads, state, params)")
        active = state.step >= jnp.array(times)  # [G]
        leaf_of, counts = _moments(state.inner, params)

        def chosen(path: str, new: Array, old: Array | int) -> Array:
            begun = _along(active[groups(path)], new)
            return jnp.where(begun, new, old).astype(new.dtype)

        updates = map_with_path(lambda path, leaf: chosen(path, leaf, 0), updates)
        full = optax.with_extra_args_support(tx)
        # One run for each group, with its own counts. What it makes of other groups' leaves is not
        # used, and so not computed: moments exist once.
        runs = []
        for g in range(len(times)):
            inner = map_with_path(
                lambda path, leaf, g=g: leaf[g] if path in counts else leaf, state.inner
            )
            runs.append(full.update(updates, inner, params, **extra))

        def kept(path: str, old: Array, *values: Array) -> Array:
            if path in leaf_of:
                return chosen(leaf_of[path], own(leaf_of[path], values), old)
            if path in counts:
                new = jnp.stack([jnp.asarray(value) for value in values])
                return jnp.where(_along(active, new), new, old)
            return values[0]

        moved = _map_all(
            lambda path, *values: chosen(path, own(path, values), 0), *(run[0] for run in runs)
        )
        inner = _map_all(kept, state.inner, *(run[1] for run in runs))
        return moved, UnfreezingState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _moments(state: PyTree, params: PyTree) -> tuple[dict[str, str], set[str]]:
    """(state leaf -> the parameter it is of, state leaves that count for such ones beside them)."""
    names, paths = _paths(params), _paths(state)
    ends = {name: "/" + name for name in names}
    leaf_of = {
        path: name for path in paths for name in names if path.endswith(ends[name])
    }  # "1/0/mu/params/head/bias" -> "params/head/bias"
    nodes = {path.removesuffix(ends[name]).rpartition("/")[0] for path, name in leaf_of.items()}
    counts = {path for path in paths if path not in leaf_of and path.rpartition("/")[0] in nodes}
    return leaf_of, counts


_SIDES = ("backbone", "encoder", "", "decoder")  # in the order in which they compute
_BLOCK = re.compile(r"(?:stages_(\d+)/)?(?:layers|blocks)_(\d+)/")
_STAGE = re.compile(r"stages_(\d+)/")
_UNORDERED = re.compile(r"[a-z]+_\d")


class _Place(NamedTuple):
    """Where a layer's own leaf is.

    Args:
        side: its place among the sides.
        rest: its path from there on.
        block: (side, stage, number) of its block; number -1 beside a stage's blocks; None outside.
    """

    side: int
    rest: str
    block: tuple[int, int, int] | None


def _place(path: str) -> _Place:
    rest = path.removeprefix("params/")
    first = rest.partition("/")[0]
    side = _SIDES.index(first if first in _SIDES else "")
    rest = rest.removeprefix(f"{first}/") if first in _SIDES else rest
    if match := _BLOCK.match(rest):
        return _Place(side, rest, (side, int(match[1] or 0), int(match[2])))
    if match := _STAGE.match(rest):
        return _Place(side, rest, (side, int(match[1]), -1))
    return _Place(side, rest, None)


def depths(variables: Variables) -> tuple[dict[str, np.ndarray], int]:
    """The depth of every leaf (see above), int [], of stacked layers [L]; and how many blocks.

    Leaves of other collections than "params" count as the head does.

    Args:
        variables: the model's, perhaps abstract.

    Raises:
        ValueError: there are no blocks, or numbered modules whose order their names do not tell.
    """
    flat = flatten(variables)
    params = {path: leaf for path, leaf in flat.items() if path.startswith("params/")}
    layers = {path: layer_paths(path, leaf.shape) for path, leaf in params.items()}
    places = {name: _place(name) for path, own in layers.items() for name in own or [path]}
    unknown = [
        name
        for name, place in places.items()
        if place.block is None
        and not place.rest.startswith("embed")
        and _UNORDERED.match(place.rest)
    ]
    if unknown:
        raise ValueError(
            f"the names of {_some(unknown)} do not tell the order of blocks, as layers_{{i}}, "
            "blocks_{i} and stages_{i} do; choose rates and steps by patterns (optax.partition)"
        )
    named = {place.block for place in places.values() if place.block is not None}
    # A stage that has no blocks is one.
    staged = {block[:2] for block in named if block[2] >= 0}
    order = sorted(block for block in named if block[2] >= 0 or block[:2] not in staged)
    if not order:
        raise ValueError("the model has no layers_{i}, blocks_{i} or stages_{i}: depth has no unit")

    def depth(place: _Place) -> int:
        if place.block is not None:
            return 1 + next(i for i, block in enumerate(order) if block >= place.block)
        root = _SIDES[place.side] == ""
        if place.rest.startswith("embed"):
            return 0 if root else sum(block[0] < place.side for block in order)
        through = sum(block[0] <= place.side for block in order)
        return len(order) + 1 if root or through == len(order) else through

    found = {path: np.array(len(order) + 1) for path in flat}
    for path, own in layers.items():
        found[path] = np.array(
            depth(places[path]) if own is None else [depth(places[name]) for name in own]
        )
    return found, len(order)


def _of(depth: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    # Several arrays may stand for one leaf, below its path.
    leaf = path if path in depth else path.rpartition("/")[0]
    if leaf not in depth:
        raise ValueError(f"{path} is not a leaf of the variables whose depths were asked for")
    return depth[leaf]


def _along(values: Any, leaf: Array) -> Any:
    """Values [] or [L], to be broadcast to a leaf [L, ...]."""
    if not values.ndim:
        return values
    if leaf.shape[:1] != values.shape:
        raise ValueError(
            f"an array of shape {leaf.shape} in the optimizer's state has no layers to tell apart; "
            "train layers that are not stacked"
        )
    return values.reshape(-1, *(1 for _ in leaf.shape[1:]))


def _paths(tree: PyTree) -> list[str]:
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _map_all(fn: Callable[..., Any], *trees: PyTree) -> PyTree:
    """`fn(path, *leaves)` over trees of one structure."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: fn(path_of(keys), *leaves), *trees
    )


def _matched(pattern: str, paths: Collection[str]) -> list[str]:
    return [path for path in paths if fnmatchcase(path, pattern)]


def _nearest(pattern: str, paths: Sequence[str]) -> str:
    """What may have been meant."""
    if re.search(r"layers_[\d*?\[]", pattern) and any("/layers/" in path for path in paths):
        return (
            "layers are stacked (layers/... [L, ...]), and a split takes leaves as wholes: load "
            "the model with scan=False (or unstack_layers), or let updates through by depth "
            "(gradual_unfreezing, layerwise_decay)"
        )
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return f"near are {near}"


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _member(chosen: Collection[str], paths: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path is one of the chosen; a path of another tree is an error, not frozen."""
    chosen, known = frozenset(chosen), frozenset(paths)

    def is_trainable(path: str) -> bool:
        if path not in known:
            raise ValueError(
                f"{path} is not a leaf of the variables that the selection was made for; make it "
                "of those that train"
            )
        return path in chosen

    return is_trainable
