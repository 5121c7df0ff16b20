"""A shallower model made of some layers of a trained one: how DistilBERT's student begins (Sanh et
al. 2019, arXiv:1910.01108, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import fmjax.hub as hub
from fmjax.tree import flatten, stack_layers, unflatten, unstack_layers
from fmjax.types import Variables

ATTACHES = ("variables",)

COUNTS = {
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "encoder/": ("encoder_layers", "num_layers"),
    "decoder/": ("decoder_layers", "num_decoder_layers"),
}
"""Under which names configs say how many layers a stack has."""


def student_of(
    model: Any, variables: Variables, layers: Sequence[int], *, stack: str = ""
) -> tuple[Any, Variables]:
    """A shallower model made of some of a trained one's layers (Sanh et al. 2019, section 3, who
    take every second).

    Args:
        model: the teacher; scanned or not, as its student then is.
        variables: its variables; the student's are the same arrays.
        layers: which of its layers, from 0 on, increasing.
        stack: which stack of an encoder-decoder: "encoder/" or "decoder/".

    Raises:
        ValueError: layers that are not there, or a family whose layers are no such stack.
    """
    if stack not in COUNTS:
        raise ValueError(f"stack is {stack!r}; it must be one of {list(COUNTS)}")
    flat = flatten(unstack_layers(variables) if model.scan else variables)
    begins = f"params/{stack}layers_"
    found = sorted(
        {int(p.removeprefix(begins).split("/")[0]) for p in flat if p.startswith(begins)}
    )
    config, fields = model.config, vars(model.config)
    count = [name for name in COUNTS[stack] if fields.get(name) == len(found)]
    problems = []
    if not found or not count:
        problems.append(
            f"{hub.family_for(model).MODEL_TYPE} has no layers {begins}0, ... to choose"
        )
    elif not layers or list(layers) != sorted({*layers}) or not {*layers} <= {*found}:
        problems.append(f"layers={tuple(layers)} must be increasing numbers of 0..{found[-1]}")
    kinds = fields.get("layer_types", ())
    if kinds is None:
        problems.append("config.layer_types is None: name each layer's kind there, which it keeps")
    if problems:
        raise ValueError("; ".join(problems))
    changed: dict[str, Any] = {count[0]: len(layers)}
    if kinds:
        changed["layer_types"] = tuple(kinds[layer] for layer in layers)
    small = model.clone(config=dataclasses.replace(config, **changed))
    places = {layer: place for place, layer in enumerate(layers)}
    chosen = {}
    for path, leaf in flat.items():
        collection, _, rest = path.partition("/")
        if rest.startswith(f"{stack}layers_"):
            number, _, inner = rest.removeprefix(f"{stack}layers_").partition("/")
            if int(number) not in places:
                continue
            path = f"{collection}/{stack}layers_{places[int(number)]}/{inner}"
        chosen[path] = leaf
    wanted = flatten(hub.abstract_variables(small.clone(scan=False)))
    if chosen.keys() != wanted.keys():
        raise ValueError(
            f"without its other layers the model would lack {sorted(wanted.keys() - chosen.keys())}"
            f" and not read {sorted(chosen.keys() - wanted.keys())}; choose other layers"
        )
    made = unflatten({path: chosen[path] for path in wanted})
    return small, stack_layers(made) if small.scan else made
