"""What fmjax adds to Optax: a moving average in the chain, and the usual fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmjax.train.moments import Moments, keep_moments
from fmjax.tree import flatten, map_with_path, unflatten
from fmjax.types import PyTree, Variables


class EmaState(NamedTuple):
    """The averaged trainable leaves, float32."""

    ema: Variables


def tracking(
    init: Callable[[PyTree], Any], moved: Callable[[Any, PyTree], Any]
) -> optax.GradientTransformation:
    """A transformation that changes nothing and follows the weights.

    It must come last in the chain, because it sees the final update.

    Args:
        init: weights -> its state. It must copy what it keeps of them: the state is donated, and
            one buffer must not be donated twice.
        moved: (state, weights after the update) -> the new state.
    """

    def begun(params: PyTree) -> Any:
        return init(params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("averages need the params: call tx.update(grads, state, params)")
        return updates, moved(state, optax.apply_updates(params, updates))

    return optax.GradientTransformation(begun, update)


def track_ema(decay: float) -> optax.GradientTransformation:
    """An exponential moving average of the weights, kept in ``opt_state``, in float32.

    ``ema <- decay * ema + (1 - decay) * params`` after each update. It must come last in the
    chain; it changes nothing itself. In bfloat16, whatever the weights are in, it would stand
    still: a step of less than 2^-9 is lost there.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")

    def moved(state: EmaState, params: PyTree) -> EmaState:
        return EmaState(
            jax.tree.map(
                lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), state.ema, params
            )
        )

    def init(params: PyTree) -> EmaState:
        return EmaState(jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    return tracking(init, moved)


def ema_of(opt_state: optax.OptState) -> Variables:
    """The averaged leaves, float32, inside an optimizer state that has `track_ema` in its chain.

    `fmjax.tree.cast_as` gives them the weights' own dtypes.

    Raises:
        ValueError: there is none, or more than one.
    """
    return tracked(opt_state, EmaState, "moving averages", "track_ema").ema


def tracked(opt_state: optax.OptState, kind: type[Any], what: str, by: str) -> Any:
    """The one state of a kind inside an optimizer state.

    Args:
        opt_state: of a chain.
        kind: the state's class.
        what: such states hold, for errors.
        by: the name of the transformation whose state it is.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = states_of(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} {what}; put exactly one {by} last in the "
            "optax.chain"
        )
    return found[0]


def states_of(opt_state: optax.OptState, kind: type[Any]) -> list[Any]:
    """All states of a kind inside an optimizer state."""
    is_kind = lambda x: isinstance(x, kind)  # noqa: E731
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(x)]


def bounded(limits: Mapping[str, tuple[float, float]]) -> optax.GradientTransformation:
    """Keeps leaves within limits: what an update would take past one ends there.

    It comes behind what makes the updates, and before an average. CLIP's temperature:
    ``bounded({"params/logit_scale": (0.0, log(100))})`` (Radford et al. 2021, section 2.5).

    Args:
        limits: (least, most) by the path of a leaf.

    Raises:
        ValueError: limits that cross; or, when it is used, paths that are not there.
    """
    if wrong := {path: pair for path, pair in limits.items() if not pair[0] <= pair[1]}:
        raise ValueError(f"limits {wrong} cross; each is (least, most)")

    def init(params: PyTree) -> optax.EmptyState:
        if missing := sorted(set(limits) - set(flatten(params))):
            raise ValueError(f"there is nothing to keep within limits at {missing}")
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("limits need the params: call tx.update(grads, state, params)")
        flat, here = flatten(updates), flatten(params)
        for path, (least, most) in limits.items():
            flat[path] = jnp.clip(here[path] + flat[path], least, most) - here[path]
        return unflatten(flat), state

    return optax.GradientTransformation(init, update)


def decays(path: str) -> bool:
    """Whether weight decay applies: kernels and embeddings, not biases or norm scales.

    The rule of BERT's and GPT's training code, where decay is for matrices alone. A kernel in
    factors is one, too.
    """
    *_, above, name = f"/{path}".split("/")
    return name in ("kernel", "embedding") or above == "kernel"


def mask_of(chosen: Callable[[str], bool]) -> Callable[[PyTree], PyTree]:
    """An Optax mask, ``params -> tree of bools``, of the leaves whose path is chosen."""
    return lambda params: map_with_path(lambda path, _: chosen(path), params)


def clip_gradient(max_grad_norm: float) -> optax.GradientTransformation:
    """Gradients scaled down to a global norm, as `adamw` and the other optimizers begin.

    Args:
        max_grad_norm: the norm; infinity for none.

    Raises:
        ValueError: it is not above 0: at 0 nothing would train, below gradients would turn round.
    """
    # One that is part of an optimizer's state is an array, on which no branch may depend.
    if isinstance(max_grad_norm, int | float) and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm} must be above 0; math.inf clips nothing")
    return optax.clip_by_global_norm(max_grad_norm)


def adamw(
    learning_rate: float | Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    decay: Callable[[str], bool] = decays,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """AdamW with gradient clipping and decay on matrices only: the fine-tuning default.

    Args:
        learning_rate: a number or an Optax schedule of the step.
        max_grad_norm: global norm the gradient is clipped to; infinity for none.
        decay: says by leaf path which weights decay.
        moments: as what both moments are kept, see `fmjax.train.moments.keep_moments`.
    """
    tx = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask_of(decay)
    )
    return optax.chain(clip_gradient(max_grad_norm), keep_moments(tx, moments))
