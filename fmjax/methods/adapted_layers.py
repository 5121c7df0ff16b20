"""Adapters of dense layers, whatever their kind: which layers, what trains, several at once.

A method makes the leaves of the collection "adapters" that `fmjax.nn.adapter` reads, one dict a
layer, at the path that the layer has in "params". Everything works on scanned models too, whose
leaves have a leading axis L.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.adapter import AXES, LOW_RANK, column_norms
from fmjax.nn.compact import Compact, whole
from fmjax.tree import flatten, is_stacked, layer_paths, merge, override, unflatten
from fmjax.types import Variables, one_text

ATTACHES = ("variables", "loss")

CONSTANTS = ("scale", "dropout", "choice")
T = TypeVar("T")


def is_adapter(path: str) -> bool:
    """Whether a leaf is one that adapters train: ``is_trainable`` of `fmjax.train.init_state`."""
    return path.startswith("adapters/") and path.rpartition("/")[2] not in CONSTANTS


def of_modules(variables: Variables) -> dict[str, dict[str, Any]]:
    """The adapters' leaves by module, ``{"layers_0/attn/query": {"down": ...}}``.

    The leaves of a small layer behind a dense one are under their path in it, "after/relu/down".
    """
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(variables.get("adapters", {})).items():
        parts = path.split("/")
        end = -3 if len(parts) > 3 and parts[-3] == "after" else -1
        modules.setdefault("/".join(parts[:end]), {})["/".join(parts[end:])] = leaf
    return modules


def dense_kernels(variables: Variables, targets: Sequence[str]) -> dict[str, Any]:
    """The kernels of dense layers whose paths match, by path: [I, O], or [L, I, O] if scanned.

    Args:
        variables: a model's.
        targets: globs over paths of modules; ``*`` matches any part of a path: "*/attn/query".

    Raises:
        ValueError: a glob that matches nothing, or only what has no dense kernel.
    """
    flat = flatten(variables.get("params", {}))
    modules = {path.rpartition("/")[0] for path in flat}
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in flat.items()
        if path.endswith("/kernel") and leaf.ndim == 2 + is_stacked(path.removesuffix("/kernel"))
    }
    problems, chosen = one_text("targets", targets), {}
    for target in () if problems else targets:
        found = {path: leaf for path, leaf in kernels.items() if fnmatchcase(path, target)}
        chosen |= found
        if found:
            continue
        if other := sorted(path for path in modules if fnmatchcase(path, target)):
            problems.append(
                f"{target!r} matches {', '.join(other[:3])}, which have no dense kernel "
                "(embeddings, norms, convolutions and experts cannot be adapted)"
            )
        else:
            near = difflib.get_close_matches(target, {*map(_glob, kernels)}, 6, 0.0)
            problems.append(f"{target!r} matches no module; near are {', '.join(near)}")
    if not targets:
        problems.append("there are none")
    if problems:
        raise ValueError("targets of adapters:\n  " + "\n  ".join(problems))
    return chosen


def _glob(module: str) -> str:
    """What matches a module in every layer: "*/attn/query"."""
    parts = module.split("/")
    return module if len(parts) < 3 else "*/" + "/".join(parts[-2:])


def with_adapters(variables: Variables, modules: Mapping[str, Mapping[str, Any]]) -> Variables:
    """The variables with further leaves of adapters, by module as in `of_modules`.

    Raises:
        ValueError: a leaf that is there already.
    """
    new = {
        f"adapters/{module}/{name}": leaf
        for module, leaves in modules.items()
        for name, leaf in leaves.items()
    }
    if there := sorted(new.keys() & flatten(variables).keys()):
        raise ValueError(
            f"there are adapters already: {', '.join(there[:5])}{' ...' if there[5:] else ''}; "
            "merge or remove them first, or choose other targets"
        )
    return merge(variables, unflatten(new))


def without_adapters(variables: Variables) -> Variables:
    """The base model's variables."""
    return {name: tree for name, tree in variables.items() if name != "adapters"}


