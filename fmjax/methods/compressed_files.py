"""Files of variables whose parameters are partly quantised or in factors: what is kept is written.

One safetensors file; integers and factors are tensors of their own, and the header says what they
make. No other library knows the format.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array
from safetensors import safe_open
from safetensors.flax import save_file

from fmjax.nn.compact import Compact, Factors, Quantized
from fmjax.tree import flatten, unflatten
from fmjax.types import Variables

ATTACHES = ("variables",)

FORMS = {form.__name__: form for form in (Factors, Quantized)}
HEADER = "fmjax.compact"


def write(file: str | Path, variables: Variables) -> Path:
    """Writes variables as they are kept, and returns the file.

    Args:
        file: its folder must be there.
        variables: a model's, any of them quantised or in factors.

    Raises:
        OSError: the file cannot be written.
    """
    tensors, forms = {}, {}
    for path, leaf in flatten(variables).items():
        if not isinstance(leaf, Compact):
            tensors[path] = jnp.asarray(leaf)
            continue
        parts = vars(leaf)
        arrays = {name: part for name, part in parts.items() if isinstance(part, Array)}
        tensors |= {f"{path}/{name}": part for name, part in arrays.items()}
        plain = {name: part for name, part in parts.items() if name not in arrays}
        forms[path] = {"form": type(leaf).__name__, **plain}
    save_file(tensors, file, metadata={HEADER: json.dumps(forms)})
    return Path(file)


def read(file: str | Path) -> Variables:
    """The variables of a file that `write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another kind of file.
    """
    with safe_open(file, framework="flax") as opened:
        header = (opened.metadata() or {}).get(HEADER)
        tensors: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if header is None:
        raise ValueError(f"{file} is not of compressed variables; a model's folder is read by load")
    for path, form in json.loads(header).items():
        cls = FORMS[form.pop("form")]
        names = [field.name for field in dataclasses.fields(cls) if field.name not in form]
        parts = {name: tensors.pop(f"{path}/{name}") for name in names}
        tensors[path] = cls(**parts, **form)
    return unflatten(tensors)
