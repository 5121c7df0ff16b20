"""Loss -> gradient -> step: three arrows, and every training method attaches to one of them.

A method changes the loss (LossFn -> LossFn), the gradient (GradFn -> GradFn) or the update (an
Optax transformation); the step itself never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.tree import flatten, is_running, merge, override, split, unflatten
from fmjax.types import (
    Aux,
    Batch,
    GradFn,
    LossFn,
    Mean,
    PyTree,
    StepFn,
    TrainState,
    Variables,
    at_least_float32,
)


def is_param(path: str) -> bool:
    """Whether a leaf belongs to the ``params`` collection: what trains by default."""
    return path.startswith("params/")


def init_state(
    variables: Variables,
    tx: optax.GradientTransformation,
    rng: Array,
    is_trainable: Callable[[str], bool] = is_param,
) -> TrainState:
    """The state before the first step. It takes over the arrays: a compiled step donates them.

    Args:
        variables: collections as `model.init` or `fmjax.load` gives them.
        tx: the Optax transformation; its state is made for the trainable leaves only.
        rng: a typed key, ``jax.random.key(seed)``.
        is_trainable: says by leaf path (``"params/layers_0/attn/query/kernel"``) what trains. It
            is a split, not a mask: frozen leaves get no gradient, decay or optimizer memory.

    Raises:
        ValueError: nothing is trainable, or what has no gradient, or `rng` is not a typed key.
    """
    if not (isinstance(rng, Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)):
        kind = f"has dtype {rng.dtype}" if isinstance(rng, Array) else f"is {rng!r}"
        raise ValueError(
            f"rng {kind}; a typed key is needed: jax.random.key(seed), not jax.random.PRNGKey(seed)"
        )
    trainable, non_trainable = split(_unshared(variables), is_trainable)
    if not trainable:
        raise ValueError(
            f"is_trainable holds for none of the {len(flatten(variables))} leaves; "
            f"paths look like {next(iter(flatten(variables)), '(no leaves)')!r}"
        )
    if whole := [path for path, leaf in flatten(trainable).items() if not _has_gradient(leaf)]:
        raise ValueError(
            f"is_trainable chooses {', '.join(whole[:3])} ({len(whole)} in all), which are whole "
            "numbers and have no gradient; choose others (of a quantised model its adapters, or "
            "fmjax.methods.quantization.is_float(variables))"
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        non_trainable=non_trainable,
        opt_state=tx.init(trainable),
        # A copy, because the state is donated and the caller may want to use the key again.
        rng=jax.random.wrap_key_data(
            jnp.array(jax.random.key_data(rng)), impl=jax.random.key_impl(rng)
        ),
    )


def _has_gradient(leaf: Any) -> bool:
    """Whether all arrays that a leaf is made of are floating-point numbers."""
    return all(jnp.issubdtype(part.dtype, jnp.inexact) for part in jax.tree.leaves(leaf))


def _unshared(variables: Variables) -> Variables:
    """Copies leaves that appear twice: donating one buffer twice crashes."""
    seen: set[int] = set()
    flat = flatten(variables)
    for path, leaf in flat.items():
        if id(leaf) in seen:
            flat[path] = jnp.copy(leaf)
        seen.add(id(leaf))
    return unflatten(flat)


def gradient(loss_fn: LossFn) -> GradFn:
    """The gradient of a loss with respect to the trainable leaves."""

    def grad_fn(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        def loss_of(trainable: Variables) -> tuple[Array, Aux]:
            return loss_fn(merge(trainable, non_trainable), batch, rng)

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return grads, loss, aux

    return grad_fn


def accumulate(grad_fn: GradFn, num_microbatches: int) -> GradFn:
    """The same gradient from `num_microbatches` smaller passes, averaged by ``Aux.weight``.

    Piece j takes examples j, j + n, j + 2n, ..., so that each piece stays spread over the devices
    that hold the batch. Sums are of float32 at the least. Mutable collections are threaded from
    piece to piece. One piece is `grad_fn` itself.

    Raises:
        ValueError: the batch size is not a multiple of `num_microbatches`, a leaf of the batch has
            no examples, or the loss updates leaves that the variables do not have.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches is {num_microbatches}; it must be at least 1")
    if num_microbatches == 1:
        return grad_fn

    def accumulated(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        if scalars := [name for name, leaf in batch.items() if not jnp.ndim(leaf)]:
            raise ValueError(
                f"batch {scalars} have no axis of examples to divide; give every leaf one"
            )
        sizes = {name: leaf.shape[0] for name, leaf in batch.items()}
        if uneven := {name: b for name, b in sizes.items() if b % num_microbatches}:
            raise ValueError(
                f"batch sizes {uneven} are not multiples of num_microbatches={num_microbatches}; "
                "choose a batch size that is"
            )
        pieces = jax.tree.map(
            lambda x: x.reshape(
                x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]
            ).swapaxes(0, 1),
            dict(batch),
        )  # [n, B/n, ...]

        def one_piece(updates: Variables, index: Array, piece: Batch):
            piece_rng = None if rng is None else jax.random.fold_in(rng, index)
            grads, loss, aux = grad_fn(
                trainable, override(non_trainable, updates), piece, piece_rng
            )
            return (grads, loss), aux

        def body(carry, xs):
            sums, updates = carry
            values, aux = one_piece(updates, *xs)
            weighted = _scaled(values, aux.weight)
            sums = jax.tree.map(jnp.add, sums, (weighted, aux.weight, aux.metrics))
            return (sums, aux.updates), None

        first = jax.tree.map(lambda x: x[0], pieces)
        values, aux = jax.eval_shape(lambda piece: one_piece({}, jnp.int32(0), piece), first)
        weighted = jax.eval_shape(_scaled, values, aux.weight)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (weighted, aux.weight, aux.metrics)
        )
        override(non_trainable, aux.updates)  # refuses what is not there
        flat = flatten(non_trainable)
        start = unflatten({path: flat[path] for path in flatten(aux.updates)})
        (sums, updates), _ = jax.lax.scan(
            body, (zeros, start), (jnp.arange(num_microbatches), pieces)
        )
        weighted, weight, metrics = sums
        grads, loss = _divided(weighted, weight, values)
        return grads, loss, Aux(weight, metrics, updates)

    return accumulated


