"""Folders of the library PEFT: adapter_config.json beside adapter_model.safetensors.

What all its methods have in common; a method's own file says what its tensors are.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fmjax.config import read_config, write_json
from fmjax.hub import abstract_variables, find_folder
from fmjax.models import family_for
from fmjax.tree import (
    flatten,
    override,
    stack_layers,
    stacked_place,
    unflatten,
    unstack_layers,
)
from fmjax.types import Variables
from fmjax.weights import (
    Rule,
    Tensor,
    export_params,
    import_params,
    literal_rules,
    open_checkpoint,
    write_safetensors,
)

ATTACHES = ("variables",)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILES = ((WEIGHTS,), ("adapter_model.bin",))
# What stands before the model's own names; methods that add to the inputs alone have the first.
BASE = "base_model."
TUNED_BASE = "base_model.model."
# PEFT's names of heads; a bare model has features.
TASK_TYPES = {
    "model": "FEATURE_EXTRACTION",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
# Keys that say where an adapter is from and how PEFT is to run it.
BOOKKEEPING = frozenset(
    """
    auto_mapping base_model_name_or_path ephemeral_gpu_offload inference_mode megatron_core
    peft_type peft_version revision runtime_config task_type
    """.split()
)


def read_adapter(path_or_id: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A folder's config and its tensors, which are the caller's own.

    Args:
        path_or_id: a folder, or a hub id; of the weights, safetensors are preferred to PyTorch's
            format, of which no code is run.

    Raises:
        OSError: no such folder, or it lacks one of the files.
        ValueError: a damaged file.
    """
    folder = find_folder(path_or_id, WEIGHT_FILES)
    config = read_config(folder, CONFIG)
    names = [name for (name,) in WEIGHT_FILES if (folder / name).is_file()]
    if not names:
        raise FileNotFoundError(f"{folder} has {CONFIG}, but no {WEIGHTS}")
    with open_checkpoint(folder / names[0]) as checkpoint:
        tensors = {name: np.array(tensor.read()) for name, tensor in checkpoint.tensors.items()}
    return config, tensors


def write_adapter(
    path: str | Path,
    model: Any,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> Path:
    """Writes a folder that ``PeftModel.from_pretrained`` loads onto the same base model.

    Args:
        path: the folder, made if missing.
        model: the base.
        kind: PEFT's ``peft_type``, "LORA".
        config: the method's keys. A ``task_type`` among them replaces the one of the head.
        tensors: by PEFT's names.

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a dtype that safetensors lacks.
    """
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    task = TASK_TYPES.get(model.head)
    head = {"peft_type": kind, "task_type": task, "base_model_name_or_path": None}
    temporary = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    given = [_tensor(name, array) for name, array in tensors.items()]
    try:
        write_safetensors(temporary, given, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    data = head | {"inference_mode": True} | dict(config)
    write_json(folder / CONFIG, dict(sorted(data.items())))
    return folder


def check_config(
    config: Mapping[str, Any],
    kind: str,
    read: Collection[str],
    fixed: Mapping[str, Collection[Any]],
) -> list[str]:
    """What in a config would be another function than the one that is read; [] if nothing.

    Options that PEFT may add are off by None, False or emptiness, as all of today's are.

    Args:
        config: the parsed file.
        kind: the ``peft_type`` it must have.
        read: keys that the caller heeds.
        fixed: further keys, and the values that are supported.
    """
    problems = []
    if config.get("peft_type") != kind:
        problems.append(f"peft_type={config.get('peft_type')!r} is not {kind!r}")
    for key, value in config.items():
        if key in read or key in BOOKKEEPING:
            continue
        if key in fixed:
            if value not in list(fixed[key]):
                only = " or ".join(map(repr, fixed[key]))
                problems.append(f"{key}={value!r} is not supported; only {only} is")
        elif value not in (None, False, "", [], {}):
            problems.append(f"{key}={value!r} is not supported")
    return problems


def refuse(problems: Sequence[str], what: str) -> None:
    """Raises a ValueError with all problems, if there are any."""
    if problems:
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems))


def base_rules(model: Any) -> list[Rule]:
    """The base's parameters and PyTorch tensors, each layer's for itself."""
    loop = model.clone(scan=False)
    table = family_for(model).rules(model.config, model.head)
    return literal_rules(table, flatten(abstract_variables(loop)))


def read_modules(
    model: Any, variables: Variables, tensors: Mapping[str, np.ndarray]
) -> tuple[Variables, set[str]]:
    """Variables with the parameters that an adapter's file has whole (``modules_to_save``).

    Args:
        model: the base.
        variables: its variables.
        tensors: by PyTorch's names, what PEFT puts before them removed; others are let be.

    Returns:
        (variables, the names that were read).

    Raises:
        ValueError: tensors of another shape than the model's, or only some of one parameter's.
    """
    # Not by aliases: a tied matrix that PEFT has trained in one of its places is tied no longer.
    rules = [rule for rule in base_rules(model) if tensors.keys() & set(rule.tensors)]
    names = {name for rule in rules for name in rule.tensors if name in tensors}
    if not rules:
        return variables, names
    old = _layers_of(model, variables, [path for rule in rules for path in rule.params])
    read = import_params(
        rules,
        {name: _tensor(name, tensors[name]) for name in names},
        {path: old[path] for rule in rules for path in rule.params},
        place=lambda path, array: jnp.asarray(array, old[path].dtype),
    )
    new = unflatten(old | read)
    return override(variables, stack_layers(new) if model.scan else new), names


def write_modules(
    model: Any, variables: Variables, paths: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters that an adapter's file is to have whole.

    Args:
        model: the base.
        variables: its variables.
        paths: globs over paths of modules, "head/classifier".

    Returns:
        (tensors by PyTorch's names, PyTorch's names of the modules that they are).

    Raises:
        ValueError: a glob that matches nothing.
    """
    rules = base_rules(model)
    chosen: list[Rule] = []
    idle = []
    for pattern in paths:
        found = [rule for rule in rules if any(_inside(path, pattern) for path in rule.params)]
        if not found:
            idle.append(pattern)
        chosen += [rule for rule in found if rule not in chosen]
    if idle:
        modules = {"/".join(path.split("/")[1:-1]) for rule in rules for path in rule.params}
        raise ValueError(f"no module's path matches {idle}; there is {', '.join(sorted(modules))}")
    wanted = [path for rule in chosen for path in rule.params]
    leaves = _layers_of(model, variables, wanted)
    exported = export_params(chosen, {path: leaves[path] for path in wanted})
    written = {tensor.name: tensor.read() for tensor in exported}
    others = {name for rule in rules for name in rule.tensor_names()} - written.keys()
    return written, _modules(written, others)


def _layers_of(model: Any, variables: Variables, paths: Iterable[str]) -> dict[str, Any]:
    """Leaves by the paths of a loop over layers; of a scanned model no others are unstacked."""
    flat = flatten(variables)
    if model.scan:
        paths = [(stacked_place(path) or (path, 0))[0] for path in paths]
    return flatten(unstack_layers(unflatten({path: flat[path] for path in paths})))


def _tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, array.shape, array.dtype, lambda: array)


def _inside(path: str, pattern: str) -> bool:
    """Whether a parameter is in a module that a glob matches, at whatever depth."""
    parts = path.split("/")[1:-1]
    return any(fnmatchcase("/".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _modules(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The outermost PyTorch modules that hold these tensors and no others."""
    result: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if end == len(parts) or not any(other.startswith(f"{module}.") for other in others):
                result[module] = None
                break
    return list(result)
