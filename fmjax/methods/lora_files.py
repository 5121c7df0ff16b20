"""Low-rank adapters of the library PEFT: its LoRA, rsLoRA and DoRA, in and out.

Modules get their PyTorch names from the family's table of rules. Where PyTorch keeps layers as one
that are several here (GPT-2's ``c_attn``), they share one A, and B falls into parts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fmjax.hub import abstract_variables
from fmjax.methods.adapted_layers import align, lengths, of_modules, with_adapters
from fmjax.methods.peft_files import (
    TASK_TYPES,
    TUNED_BASE,
    base_rules,
    check_config,
    read_adapter,
    read_modules,
    refuse,
    write_adapter,
    write_modules,
)
from fmjax.models import family_for
from fmjax.tree import flatten, is_stacked, stacked_place
from fmjax.types import Variables
from fmjax.weights import Rule

ATTACHES = ("variables",)

READ = frozenset(
    """
    alpha_pattern exclude_modules fan_in_fan_out layers_pattern layers_to_transform lora_alpha
    lora_dropout modules_to_save r rank_pattern target_modules use_dora use_rslora
    """.split()
)
# How the adapter began matters only where PEFT changes the base's weights to begin with.
FIXED = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "qalora_group_size": (16,),  # without use_qalora, which is refused
}
TENSOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|(magnitude_vector)(?:\.weight)?)")


@dataclasses.dataclass(frozen=True)
class Place:
    """A dense layer of PyTorch's, and where it is here.

    Args:
        name: PyTorch's.
        paths: of the K modules that are its parts, mostly one.
        inputs: int [I], which of its inputs each of theirs is.
        outputs: int [O_k] for each part, which of its outputs each of theirs is.
        transposed: whether its weight is [I, O], as Conv1D has it, and not [O, I].
    """

    name: str
    paths: tuple[str, ...]
    inputs: np.ndarray
    outputs: tuple[np.ndarray, ...]
    transposed: bool


def places(model: Any) -> dict[str, Place]:
    """The dense layers of a model by PyTorch's names."""
    abstract = flatten(abstract_variables(model.clone(scan=False)))
    result: dict[str, Place] = {}
    known: dict[Any, tuple[np.ndarray, tuple[np.ndarray, ...], bool] | None] = {}
    for rule in base_rules(model):
        shapes = tuple(tuple(abstract[path].shape) for path in rule.params)
        dense = all(path.endswith("/kernel") for path in rule.params)
        if not dense or len(rule.tensors) != 1 or any(len(shape) != 2 for shape in shapes):
            continue
        key = (id(rule.transform), shapes)
        if key not in known:
            known[key] = _features(rule, shapes)
        if (features := known[key]) is not None:
            paths = tuple(path[len("params/") : -len("/kernel")] for path in rule.params)
            name = rule.tensors[0].removesuffix(".weight")
            result[name] = Place(name, paths, *features)
    return result


def _features(
    rule: Rule, shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, tuple[np.ndarray, ...], bool] | None:
    """Where each input and output of a rule's kernels is in its tensor; None if they are mixed.

    Found by transforming the numbers of the tensor's rows, and those of its columns.
    """
    rows, columns = rule.transform.save_shapes(list(shapes))[0]
    row = np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], (rows, columns))
    column = np.broadcast_to(np.arange(columns, dtype=np.int32), (rows, columns))
    of_row, of_column = rule.transform.load([row]), rule.transform.load([column])
    transposed = all((part[:, :1] == part).all() for part in of_row)
    if rows == 1:  # constant either way
        transposed = columns != shapes[0][0]
    if transposed:  # a row is an input
        of_input, of_output = of_row, of_column
    else:
        of_input, of_output = of_column, of_row
    inputs = [np.array(part[:, 0]) for part in of_input]
    outputs = [np.array(part[0]) for part in of_output]
    separate = all((part == own[:, None]).all() for part, own in zip(of_input, inputs, strict=True))
    separate &= all((part == own).all() for part, own in zip(of_output, outputs, strict=True))
    if not separate or any((own != inputs[0]).any() for own in inputs):
        return None
    return inputs[0], tuple(outputs), transposed


