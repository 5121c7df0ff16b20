"""Families of models: one file per Hugging Face ``model_type``; the file's name is the key."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

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
