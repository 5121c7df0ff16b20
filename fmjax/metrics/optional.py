"""Libraries that not everybody needs, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional_library(module: str, package: str, extra: str) -> ModuleType:
    """A library of one of the package's extras.

    Args:
      module: its name in Python, e.g. "rouge_score.rouge_scorer".
      package: its name on the package index.
      extra: of the package that has it, such as "text" in ``fmjax[text]``.

    Raises:
      ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'fmjax[{extra}]'"
        ) from error


def text_library(module: str, package: str) -> ModuleType:
    """A library of the extra ``fmjax[text]``; see `optional_library`."""
    return optional_library(module, package, "text")