def all_reduce(grad_fn: GradFn, axis_name: str) -> GradFn:
    """The gradient over all devices of a mapped axis, averaged by ``Aux.weight``.

    For pmap and shard_map, where each device sees its own examples; under plain jit the compiler
    does this. Random keys are folded with the device's index. Mutable collections are averaged,
    their whole numbers (counts, which are the same everywhere) kept.
    """

    def reduced(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        device_rng = None if rng is None else jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        grads, loss, aux = grad_fn(trainable, non_trainable, batch, device_rng)
        values = (grads, loss)
        weighted, weight, metrics = jax.lax.psum(
            (_scaled(values, aux.weight), aux.weight, aux.metrics), axis_name
        )
        updates = jax.tree.map(lambda x: _shared(x, axis_name), aux.updates)
        grads, loss = _divided(weighted, weight, values)
        return grads, loss, Aux(weight, metrics, updates)

    return reduced


def _shared(x: Array, axis_name: str) -> Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.pmean(x, axis_name) if floating else jax.lax.pmax(x, axis_name)


def _scaled(values: PyTree, weight: Array) -> PyTree:
    """values * weight, of float32 at the least: below it, sums of many pieces stop growing."""

    def scaled(x: Array) -> Array:
        x = x.astype(at_least_float32(x.dtype))
        return x * weight.astype(x.dtype)

    return jax.tree.map(scaled, values)


def _divided(sums: PyTree, weight: Array, like: PyTree) -> PyTree:
    """sums / weight in the dtypes of `like`, and 0 for a batch in which nothing counts."""
    weight = jnp.where(weight == 0, 1, weight)
    return jax.tree.map(lambda x, y: (x / weight.astype(x.dtype)).astype(y.dtype), sums, like)


def make_train_step(grad_fn: GradFn, tx: optax.GradientTransformation) -> StepFn:
    """The train step: fold the key, differentiate, update, carry the mutable collections.

    Returns:
        ``step(state, batch) -> (state, metrics)``, pure and not yet compiled (see `jit_step`);
        metrics hold ``loss``, ``grad_norm`` and whatever the loss reports, as `Mean`.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        rng = jax.random.fold_in(state.rng, state.step)
        grads, loss, aux = grad_fn(state.trainable, state.non_trainable, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, value=loss)
        metrics = {
            "loss": Mean(loss * aux.weight, aux.weight),
            "grad_norm": Mean(optax.tree.norm(grads), jnp.ones(())),
            **aux.metrics,
        }
        trainable: Any = optax.apply_updates(state.trainable, updates)
        state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            non_trainable=override(state.non_trainable, aux.updates),
            opt_state=opt_state,
            rng=state.rng,
        )
        return state, metrics

    return step


def make_eval_step(loss_fn: LossFn) -> Callable[[TrainState, Batch], dict[str, Mean]]:
    """``(state, batch) -> metrics`` of a loss built with ``train=False``; it draws no numbers."""

    def step(state: TrainState, batch: Batch) -> dict[str, Mean]:
        loss, aux = loss_fn(merge(state.trainable, state.non_trainable), batch, None)
        return {"loss": Mean(loss * aux.weight, aux.weight), **aux.metrics}

    return step


def cast(loss_fn: LossFn, dtype: Any, keep: Callable[[str], bool] = is_running) -> LossFn:
    """The same loss computed in another precision, e.g. bfloat16 over float32 master weights.

    Floating-point leaves are cast on the way in, so gradients come back in their own dtype, and
    new values of mutable collections return to the dtype they had. Norms, softmax and losses
    compute in float32 whatever the weights are.

    Args:
        dtype: e.g. ``jnp.bfloat16``.
        keep: leaf paths that stay as they are; by default running statistics,
            whose small moves would be lost.
    """

    def cast_leaf(path: str, leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not keep(path):
            return leaf.astype(dtype)
        return leaf

    def cast_loss(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        flat = flatten(variables)
        low = unflatten({path: cast_leaf(path, leaf) for path, leaf in flat.items()})
        loss, aux = loss_fn(low, batch, rng)
        updates = {
            path: leaf.astype(flat[path].dtype) for path, leaf in flatten(aux.updates).items()
        }
        return loss, aux._replace(updates=unflatten(updates))

    return cast_loss
