"""Attention heads and feed-forward units removed from a trained model, which is then smaller.

Importance by the gradient of a mask (Michel et al. 2019, "Are Sixteen Heads Really Better than
One?", arXiv:1905.10650, eq. 2; of units alike, Molchanov et al. 2017, arXiv:1611.06440, eq. 8).

`fmjax.nn.attention.Attention` and `fmjax.nn.mlp.Mlp` have as many heads and units as their kernels
hold, so that layers may keep different numbers; a config says one number for all. Where all layers
keep alike many and the config can say so (units; heads where it has a size of heads of its own),
the model's config changes and the model is an ordinary one. Else the config stays, the model
computes without a cache alone, and `fmjax.save` takes what `filled_up` makes: the same function
with zeros. Whole layers are dropped by `fmjax.methods.shallower`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

import fmjax.hub as hub
from fmjax.methods.adapted_layers import choose_adapters, with_adapters
from fmjax.nn.compact import Compact
from fmjax.tree import flatten, is_stacked, unflatten
from fmjax.types import Batch, LossFn, Variables

ATTACHES = ("variables",)

HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
    "encoder_attention_heads", "decoder_attention_heads", "decoder_num_attention_heads",
)  # fmt: skip
UNITS = (
    "intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim",
    "decoder_ffn_dim",
)  # fmt: skip
"""Under which names configs say how many heads and inner units there are."""

Chosen = Mapping[str, ArrayLike]
"""Numbers of heads or units by the path of their block, ``{"layers_0/attn": (0, 3)}``; of a scanned
model [L, n], as many in each layer."""


def head_importance(
    model: Any, loss: LossFn, variables: Variables, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """The expected sensitivity of the loss to each head: Michel et al. 2019, eq. 2.

    ``E_x |d loss(x) / d xi|`` at xi = 1, where xi is a factor of the head's output; the absolute
    value is of one example's gradient. All examples' gradients take one backward pass.

    Args:
        model: whose attention has the kernels query, key, value and out.
        loss: of the model, such as a task's with ``train=False``.
        variables: its variables.
        batches: rows of ``weight`` 0 do not count.

    Returns:
        [H], or [L, H] of a scanned model, by the path of the attention.

    Raises:
        ValueError: adapters, no such attention, or no batches.
    """
    places = attentions(model, variables)
    return _sensitivities(loss, variables, places, "out", batches)


def unit_importance(
    loss: LossFn, variables: Variables, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """The same of each inner unit of the feed-forward blocks: [F], or [L, F] of a scanned model."""
    return _sensitivities(loss, variables, feed_forwards(variables), "down", batches)


def _sensitivities(
    loss: LossFn, variables: Variables, counts: Mapping[str, int], name: str,
    batches: Iterable[Batch],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of each part of what a layer `name` reads, by block; `counts` are how many parts it has.

    The factors are adapters, as many as examples, of which each example has its own.
    """
    if "adapters" in variables:
        raise ValueError("the variables have adapters: merge them first (`merge_adapters`)")
    flat = flatten(variables)
    kernels = {place: flat[f"params/{place}/{name}/kernel"] for place in counts}

    @jax.jit
    def gradients(variables: Variables, batch: Batch) -> tuple[dict[str, Array], Array]:
        size = len(next(iter(batch.values())))

        def of_factors(factors: dict[str, Array]) -> tuple[Array, Array]:
            modules = {f"{place}/{name}": {"in_scale": x} for place, x in factors.items()}
            chosen = choose_adapters(with_adapters(variables, modules), jnp.arange(size))
            value, aux = loss(chosen, batch, None)
            return value * aux.weight, aux.weight

        ones = {
            place: jnp.ones((*kernel.shape[:-2], size, kernel.shape[-2]))
            for place, kernel in kernels.items()
        }  # [B, I], or [L, B, I] of a scanned model
        grads, weight = jax.grad(of_factors, has_aux=True)(ones)
        parts = {p: x.reshape(*x.shape[:-1], counts[p], -1).sum(-1) for p, x in grads.items()}
        return {place: jnp.abs(x).sum(-2) for place, x in parts.items()}, weight

    sums = {place: np.zeros((*k.shape[:-2], counts[place])) for place, k in kernels.items()}
    total = 0.0
    for batch in batches:
        found, weight = gradients(variables, batch)
        sums = {place: sums[place] + np.asarray(found[place]) for place in sums}
        total += float(weight)
    if not total:
        raise ValueError("there are no batches, or no examples that count, to measure on")
    return {place: values / total for place, values in sums.items()}


