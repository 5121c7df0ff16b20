"""Families of models: one file per Hugging Face ``model_type``; the file's name is the key."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


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
