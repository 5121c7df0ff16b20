"""Old and differing names of the same tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from fmjax.weights.tensor import Tensor

# Checkpoints converted from TensorFlow say gamma and beta in layer norms. Only there: elsewhere
# (ConvNeXt's layer scale, GRN) they are the parameters' own names.
LAYER_NORM = re.compile(r"^(.*layer_?norm[^.]*)\.(gamma|beta)$", re.IGNORECASE)
MODERN = {"gamma": "weight", "beta": "bias"}
PARALLEL = "module."  # what torch.nn.DataParallel puts before every name


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under today's names: LayerNorm.gamma/beta, and DataParallel's `module.` prefix.

    Raises:
        ValueError: two tensors that get one name.
    """
    parallel = bool(tensors) and all(name.startswith(PARALLEL) for name in tensors)
    renamed: dict[str, str] = {}
    for name in tensors:
        new = name.removeprefix(PARALLEL) if parallel else name
        if match := LAYER_NORM.match(new):
            new = f"{match[1]}.{MODERN[match[2].lower()]}"
        renamed[name] = new
    return _renamed(tensors, renamed)


def fit_prefix(
    tensors: Mapping[str, Tensor], expected: Collection[str], prefix: str
) -> dict[str, Tensor]:
    """Tensors under names with or without the base model's prefix, as the model expects.

    A base checkpoint has `encoder...` where a model with a head expects `bert.encoder...`, and the
    reverse.

    Args:
        tensors: of the checkpoint.
        expected: names that the model reads.
        prefix: of the family's base model, such as "bert."; "" changes nothing.

    Raises:
        ValueError: two tensors that get one name.
    """
    expected = set(expected)
    has = any(name.startswith(prefix) for name in tensors)
    expects = any(name.startswith(prefix) for name in expected)
    if expects and not has:
        renamed = {
            name: prefix + name if prefix + name in expected or name not in expected else name
            for name in tensors
        }
    elif has and not expects:
        renamed = {name: name.removeprefix(prefix) for name in tensors}
    else:
        renamed = {name: name for name in tensors}
    return _renamed(tensors, renamed)


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    clashes: list[str] = []
    for old, tensor in tensors.items():
        new = names[old]
        if new in result:
            clashes.append(f"{origin[new]!r} and {old!r} both become {new!r}")
        result[new], origin[new] = replace(tensor, name=new), old
    if clashes:
        raise ValueError("the checkpoint has tensors twice, under two names: " + "; ".join(clashes))
    return result