def attentions(model: Any, variables: Variables) -> dict[str, int]:
    """How many heads each attention has, by path.

    Raises:
        ValueError: there is none with the kernels query, key, value and out.
    """
    flat = flatten(variables["params"])
    names = [f"attn/{name}" for name in ("query", "key", "value", "out")]
    found = {}
    for path in flat:
        place = path.removesuffix("/out/kernel")
        parts = [f"{place}/{name}/kernel" for name in ("query", "key", "value")]
        if place != path and all(part in flat for part in parts):
            size = _head_size(model, place)
            found[place] = flat[f"{place}/query/kernel"].shape[-1] // size
    if not found:
        raise ValueError(
            f"{hub.family_for(model).MODEL_TYPE} has no attention with the kernels {names}"
        )
    return found


def _head_size(model: Any, place: str) -> int:
    """K, from the config, or from the model's own kernels and its number of heads."""
    fields = vars(model.config)
    for name in ("head_dim", "d_kv"):
        if isinstance(fields.get(name), int):
            return fields[name]
    side = place.partition("/")[0]
    names = [name for name in HEADS if fields.get(name) and not name.startswith(("enc", "dec"))]
    own = [name for name in HEADS if name.startswith(side) and fields.get(name)]
    if not (own or names):
        raise ValueError(f"the config says under none of {HEADS} how many heads there are")
    whole = flatten(hub.abstract_variables(model))[f"params/{place}/query/kernel"]
    return whole.shape[-1] // fields[(own or names)[0]]


def feed_forwards(variables: Variables) -> dict[str, int]:
    """How many inner units each feed-forward block has, by path.

    Raises:
        ValueError: there is none with the kernels up and down.
    """
    flat = flatten(variables["params"])
    found = {
        place: flat[path].shape[-2]
        for path in flat
        if path.endswith("/down/kernel")
        and f"{(place := path.removesuffix('/down/kernel'))}/up/kernel" in flat
        and flat[path].ndim == 2 + is_stacked(path)
    }
    if not found:
        raise ValueError("the variables have no feed-forward blocks with kernels up and down")
    return found


def least_important(
    importance: Mapping[str, np.ndarray], count: int, *, scope: str = "layer"
) -> dict[str, np.ndarray]:
    """The least important heads or units, as `remove_heads` and `remove_units` take them.

    Args:
        importance: of `head_importance` or `unit_importance`; where queries share keys, added up
            over those that do.
        count: how many of each layer; with scope "global" of all together, where layers are
            compared after division by their norm (Michel et al. 2019, section 4.1; Molchanov et
            al. 2017, section 2.2) and each keeps at least one.
        scope: "layer" or "global"; a scanned model's layers keep alike many.

    Raises:
        ValueError: not that many can be removed.
    """
    smallest = min(values.shape[-1] for values in importance.values())
    if scope == "layer":
        if not 0 <= count < smallest:
            raise ValueError(f"count={count} must be 0 to {smallest - 1}: one must stay")
        return {p: np.sort(np.argsort(v, axis=-1)[..., :count]) for p, v in importance.items()}
    stacked = [place for place, values in importance.items() if values.ndim > 1]
    possible = sum(values.shape[-1] - 1 for values in importance.values())
    if scope != "global" or stacked or not 0 <= count <= possible:
        raise ValueError(
            f"scope={scope!r} must be 'layer' or, of layers that are not scanned, 'global', and "
            f"count={count} at most {possible}: each layer keeps one"
        )
    ranked = []
    for place, values in importance.items():
        norm = np.linalg.norm(values)
        # The last one is the best of its layer, which stays.
        ranked += [(values[i] / (norm or 1.0), place, i) for i in np.argsort(values)[:-1]]
    chosen = sorted(ranked)[:count]
    return {
        place: np.sort(np.array([i for _, p, i in chosen if p == place], int))
        for place in importance
    }


