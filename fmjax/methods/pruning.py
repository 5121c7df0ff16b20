"""Single weights set to zero by their magnitude: at once, gradually, in n of m, or with rewinding.

Gradually: Zhu & Gupta 2017, arXiv:1710.01878. N of M: Mishra et al. 2021, arXiv:2104.08378 (2:4).
With rewinding: Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", arXiv:1803.03635.

Masks (True = keep) have the paths that the weights have. In training they are in the optimizer's
state, and every update ends with pruned weights at exactly zero, whatever the optimizer inside
does: decay, momentum, averages of gradients. Zeros take as much time and, uncompressed, as many
bytes as other numbers; the model's files are the ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.methods.weight_matrices import HEAD, KERNELS, matrices
from fmjax.train.optim import states_of
from fmjax.tree import flatten, is_stacked, map_with_path, path_of, unflatten
from fmjax.types import PyTree, Variables

ATTACHES = ("variables", "update")

Scope = Literal["global", "layer"]
Schedule = Callable[[Array], Array]
"""Step int32 [] -> share of the weights that are pruned, float32 []."""


class PrunedState(NamedTuple):
    """State of `masked` and `gradually`.

    Args:
        step: updates so far, int32 [].
        masks: bool, nested as the weights; True = keep.
        inner: the optimizer's own state.
    """

    step: Array
    masks: Variables
    inner: Any


def magnitude_masks(
    variables: Variables,
    sparsity: float | Array,
    *,
    scope: Scope = "global",
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> Variables:
    """Masks that keep the weights of largest magnitude.

    Args:
        variables: of a model, or what of them trains; scanned or not.
        sparsity: the share that is pruned, rounded to a whole number of weights; more where
            magnitudes at the threshold are equal, such as zeros of an earlier pruning. An array
            is not checked.
        scope: whether one threshold holds for all leaves, or each layer's leaf has its own.
        targets: globs over paths of leaves.
        but: globs of those that are not pruned; by default the head.

    Raises:
        ValueError: a sparsity out of range, or targets that cannot be pruned.
    """
    if not isinstance(sparsity, Array) and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is {scope!r}; it must be 'global' or 'layer'")
    leaves = {path: _bits(leaf) for path, leaf in _targets(variables, targets, but).items()}
    if scope == "global":
        threshold = _threshold([*leaves.values()], sparsity)
        return unflatten({path: leaf > threshold for path, leaf in leaves.items()})

    def own(leaf: Array) -> Array:
        return leaf > _threshold([leaf], sparsity)

    return unflatten(
        {p: jax.vmap(own)(leaf) if is_stacked(p) else own(leaf) for p, leaf in leaves.items()}
    )


def n_of_m_masks(
    variables: Variables,
    n: int = 2,
    m: int = 4,
    *,
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> Variables:
    """Masks that keep the n largest of every m weights that lie together along a kernel's inputs.

    Mishra et al. 2021, section 3: 2:4 is what NVIDIA's sparse tensor cores multiply, along the
    axis that a product sums over.

    Args:
        variables, targets, but: as in `magnitude_masks`.
        n, m: how many of how many.

    Raises:
        ValueError: n is not in 1..m, or kernels whose inputs are no multiple of m.
    """
    chosen = _targets(variables, targets, but)
    problems = [] if 1 <= n <= m else [f"n={n} must be 1 to m={m}"]
    problems += [
        f"{path} {leaf.shape}: {leaf.shape[-2]} inputs are no multiple of m={m}"
        for path, leaf in chosen.items()
        if m > 0 and leaf.shape[-2] % m
    ]
    if problems:
        raise ValueError("n of m weights:\n  " + "\n  ".join(problems))

    def mask(leaf: Array) -> Array:
        groups = jnp.abs(leaf).reshape(*leaf.shape[:-2], -1, m, leaf.shape[-1])
        # The rank of each weight in its group, the largest 0; of equal ones the first.
        order = jnp.argsort(-groups, axis=-2, stable=True)
        return (jnp.argsort(order, axis=-2) < n).reshape(leaf.shape)

    return unflatten({path: mask(leaf) for path, leaf in chosen.items()})


def _targets(variables: Variables, targets: Sequence[str], but: Sequence[str]) -> dict[str, Array]:
    chosen, problems = matrices(variables, targets, but)
    if problems:
        raise ValueError("pruning:\n  " + "\n  ".join(problems))
    return chosen


def _bits(leaf: Array) -> Array:
    """Magnitudes as integers in the same order, which floats of one sign are."""
    return jax.lax.bitcast_convert_type(jnp.abs(leaf).astype(jnp.float32), jnp.int32)


def _threshold(leaves: Sequence[Array], sparsity: float | Array) -> Array:
    """The largest `_bits` that are pruned, -1 if none, int32 [].

    Found by halving the range, 31 counts, where sorting would take memory and, in all of a model's
    weights, much longer.
    """
    total = sum(leaf.size for leaf in leaves)
    if total >= 2**31:
        raise ValueError(f"{total} weights are too many for one threshold: take scope='layer'")
    wanted = jnp.round(jnp.asarray(sparsity, jnp.float32) * total).astype(jnp.int32)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # too few are at most `low`, enough at most `high`
        middle = low + (high - low) // 2
        enough = sum(jnp.sum(leaf <= middle, dtype=jnp.int32) for leaf in leaves) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    start = jnp.int32(-1), jnp.int32(2**31 - 2)
    _, threshold = jax.lax.fori_loop(0, 31, halve, start)
    return jnp.where(wanted > 0, threshold, -1)


def apply_masks(variables: Variables, masks: Variables) -> Variables:
    """The variables with zeros where masks do not keep."""
    keep = flatten(masks)
    return map_with_path(lambda path, x: _kept(x, keep.get(path)), variables)


def _kept(x: Array, keep: Array | None) -> Array:
    return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))


def sparsity_of(masks: Variables) -> float:
    """The share of the masked leaves' weights that is pruned."""
    leaves = jax.tree.leaves(masks)
    return 1.0 - sum(int(leaf.sum()) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def cubic(final: float, *, steps: int, begin: int = 0, initial: float = 0.0) -> Schedule:
    """``final + (initial - final) (1 - (t - begin) / steps) ** 3`` (Zhu & Gupta 2017, eq. 1).

    Many weights are pruned while many are redundant, few at the end.

    Args:
        final: the share that is pruned from step begin + steps on.
        steps: how many it takes (n times Delta t of the paper).
        begin: the step t_0 before which nothing is pruned.
        initial: the share at `begin`.

    Raises:
        ValueError: numbers out of range.
    """
    if not 0 <= initial <= final < 1 or steps < 1 or begin < 0:
        raise ValueError(
            f"initial={initial} and final={final} must be 0 <= initial <= final < 1, "
            f"steps={steps} at least 1 and begin={begin} at least 0"
        )

    def schedule(step: Array) -> Array:
        left = 1.0 - jnp.clip((step - begin) / steps, 0.0, 1.0)
        share = final + (initial - final) * left**3
        return jnp.where(step < begin, 0.0, share).astype(jnp.float32)

    return schedule


def gradually(
    tx: optax.GradientTransformation,
    schedule: Schedule,
    *,
    every: int,
    until: int | None = None,
    scope: Scope = "global",
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with ever more of the weights pruned (Zhu & Gupta 2017, section 3).

    Every so many steps the weights as they are by then, updated, are masked anew; what was pruned
    stays so. The gradients of pruned weights count as 0.

    Args:
        tx: the whole chain: what came after it could move weights off zero.
        schedule: such as `cubic`.
        every: steps between masks (Delta t; the paper's are 100 to 1000).
        until: the last step at which masks change; None for no such.
        scope, targets, but: as in `magnitude_masks`; of what trains.

    Raises:
        ValueError: `every` is below 1; by init, targets that cannot be pruned.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1 step")

    def begin(params: PyTree) -> Variables:
        return jax.tree.map(
            lambda leaf: jnp.ones(leaf.shape, bool), unflatten(_targets(params, targets, but))
        )

    def renew(step: Array, new: PyTree, masks: Variables) -> Variables:
        due = step % every == 0
        if until is not None:
            due = due & (step <= until)

        def smaller(masks: Variables) -> Variables:
            found = magnitude_masks(new, schedule(step), scope=scope, targets=targets, but=but)
            return jax.tree.map(jnp.logical_and, masks, found)

        return jax.lax.cond(due, smaller, lambda masks: masks, masks)

    return _through(tx, begin, renew)


def masked(
    tx: optax.GradientTransformation, masks: Variables
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with weights that stay pruned.

    Args:
        tx: the whole chain.
        masks: of leaves that train, such as `magnitude_masks` makes. Start from `apply_masks`: of
            other weights the first step makes zeros.
    """

    def begin(params: PyTree) -> Variables:
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
        wrong = [p for p, keep in flatten(masks).items() if shapes.get(p) != keep.shape]
        if wrong:
            raise ValueError(f"masks of {wrong} are of no leaf that trains, or of another shape")
        return jax.tree.map(jnp.copy, masks)  # the state is donated

    return _through(tx, begin, lambda step, new, masks: masks)


def _through(
    tx: optax.GradientTransformation,
    begin: Callable[[PyTree], Variables],
    renew: Callable[[Array, PyTree, Variables], Variables],
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> PrunedState:
        return PrunedState(jnp.zeros((), jnp.int32), begin(params), inner.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("pruning needs the params: call tx.update(grads, state, params)")
        updates, moved = inner.update(
            apply_masks(updates, state.masks), state.inner, params, **extra
        )
        step = state.step + 1
        new = apply_masks(optax.tree.add(params, updates), state.masks)
        masks = renew(step, new, state.masks)
        keep = flatten(masks)

        def final(keys: tuple[Any, ...], update: Array, param: Array) -> Array:
            # Its own negative takes a number to exactly zero.
            mask = keep.get(path_of(keys))
            return update if mask is None else jnp.where(mask, update, -param)

        updates = jax.tree_util.tree_map_with_path(final, updates, params)
        return updates, PrunedState(step, masks, moved)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: optax.OptState) -> Variables:
    """The masks inside an optimizer state.

    Raises:
        ValueError: there are none, or several.
    """
    found = states_of(opt_state, PrunedState)
    if len(found) != 1:
        raise ValueError(f"the optimizer state prunes {len(found)} times; it must be once")
    return found[0].masks


class Ticket(NamedTuple):
    """Masks and what they keep of the early weights."""

    variables: Variables
    masks: Variables


def lottery(
    train: Callable[[Variables, Variables], Variables],
    variables: Variables,
    *,
    share: float,
    rounds: int,
    scope: Scope = "layer",
    targets: Sequence[str] = KERNELS,
    but: Sequence[str] = HEAD,
) -> list[Ticket]:
    """Iterative pruning with rewinding (Frankle & Carbin 2019, section 1).

    Each round trains, prunes a share of the weights that are left, and sets the others back to
    their early values.

    Args:
        train: (variables, masks) -> variables trained by `masked`; masks first keep everything.
        variables: the early ones: initial, or of some hundred steps (Frankle et al. 2020,
            arXiv:1912.05671), which deep nets need.
        share: of the weights left that each round prunes; the paper's is 0.2.
        rounds: how many.
        scope, targets, but: as in `magnitude_masks`; the paper prunes each layer alike.

    Returns:
        The ticket after each round; training it is the next round's beginning.

    Raises:
        ValueError: numbers out of range.
    """
    if not 0 < share < 1 or rounds < 1:
        raise ValueError(f"share={share} must be between 0 and 1, and rounds={rounds} at least 1")
    options: Mapping[str, Any] = {"scope": scope, "targets": targets, "but": but}
    ticket = Ticket(variables, magnitude_masks(variables, 0.0, **options))
    tickets = []
    for number in range(1, rounds + 1):
        trained = apply_masks(train(*ticket), ticket.masks)
        found = magnitude_masks(trained, 1.0 - (1.0 - share) ** number, **options)
        masks = jax.tree.map(jnp.logical_and, ticket.masks, found)
        ticket = Ticket(apply_masks(variables, masks), masks)
        tickets.append(ticket)
    return tickets