def load(path_or_id: str | Path, model: Any, variables: Variables) -> Variables:
    """The variables with an adapter that PEFT wrote, and with the modules that it has whole.

    Args:
        path_or_id: a folder with adapter_config.json and its weights, or a hub id.
        model: the base, from `fmjax.load`; with or without the head that the adapter was made for.
        variables: its variables.

    Returns:
        The variables with "adapters" as `fmjax.methods.lora.add` makes them.

    Raises:
        OSError: no such folder.
        ValueError: an option that is not supported, or tensors that do not fit the model; all
            problems are listed.
    """
    config, tensors = read_adapter(path_or_id)
    problems = check_config(config, "LORA", READ, FIXED) + _wrong_values(config)
    refuse(problems, f"the adapter_config.json of {path_or_id}")
    tensors = {name.removeprefix(TUNED_BASE): array for name, array in tensors.items()}
    variables, used = read_modules(model, variables, tensors)
    there = places(model)
    prefix = family_for(model).PREFIX
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors.keys() - used:
        match = TENSOR.fullmatch(name)
        if match is None:
            problems.append(f"{name}: nothing in the model reads it")
            continue
        module = match[1]
        others = (f"{prefix}{module}", module.removeprefix(prefix))
        module = next((other for other in others if other in there), module)
        parts.setdefault(module, {})[match[2] or match[3]] = tensors[name]
    modules: dict[str, dict[str, Any]] = {}
    for module, given in sorted(parts.items()):
        if module not in there:
            problems.append(f"{module}: the model has no such dense layer")
        elif wrong := _misfit(there[module], given, config):
            problems += wrong
        else:
            modules |= _leaves(there[module], given, config)
    if (matches := _matcher(config)) is not None:
        problems += [
            f"{name}: target_modules has it, the file has no tensors for it"
            for name in there
            if name not in parts and matches(name)
        ]
        problems += [
            f"{name}: the file has tensors for it, target_modules leaves it out"
            for name in parts
            if name in there and not matches(name)
        ]
    refuse(problems, f"the adapter {path_or_id} does not fit the model")
    if model.scan:
        modules = _stacked(variables, modules)
    return with_adapters(variables, modules)


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    """Values that cannot be what their keys mean."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    def whole(value: Any) -> bool:
        return type(value) is int and value > 0

    def table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: not value or (isinstance(value, dict) and all(map(of, value.values())))

    def flag(value: Any) -> bool:
        return isinstance(value, bool)

    def share(value: Any) -> bool:
        return value == 0 or (number(value) and value < 1)

    checks: dict[str, tuple[Callable[[Any], bool], Any]] = {
        "r": (whole, 8),
        "lora_alpha": (number, 8),
        "lora_dropout": (share, 0.0),
        "rank_pattern": (table(whole), {}),
        "alpha_pattern": (table(number), {}),
        "use_dora": (flag, False),
        "use_rslora": (flag, False),
    }
    problems = [
        f"{key}={config.get(key)!r} is no value of it"
        for key, (holds, default) in checks.items()
        if not holds(config.get(key, default))
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key} has {pattern!r}, no regular expression: {error}")
    return problems


def _by_pattern(config: Mapping[str, Any], key: str, default: str, module: str) -> Any:
    """A module's rank or alpha: that of the first pattern that its name ends in."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(default, 8)