def remove_heads(model: Any, variables: Variables, heads: Chosen) -> tuple[Any, Variables]:
    """The model without some attention heads, and smaller kernels.

    Of attention whose queries share keys (G < H), a number is that of a group: its keys and values
    go with all of its queries.

    Args:
        model: not of a family whose attention adds biases by head to scores (T5's positions): use
            `silence_heads` there, which keeps the arrays.
        variables: its variables, without adapters.
        heads: which ones, by attention.

    Returns:
        (model, variables); the model's config says so where it can (see above).

    Raises:
        ValueError: heads or attentions that are not there, or all heads of a layer.
    """
    counts = attentions(model, variables)
    flat = flatten(variables)
    size = {place: _head_size(model, place) for place in counts}
    groups = {p: flat[f"params/{p}/key/kernel"].shape[-1] // size[p] for p in counts}
    keep = _kept("heads", heads, groups)
    new = dict(flat)
    for place, kept in keep.items():
        _refuse_compact(flat, place, ("query", "key", "value", "out"))
        for name in ("query", "key", "value"):
            shared = counts[place] // groups[place] if name == "query" else 1
            columns = _features(kept, size[place] * shared)
            for leaf in ("kernel", "bias"):
                path = f"params/{place}/{name}/{leaf}"
                if path in flat:
                    new[path] = _take(flat[path], columns, -1)
        rows = _features(kept, size[place] * (counts[place] // groups[place]))
        path = f"params/{place}/out/kernel"
        new[path] = _take(flat[path], rows, -2)
    left = {
        counts[p] * (keep[p].shape[-1] if p in keep else groups[p]) // groups[p] for p in counts
    }
    fields = vars(model.config)
    if len(left) == 1 and "head_dim" in fields and "num_attention_heads" in fields:
        (each,), place = left, next(iter(counts))
        changes: dict[str, Any] = {"num_attention_heads": each, "head_dim": size[place]}
        if "num_key_value_heads" in fields:
            changes["num_key_value_heads"] = each * groups[place] // counts[place]
        model = model.clone(config=dataclasses.replace(model.config, **changes))
    return _checked(model, unflatten(new), flat)


def silence_heads(model: Any, variables: Variables, heads: Chosen) -> Variables:
    """The variables with zeros for what some heads give to the output: the function that
    `remove_heads` leaves, in arrays of the sizes they had. Numbers are those of query heads.

    Raises:
        ValueError: as there.
    """
    counts = attentions(model, variables)
    keep = _kept("heads", heads, counts)
    flat = flatten(variables)
    for place, kept in keep.items():
        _refuse_compact(flat, place, ("out",))
        kernel = flat[f"params/{place}/out/kernel"]
        mask = np.zeros((*kept.shape[:-1], counts[place]), bool)
        np.put_along_axis(mask, kept, True, -1)
        rows = np.repeat(mask, kernel.shape[-2] // counts[place], axis=-1)
        flat[f"params/{place}/out/kernel"] = jnp.where(
            rows[..., None], kernel, jnp.zeros((), kernel.dtype)
        )
    return unflatten(flat)


def remove_units(model: Any, variables: Variables, units: Chosen) -> tuple[Any, Variables]:
    """The model without some inner units of its feed-forward blocks, and smaller kernels.

    Args:
        model, variables: as in `remove_heads`.
        units: which ones, by block.

    Returns:
        (model, variables); the model's config says so where it can (see above).

    Raises:
        ValueError: units or blocks that are not there, or all units of a block.
    """
    counts = feed_forwards(variables)
    keep = _kept("units", units, counts)
    flat = flatten(variables)
    new = dict(flat)
    for place, kept in keep.items():
        _refuse_compact(flat, place, ("up", "gate", "down"))
        for name in ("up", "gate"):
            for leaf in ("kernel", "bias"):
                path = f"params/{place}/{name}/{leaf}"
                if path in flat:
                    new[path] = _take(flat[path], kept, -1)
        path = f"params/{place}/down/kernel"
        new[path] = _take(flat[path], kept, -2)
    left = {keep[p].shape[-1] if p in keep else counts[p] for p in counts}
    fields = vars(model.config)
    full = next(iter(counts.values()))
    # Some configs say None for four times the width.
    names = [name for name in UNITS if name in fields and fields[name] in (None, full)]
    if len(left) == len({*counts.values()}) == 1:
        (each,) = left
        changes = dict.fromkeys(names, each)
        model = model.clone(config=dataclasses.replace(model.config, **changes))
    return _checked(model, unflatten(new), flat)


def filled_up(model: Any, variables: Variables) -> Variables:
    """The variables with zeros in the places of what was removed: the same function, in arrays of
    the sizes that the config says, which `fmjax.save` takes.

    Raises:
        ValueError: leaves that are not the model's.
    """
    wanted, flat = flatten(hub.abstract_variables(model)), flatten(variables)
    if wanted.keys() != flat.keys():
        raise ValueError(f"{sorted(wanted.keys() ^ flat.keys())} are not in both model and leaves")
    return unflatten(
        {
            path: jnp.pad(
                leaf,
                [(0, full - own) for full, own in zip(wanted[path].shape, leaf.shape, strict=True)],
            )
            for path, leaf in flat.items()
        }
    )


def _kept(what: str, removed: Chosen, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """What stays of each place that loses something: increasing numbers, [n] or [L, n]."""
    problems, keep = [], {}
    for place, numbers in removed.items():
        if place not in counts:
            problems.append(f"{place!r} is none of {', '.join([*counts][:4])}, ...")
            continue
        given = np.asarray(numbers, int)
        count = counts[place]
        lists = given.reshape(-1, given.shape[-1])
        if given.ndim != 1 + is_stacked(place):
            problems.append(f"{place}: numbers of shape {given.shape}, one list a layer is needed")
        elif any(len({*row}) < len(row) or not {*row} <= {*range(count)} for row in lists.tolist()):
            problems.append(
                f"{place}: {given.tolist()} are not different numbers of 0..{count - 1}"
            )
        elif given.shape[-1] >= count:
            problems.append(f"{place}: of its {count} {what} one must stay")
        else:
            stay = [[i for i in range(count) if i not in row] for row in lists.tolist()]
            keep[place] = np.array(stay).reshape(*given.shape[:-1], count - given.shape[-1])
    if problems:
        raise ValueError(f"{what} to remove:\n  " + "\n  ".join(problems))
    return keep


def _refuse_compact(flat: Mapping[str, Any], place: str, names: Sequence[str]) -> None:
    if any(isinstance(flat.get(f"params/{place}/{name}/kernel"), Compact) for name in names):
        raise ValueError(f"{place} has no plain kernels any more: remove first, then quantise")


def _features(kept: np.ndarray, size: int) -> np.ndarray:
    """The features of heads: [..., n] -> [..., n * K]."""
    own = kept[..., None] * size + np.arange(size)
    return own.reshape(*kept.shape[:-1], -1)


def _take(leaf: Array, chosen: np.ndarray, axis: int) -> Array:
    """Places along an axis, the same in all layers or, [L, n], each layer's own."""
    if chosen.ndim == 1:
        return jnp.take(leaf, chosen, axis=axis)
    return jax.vmap(lambda x, at: jnp.take(x, at, axis=axis))(leaf, jnp.asarray(chosen))


def _checked(model: Any, variables: Variables, before: Mapping[str, Any]) -> tuple[Any, Variables]:
    """Traces the smaller model: families may read heads in ways of their own."""
    abstract = jax.eval_shape(lambda: variables)
    inputs = hub.family_for(model).inputs(model.config, model.head)
    try:
        jax.eval_shape(lambda v: model.apply(v, **inputs), abstract)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{hub.family_for(model).MODEL_TYPE} cannot compute with fewer heads or units: "
            f"{str(error).splitlines()[0]}; silence_heads keeps the arrays' sizes"
        ) from error
    return model, variables