def draw(
    rng: Array, path: str, shape: tuple[int, ...], make: Callable[[Array, tuple[int, ...]], Array]
) -> Array:
    """``make(key, shape)`` by a key of the path's own; the same scanned or not.

    Args:
        rng: a typed key.
        path: of the module.
        shape: of one layer's leaf, after an axis L if the module is scanned.
        make: draws one layer's leaf.
    """

    def at(path: str, shape: tuple[int, ...]) -> Array:
        return make(jax.random.fold_in(rng, zlib.crc32(path.encode())), shape)

    layers = layer_paths(path, shape)
    if layers is None:
        return at(path, shape)
    return jnp.stack([at(layer, shape[1:]) for layer in layers])


def merge_adapters(variables: Variables) -> Variables:
    """The base model's variables with the adapters in its kernels: the same function without them.

    Adapted kernels that are quantised or factored become plain ones.

    Raises:
        ValueError: adapters that are no change of kernels, or several to choose from.
    """
    return _moved(variables, variables.get("adapters", {}), _merged)


def unmerge_adapters(variables: Variables, adapters: Variables) -> Variables:
    """The variables before `merge_adapters`, to rounding; the adapters are not among them.

    Args:
        variables: merged.
        adapters: the collection that was merged.

    Raises:
        ValueError: as there; or adapters that set the lengths of columns, whose earlier lengths the
            merged kernel does not tell.
    """
    return _moved(variables, adapters, _unmerged)


def _moved(variables: Variables, adapters: Variables, move: Callable[..., Any]) -> Variables:
    base = without_adapters(variables)
    flat = flatten(base)
    new, problems = {}, []
    for module, leaves in of_modules({"adapters": adapters}).items():
        kernel, bias = f"params/{module}/kernel", f"params/{module}/bias"
        if kernel not in flat:
            problems.append(f"{module}: the model has no such dense layer")
        elif _several(leaves, flat[kernel]):
            problems.append(f"{module}: several adapters; take one (`take_adapter`)")
        elif any(name.startswith("after/") for name in leaves):
            problems.append(f"{module}: a layer behind the kernel is no part of it")
        elif "magnitude" in leaves and move is _unmerged:
            problems.append(f"{module}: its columns' lengths before are lost; keep the base model")
        else:
            new[kernel] = move(whole(flat[kernel]), leaves)
            if "out_scale" in leaves and bias in flat:
                factor = leaves["out_scale"]
                new[bias] = flat[bias] * factor if move is _merged else flat[bias] / factor
    if problems:
        raise ValueError("these adapters cannot be merged:\n  " + "\n  ".join(problems))
    return override(base, unflatten(new))


def _several(leaves: Mapping[str, Array], kernel: Array) -> bool:
    """Whether the leaves are of several adapters, [N, ...]."""
    axes = {name: leaf.ndim - kernel.ndim + 2 for name, leaf in leaves.items()}
    return any(axes[name] > AXES[name] for name in leaves.keys() & AXES.keys())


def _update(leaves: Mapping[str, Array]) -> Array:
    """The low-rank update of a kernel: [..., I, O] float32."""
    down, up, scale = (leaves[name].astype(jnp.float32) for name in LOW_RANK)
    return scale[..., None, None] * jnp.matmul(down, up, precision="highest")


def _scales(leaves: Mapping[str, Array]) -> Array:
    """What the kernel's entries are multiplied by because features are: [..., I, O]."""
    factor = jnp.ones((), jnp.float32)
    if "in_scale" in leaves:
        factor = factor * leaves["in_scale"][..., :, None]
    if "out_scale" in leaves:
        factor = factor * leaves["out_scale"][..., None, :]
    return factor


def _merged(kernel: Array, leaves: Mapping[str, Array]) -> Array:
    merged = kernel.astype(jnp.float32)
    if "down" in leaves:
        merged = merged + _update(leaves)
    if "magnitude" in leaves:
        norms = lengths(kernel, *(leaves[name] for name in LOW_RANK))
        merged = merged * (leaves["magnitude"] / norms)[..., None, :]
    return (merged * _scales(leaves)).astype(kernel.dtype)


def _unmerged(kernel: Array, leaves: Mapping[str, Array]) -> Array:
    base = kernel.astype(jnp.float32) / _scales(leaves)
    return (base - _update(leaves) if "down" in leaves else base).astype(kernel.dtype)


def lengths(kernel: Array | Compact, down: Array, up: Array, scale: Array) -> Array:
    """`fmjax.nn.adapter.column_norms` of a kernel, or of L scanned ones."""
    norms = column_norms if kernel.ndim == 2 else jax.vmap(column_norms)
    return norms(kernel, down, up, scale)


