"""Libraries that not everybody needs, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def text_library(module: str, package: str) -> ModuleType:
    """A library of the extra ``fmjax[text]``.

    Args:
      module: its name in Python, e.g. "rouge_score.rouge_scorer".
      package: its name on the package index.

    Raises:
      ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this metric is {package}'s, which is not installed: pip install 'fmjax[text]'"
        ) from error