def _matcher(config: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """Which modules PEFT would adapt by this config; None where that is not told by names."""
    targets = config.get("target_modules")
    others = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if targets in (None, "all-linear") or any(config.get(key) for key in others):
        return None
    saved = config.get("modules_to_save") or ()

    def matches(name: str) -> bool:
        if any(f".{module}." in f".{name}." for module in saved):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return matches


def _misfit(place: Place, given: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> list[str]:
    """Why a module's tensors are not the model's, or not the config's."""
    rank = _by_pattern(config, "rank_pattern", "r", place.name)
    inputs, outputs = len(place.inputs), sum(map(len, place.outputs))
    wanted: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (outputs, rank)}
    if config.get("use_dora"):
        wanted["magnitude_vector"] = (outputs,)
    problems = [
        f"{place.name}: {'has no' if name not in given else 'is not to have'} lora_{name}"
        for name in wanted.keys() ^ given.keys()
    ]
    problems += [
        f"{place.name}: lora_{name} is {given[name].shape}; by the model and the config's rank it "
        f"is {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    return problems


def _leaves(
    place: Place, given: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The leaves of a module's parts."""
    rank = _by_pattern(config, "rank_pattern", "r", place.name)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", place.name)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    result = {}
    for path, outputs in zip(place.paths, place.outputs, strict=True):
        leaves = {
            "down": given["A"].T[place.inputs],
            "up": given["B"].T[:, outputs],
            "scale": np.float32(scale),
        }
        if "magnitude_vector" in given:
            leaves["magnitude"] = given["magnitude_vector"][outputs]
        if config.get("lora_dropout"):
            leaves["dropout"] = np.float32(config["lora_dropout"])
        result[path] = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}
    return result


def _stacked(
    variables: Variables, modules: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Layers' leaves one behind the other; layers without get updates that are zero."""
    flat = flatten(variables["params"])
    result: dict[str, dict[str, Any]] = {}
    layers: dict[str, dict[int, Mapping[str, Any]]] = {}
    for module, leaves in modules.items():
        place = stacked_place(f"{module}/kernel")
        if place is None:
            result[module] = dict(leaves)
        else:
            layers.setdefault(place[0].removesuffix("/kernel"), {})[place[1]] = leaves
    for module, by_layer in layers.items():
        count = flat[f"{module}/kernel"].shape[0]
        aligned = align(module, [by_layer.get(i, {}) for i in range(count)])
        result[module] = {name: jnp.stack([x[name] for x in aligned]) for name in aligned[0]}
    return result


def save(path: str | Path, model: Any, variables: Variables, *, whole: Sequence[str] = ()) -> Path:
    """Writes the adapters as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        path: the folder, made if missing.
        model: the base.
        variables: with adapters as `fmjax.methods.lora.add` makes them.
        whole: globs over paths of modules whose parameters are written whole, because they were
            trained: "head" or "head/*".

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be written.
        ValueError: adapters of another kind, or several; all problems are listed.
    """
    modules = _unstacked(of_modules(variables))
    there = {path: place for place in places(model).values() for path in place.paths}
    problems = [] if modules else ["there are none"]
    problems += [
        f"{module}: {', '.join(sorted(leaves))} are not one low-rank update"
        for module, leaves in modules.items()
        if not {"down", "up", "scale"}
        <= leaves.keys()
        <= {"down", "up", "scale", "dropout", "magnitude"}
        or leaves["scale"].ndim
    ]
    problems += [
        f"{module}: PyTorch has no such layer" for module in modules if module not in there
    ]
    rates = {str(leaves.get("dropout", np.float32(0))) for leaves in modules.values()}
    if len({"magnitude" in leaves for leaves in modules.values()}) > 1:
        problems.append("some have magnitudes; PEFT has one setting for all")
    if len(rates) > 1:
        problems.append(f"dropout of {sorted(rates)}; PEFT has one rate for all")
    refuse(problems, "these adapters cannot be PEFT's")
    tensors, ranks, alphas, used = {}, {}, {}, []
    for place in dict.fromkeys(there[module].name for module in modules):
        own = next(x for x in there.values() if x.name == place)
        written, scale = _tensors(own, modules, variables)
        tensors |= {f"{TUNED_BASE}{place}.lora_{name}": array for name, array in written.items()}
        ranks[place] = len(written["A.weight"])
        alphas[place] = _plain(scale * ranks[place])
        used.append(own)
    saved, saved_modules = write_modules(model, variables, whole) if whole else ({}, [])
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    targets = _targets(model, list(ranks))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": float(rates.pop()),
        "use_dora": any("magnitude" in leaves for leaves in modules.values()),
        "use_rslora": False,
        "fan_in_fan_out": any(place.transposed for place in used),
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": saved_modules or None,
        # PEFT adds heads to modules_to_save by the task, and would then not adapt them.
        "task_type": TASK_TYPES.get(model.head) if not any("head" in x for x in modules) else None,
    }
    tensors |= {f"{TUNED_BASE}{name}": array for name, array in saved.items()}
    return write_adapter(path, model, "LORA", config, tensors)


def _unstacked(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Each layer's leaves for itself; without layers that are not adapted (see `_stacked`)."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for module, leaves in modules.items():
        arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        if not is_stacked(module):
            result[module] = arrays
            continue
        before, _, after = f"/{module}".rpartition("/layers/")
        for i in range(len(next(iter(arrays.values())))):
            layer = f"{before}/layers_{i}/{after}".removeprefix("/")
            result[layer] = {name: array[i] for name, array in arrays.items()}
    return {
        module: leaves for module, leaves in result.items() if np.any(leaves.get("scale", 1) != 0)
    }


def _tensors(
    place: Place, modules: Mapping[str, Mapping[str, np.ndarray]], variables: Variables
) -> tuple[dict[str, np.ndarray], float]:
    """A module's tensors and its scale. Parts with A's of their own get ranks of their own."""
    parts = [modules.get(path) for path in place.paths]
    adapted = [part for part in parts if part is not None]
    downs = [adapted[0]["down"]]
    if any(not np.array_equal(part["down"], downs[0]) for part in adapted):
        downs = [part["down"] for part in adapted]
    rank = sum(down.shape[1] for down in downs)
    scale = float(adapted[0]["scale"])
    a = np.zeros((rank, len(place.inputs)), np.float32)
    a[:, place.inputs] = np.concatenate(downs, axis=1).T
    b = np.zeros((sum(map(len, place.outputs)), rank), np.float32)
    start = 0
    for part, outputs in zip(parts, place.outputs, strict=True):
        if part is None:
            continue
        up = part["up"] * np.float32(float(part["scale"]) / scale)
        b[outputs, start : start + len(up)] = up.T
        start += len(up) if len(downs) > 1 else 0
    result: dict[str, np.ndarray] = {"A.weight": a, "B.weight": b}
    if "magnitude" in adapted[0]:
        magnitude: np.ndarray = np.zeros(len(b), np.float32)
        for path, part, outputs in zip(place.paths, parts, place.outputs, strict=True):
            own = _kernel_lengths(variables, path) if part is None else part["magnitude"]
            magnitude[outputs] = own
        result["magnitude_vector"] = magnitude
    return result, scale


def _kernel_lengths(variables: Variables, module: str) -> np.ndarray:
    """The lengths of a kernel's columns, of a part that is not adapted."""
    flat = flatten(variables["params"])
    place = stacked_place(f"{module}/kernel")
    if place is not None and place[0] in flat:
        kernel = flat[place[0]][place[1]]
    else:
        kernel = flat[f"{module}/kernel"]
    zero = jnp.zeros((1, 1))
    down, up = jnp.broadcast_to(zero, (kernel.shape[0], 1)), jnp.zeros((1, kernel.shape[1]))
    return np.asarray(lengths(kernel, down, up, jnp.ones(())))


def _targets(model: Any, names: Sequence[str]) -> list[str]:
    """The last parts of modules' names, if they mean just these, or whole names."""
    every = {tensor.rpartition(".")[0] for rule in base_rules(model) for tensor in rule.tensors}
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in every if name.rpartition(".")[2] in ends}
    return ends if meant == set(names) else sorted(names)


def _plain(number: float) -> int | float:
    """Without what float32 has made of a whole number."""
    return round(number) if abs(number - round(number)) < 1e-6 * abs(number) else number
