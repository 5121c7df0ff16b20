"""Another language for a speech recogniser of many: MMS' files of adapters (Pratap et al. 2023,
arXiv:2305.13516, section 4.1).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fmjax import hub
from fmjax.tree import flatten, override, stack_layers, unflatten
from fmjax.types import Variables
from fmjax.weights import Rule, import_params, modern_names, open_checkpoint

# What a language has of its own: adapters in the blocks, and the head onto its characters.
OWN = re.compile(r"^params/(layers_\d+/adapter(_norm)?/|head/)")


def load_language(
    folder: str | Path, language: str, model: Any, variables: Variables
) -> tuple[Any, Variables]:
    """The model with a language's adapters and characters in the place of its own.

    Args:
        folder: of the checkpoint, with the files adapter.LANGUAGE.safetensors (or .bin), or a hub
            id. Its characters are `fmjax.data.characters.load_characters(folder, language=...)`.
        language: as in the file's name, "eng".
        model: with the head ``ctc`` and adapters (``adapter_attn_dim``).
        variables: its variables.

    Returns:
        (model, variables): the model's ``vocab_size`` is the language's.

    Raises:
        OSError: there is no such file; those that are there are named.
        ValueError: a model without adapters, or tensors that do not fit; all are listed.
    """
    if model.head != "ctc" or model.config.adapter_attn_dim is None:
        raise ValueError(
            f"languages are of models with the head 'ctc' and adapter_attn_dim; this one has "
            f"{model.head!r} and adapter_attn_dim={model.config.adapter_attn_dim}"
        )
    names = [f"adapter.{language}{ending}" for ending in (".safetensors", ".bin")]
    place = hub.find_folder(folder, tuple((name,) for name in names))
    files = [place / name for name in names if (place / name).is_file()]
    if not files:
        there = sorted(path.name.split(".")[1] for path in place.glob("adapter.*.*"))
        raise FileNotFoundError(f"{place} has no {names[0]}; it has the languages {there}")
    with open_checkpoint(files[0]) as checkpoint:
        tensors = modern_names(checkpoint.tensors)
        if "lm_head.bias" not in tensors:
            raise ValueError(f"{files[0]} has no lm_head.bias: it is no file of a language")
        (size,) = tensors["lm_head.bias"].shape
        model = model.clone(config=dataclasses.replace(model.config, vocab_size=size))
        abstract = flatten(hub.abstract_variables(model.clone(scan=False)))
        read = import_params(
            _own_rules(hub.family_for(model).rules(model.config, model.head)),
            tensors,
            {path: leaf for path, leaf in abstract.items() if OWN.match(path)},
            place=lambda path, array: jnp.asarray(array),
        )
    own = unflatten(read)
    dtypes = {path: leaf.dtype for path, leaf in flatten(variables).items()}
    flat = flatten(stack_layers(own) if model.scan else own)
    cast = {path: leaf.astype(dtypes[path]) for path, leaf in flat.items()}
    return model, override(variables, unflatten(cast))


def _own_rules(table: list[Rule]) -> list[Rule]:
    return [
        rule for rule in table if all(OWN.match(path.replace("{i}", "0")) for path in rule.params)
    ]