def stack_adapters(variables: Variables, adapters: Sequence[Variables]) -> Variables:
    """The base model with several adapters, of which `choose_adapters` gives each example its own.

    Updates of lower rank are filled with zeros, and layers that not all adapt with updates that
    are zero.

    Args:
        variables: the base model's.
        adapters: N collections "adapters", of one kind.

    Raises:
        ValueError: none, or adapters whose kinds differ.
    """
    if not adapters:
        raise ValueError("there are no adapters to stack")
    each = [of_modules({"adapters": collection}) for collection in adapters]
    names = dict.fromkeys(module for modules in each for module in modules)
    stacked = {}
    for module in names:
        aligned = align(module, [modules.get(module, {}) for modules in each])
        axis = int(is_stacked(module))
        stacked[module] = {
            name: jnp.stack([leaves[name] for leaves in aligned], axis) for name in aligned[0]
        }
    return with_adapters(without_adapters(variables), stacked)


def align(module: str, each: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adapters of one module with the same leaves and shapes: see `stack_adapters`.

    Raises:
        ValueError: adapters whose kinds differ.
    """
    names = dict.fromkeys(name for leaves in each for name in leaves if name != "dropout")
    shapes = {
        name: tuple(
            map(max, zip(*(leaves[name].shape for leaves in each if name in leaves), strict=True))
        )
        for name in names
    }
    result = []
    for leaves in each:
        missing = [name for name in names if name not in leaves]
        if missing and (leaves or not set(missing) <= set(LOW_RANK)):
            raise ValueError(
                f"adapters of {module} are of different kinds: some have {sorted(missing)}; stack "
                "adapters of one kind"
            )
        result.append({name: _grown(leaves.get(name), shapes[name]) for name in names})
    if any("dropout" in leaves for leaves in each):
        like = shapes["scale"]
        for new, leaves in zip(result, each, strict=True):
            new["dropout"] = jnp.broadcast_to(leaves.get("dropout", jnp.zeros(())), like)
    return result


def _grown(leaf: Any, shape: tuple[int, ...]) -> Array:
    if leaf is None:
        return jnp.zeros(shape, jnp.float32)
    if leaf.shape == shape:
        return leaf
    return jnp.pad(leaf, [(0, size - own) for own, size in zip(leaf.shape, shape, strict=True)])


def take_adapter(variables: Variables, index: int) -> Variables:
    """The variables with one of the adapters that `stack_adapters` put side by side."""
    taken = {
        module: {
            name: jnp.take(leaf, index, int(is_stacked(module)))
            for name, leaf in leaves.items()
            if name != "choice"
        }
        for module, leaves in of_modules(variables).items()
    }
    return with_adapters(without_adapters(variables), taken)


def choose_adapters(variables: Variables, index: Array) -> Variables:
    """The variables with each example's choice among the adapters of `stack_adapters`.

    The choice is an array like others: another one compiles nothing anew.

    Args:
        variables: with stacked adapters.
        index: int [B]; a layer whose inputs have a multiple of B rows takes as many consecutive
            ones for each example.

    Raises:
        ValueError: there are no adapters.
    """
    modules = of_modules(variables)
    if not modules:
        raise ValueError("the variables have no adapters to choose from: see stack_adapters")
    flat = flatten(variables)
    for module, leaves in modules.items():
        layers = next(iter(leaves.values())).shape[: int(is_stacked(module))]
        flat[f"adapters/{module}/choice"] = jnp.broadcast_to(index, (*layers, *index.shape))
    return unflatten(flat)


def per_example(fn: Callable[..., T]) -> Callable[..., T]:
    """A LossFn, an Apply or a task's predictions with each example's own adapter.

    Args:
        fn: called ``(variables, batch, ...)``; the variables' adapters are stacked.

    Returns:
        The same function of batches that have ``adapter_index`` int [B] besides.
    """

    def chosen(variables: Variables, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> T:
        rest = {name: leaf for name, leaf in batch.items() if name != "adapter_index"}
        index = jnp.asarray(batch["adapter_index"])
        return fn(choose_adapters(variables, index), rest, *args, **kwargs)

    return chosen
