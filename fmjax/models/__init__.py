"""Families of models: one file per Hugging Face ``model_type``; the file's name is the key."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.config import config_to_json, parse_config

Config = TypeVar("Config")


def family_of(model_type: str) -> ModuleType:
    """The module of a Hugging Face ``model_type``: ``fmjax/models/<model_type>.py``.

    Raises:
        ValueError: there is no such family.
    """
    name = model_type.replace("-", "_")
    known = families()
    if name not in known:
        raise ValueError(f"model_type {model_type!r} is not among the families {known}")
    return importlib.import_module(f"fmjax.models.{name}")


def families() -> list[str]:
    """Names of all families, which are the files of fmjax/models."""
    folder = Path(__path__[0])
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


def token_inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter, of families that take tokens alone: what
    initialisation traces the model on, as their ``inputs``.
    """
    return {"input_ids": jnp.zeros((1, 1), jnp.int32)}


def config_alone(config: Config, head: str, names: Collection[str]) -> Config:
    """The config as it is: the ``from_tensors`` of families whose tensors' names tell no more."""
    return config


def family_for(thing: Any) -> ModuleType:
    """The family that a config or a model is of."""
    return family_of(type(thing).__module__.rpartition(".")[2])


def fields_of(config: Any) -> dict[str, Any]:
    """A config's fields by name, as they are: configs inside it too."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def width_of(config: Any) -> int:
    """D of the last hidden states of a family's bare model, whatever its config calls it."""
    fields = fields_of(config)
    names = ("hidden_size", "d_model", "n_embd", "dim")
    known = [fields[name] for name in names if name in fields]
    return known[0] if known else _traced_width(config)


@functools.lru_cache(maxsize=64)
def _traced_width(config: Any) -> int:
    """The same of a convolutional network, whose last width follows from many numbers."""
    family = family_for(config)
    model = family.Model(config)
    out, _ = jax.eval_shape(
        lambda key: model.init_with_output(key, **family.inputs(config, "model")), jax.random.key(0)
    )
    states = out.pooler_output if out.last_hidden_state is None else out.last_hidden_state
    return states.shape[-1]


@functools.lru_cache(maxsize=64)
def arguments_of(family: ModuleType) -> frozenset[str]:
    """The names of what a family's model is called with, such as "pixel_values"."""
    return frozenset(inspect.signature(family.Model.__call__).parameters) - {"self"}


# What a part's file says of its place, for families whose place is always the same.
PLACE = frozenset({"is_decoder", "is_encoder_decoder"})


def read_part(data: Any) -> Any:
    """A config inside a config: its ``model_type`` names the family.

    Raises:
        ValueError: it is no object, names no family of ours or does not fit the family.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("model_type"), str):
        raise ValueError("must be an object with model_type")
    family = family_of(data["model_type"])
    known = {field.name for field in dataclasses.fields(family.Config)} | set(family.FIXED)
    part = {key: value for key, value in data.items() if key in known or key not in PLACE}
    return parse_config(family.Config, part, family.FIXED)


def write_part(config: Any) -> dict[str, Any]:
    """The inverse of `read_part`."""
    return config_to_json(config, {"model_type": family_for(config).MODEL_TYPE})


PART = {"read": read_part, "write": write_part}
"""The metadata of a field that holds the Config of any family: see `fmjax.config.parse_config`."""


def part_of(model_type: str) -> dict[str, Any]:
    """The same for a field whose config is of one family, which its file need not name."""

    def read(data: Any) -> Any:
        if data is None:  # the family's defaults
            return None
        named = {"model_type": model_type, **data} if isinstance(data, Mapping) else data
        part = read_part(named)
        if (found := family_for(part).MODEL_TYPE) != model_type:
            raise ValueError(f"is of model_type {found!r}; it must be {model_type!r}")
        return part

    return {"read": read, "write": write_part}
