"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu et al. 2021,
arXiv:2110.07602): trained keys and values that every query of a frozen model sees in each layer.

A layer's are ``adapters/.../attn/prefix_key`` and ``prefix_value`` [P, G * K] (stacked layers:
[L, P, G * K]). They stand before the tokens, always visible (also where a window slides), as they
are: not normed, not rotated, without linear or relative biases. In decoders and encoders the
tokens' positions begin at P, as in PEFT for GPT-2 and Llama; in encoder-decoders they do not move.
Cross-attention has none.

    variables = create(model, variables, rng, length=20)
    state = init_state(variables, tx, rng, lambda path: path.startswith("adapters/"))

Losses, predictions and `fmjax.generate` take such variables as they are. With `create_network` the
prefix is made by a network (section 4.3), which `through_network` puts before a loss and `fold`
replaces by its result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.hub import abstract_variables
from fmjax.methods.peft_files import (
    BASE,
    check_config,
    read_adapter,
    refuse,
    write_adapter,
    write_modules,
)
from fmjax.methods.prompt_tuning import Result, with_modules
from fmjax.models import family_for
from fmjax.tree import flatten, merge, stack_layers, stacked_place, unflatten, unstack_layers
from fmjax.types import Variables

ATTACHES = ("variables", "loss")

_PARTS = ("prefix_key", "prefix_value")
_NETWORK = "prefix_network"


def create(
    model: Any,
    variables: Variables,
    rng: Array,
    *,
    length: int,
    stddev: float = 0.02,
    where: Callable[[str], bool] = lambda place: True,
) -> Variables:
    """The model's variables with a normal random prefix in each self-attention.

    Args:
        model: what the prefix is for.
        variables: its variables.
        rng: a typed key.
        length: P.
        stddev: of keys and values; PEFT and P-tuning v2 take 1.
        where: by the path of an attention layer, "encoder/layers_0/attn" (of stacked layers
            "encoder/layers/attn"), whether it has a prefix.

    Returns:
        Variables with "adapters/<path>/prefix_key" and "prefix_value".

    Raises:
        ValueError: no such layer, layers that would not read it (they have an attention of their
            own), a prefix that is there already, or arguments out of range.
    """
    if stddev < 0:
        raise ValueError(f"stddev is {stddev}; it must not be negative")
    shapes = _shapes(model, variables, length, where)
    keys = jax.random.split(rng, len(shapes))
    made = {
        path: stddev * jax.random.normal(key, shape)
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }
    return merge(variables, unflatten(made))


def from_tokens(model: Any, variables: Variables, tokens: Array | np.ndarray) -> Variables:
    """The model's variables with the prefix that a text makes: the keys and values of its tokens.

    Exactly what the model computes for a text behind these tokens (until a window that slides would
    leave them behind); as an initialization "real words" (Li & Liang 2021, section 7.4). Tokens may
    be a prompt's virtual ones.

    Args:
        model: causal, with a cache.
        variables: its variables.
        tokens: int [P].

    Raises:
        ValueError: no cache, or a family whose biases or windows make it another function.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}; it must be [P], P at least 1")
    shapes = _shapes(model, variables, len(tokens), lambda place: True)
    if _is_encoder_decoder(model) or not _is_causal(model):
        raise ValueError(
            f"{family_for(model).MODEL_TYPE} with the head {model.head!r} is no decoder: states of "
            "a text's first tokens depend on what follows; use create"
        )
    # The blocks alone: a classifier does not decode.
    bare = model.clone(head="model")
    cache = bare.init_cache(1, len(tokens))
    made = bare.apply(variables, input_ids=tokens[None], cache=cache).cache
    found = {}
    for path in shapes:
        _, layer, *_, name = path.split("/")
        kept = made[layer]["self"] if isinstance(made[layer], dict) else made[layer]
        heads = kept.key if name == "prefix_key" else kept.value  # [1, G, P, K], or [L, 1, ...]
        rows = jnp.swapaxes(jnp.squeeze(heads, -4), -3, -2)  # [P, G, K]
        found[path] = rows.reshape(*rows.shape[:-2], -1)
    result = merge(variables, unflatten(found))
    # Weights of attention, as biases may hardly show in what a model makes of them.
    both = jnp.concatenate([tokens, tokens[:1]])[None]
    behind = bare.apply(variables, input_ids=both, output_attentions=True).attentions
    alone = bare.apply(result, input_ids=tokens[None, :1], output_attentions=True).attentions
    if not all(
        jnp.allclose(one[:, :, -1], other[:, :, -1], atol=1e-2)
        for one, other in zip(behind, alone, strict=True)
    ):
        raise ValueError(
            f"{family_for(model).MODEL_TYPE} sees a text before others by biases or windows, which "
            "a prefix does not have: this prefix would be another function; use create"
        )
    return result


def create_network(
    model: Any,
    variables: Variables,
    rng: Array,
    *,
    length: int,
    hidden: int = 512,
    width: int | None = None,
    where: Callable[[str], bool] = lambda place: True,
) -> Variables:
    """The model's variables with a network that makes the prefix (Li & Liang 2021, section 4.3).

    ``dense(tanh(dense(embedding)))`` of P trained vectors, one last layer for each layer's keys and
    values. Its weights begin as PyTorch's do: vectors from N(0, 1), layers uniform within
    1 / sqrt(inputs).

    Args:
        model, variables, rng, length, where: see `create`.
        hidden: width between the two layers; the paper takes 512 and 800.
        width: of the vectors; None is the model's.

    Returns:
        Variables with the collection "prefix_network", which trains in place of "adapters".

    Raises:
        ValueError: as `create`.
    """
    shapes = _shapes(model, variables, length, where)
    if hidden < 1 or (width is not None and width < 1):
        raise ValueError(f"hidden={hidden} and width={width} must be at least 1")
    first = next(iter(shapes)).replace("adapters/", "params/", 1)
    kernel = flatten(variables)[first.replace("prefix_key", "key/kernel")]  # [..., D, G * K]
    inputs: int = kernel.shape[-2] if width is None else width
    keys = iter(jax.random.split(rng, 3 + 2 * len(shapes)))

    def uniform(shape: tuple[int, ...], fan_in: int) -> Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)

    made = {
        "embedding": jax.random.normal(next(keys), (length, inputs)),
        "hidden/kernel": uniform((inputs, hidden), inputs),
        "hidden/bias": uniform((hidden,), inputs),
    }
    for path, (*lead, _, features) in shapes.items():
        place = path.removeprefix("adapters/")
        made[f"out/{place}/kernel"] = uniform((*lead, hidden, features), hidden)
        made[f"out/{place}/bias"] = uniform((*lead, features), hidden)
    return merge(variables, {_NETWORK: unflatten(made)})


def fold(variables: Variables) -> Variables:
    """Variables with the prefix that their network makes, in its place.

    Raises:
        ValueError: there is no network.
    """
    if _NETWORK not in variables:
        raise ValueError(f"the variables have no {_NETWORK}; make one with create_network")
    network = flatten(variables[_NETWORK])
    hidden = jnp.tanh(
        network["embedding"] @ network["hidden/kernel"] + network["hidden/bias"]
    )  # [P, M]
    made = {}
    for path, bias in network.items():
        if path.startswith("out/") and path.endswith("/bias"):
            place = path.removeprefix("out/").removesuffix("/bias")
            rows = hidden @ network[f"out/{place}/kernel"] + bias[..., None, :]
            made[f"adapters/{place}"] = rows  # [P, G * K], or [L, P, G * K]
    rest = {name: tree for name, tree in variables.items() if name != _NETWORK}
    return merge(rest, unflatten(made))


def through_network(fn: Callable[..., Result]) -> Callable[..., Result]:
    """A LossFn or predictions, ``fn(variables, ...)``, where a network makes the prefix."""

    def folded(variables: Variables, *rest: Any, **options: Any) -> Result:
        return fn(fold(variables), *rest, **options)

    return folded


def _shapes(
    model: Any, variables: Variables, length: int, where: Callable[[str], bool]
) -> dict[str, tuple[int, ...]]:
    """Every new leaf's shape; everything is checked."""
    if length < 0:
        raise ValueError(f"length is {length}; it must not be negative")
    flat = flatten(variables)
    places, shapes = [], {}
    for path in flat:
        if path.startswith("params/") and path.endswith("/attn/key/kernel"):
            place = path.removeprefix("params/").removesuffix("/key/kernel")
            if not where(place):
                continue
            places.append(place)
            for part, name in zip(_PARTS, ("key", "value"), strict=True):
                *lead, _, features = flat[f"params/{place}/{name}/kernel"].shape
                shapes[f"adapters/{place}/{part}"] = (*lead, length, features)
    problems = []
    if not shapes:
        problems.append("no self-attention (.../attn/key/kernel) to be given a prefix")
    if there := [path for path in shapes if path in flat]:
        problems.append(f"the variables have {there[:3]} already")
    if unread := _unread(model, shapes):
        problems.append(
            f"{unread[:3]} ({len(unread)} in all) would not be read: there "
            f"{family_for(model).MODEL_TYPE} has an attention of its own; choose others by `where`"
        )
    refuse(problems, "prefixes")
    return shapes


def _unread(model: Any, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The leaves that no operation of the model takes."""
    # As a loop: a scan takes its layers' leaves whether they are read or not.
    names = {field.name for field in dataclasses.fields(model)}
    plain = {"scan": False, "remat": "none"}
    loop = model.clone(**{name: value for name, value in plain.items() if name in names})
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    if "scan" in names and model.scan:
        leaves = flatten(unstack_layers(unflatten(leaves)))
    inputs = family_for(model).inputs(model.config, model.head)

    def run(leaves: dict[str, Any], variables: Variables) -> Any:
        return loop.apply(merge(variables, unflatten(leaves)), **inputs)

    traced = jax.make_jaxpr(run)(leaves, abstract_variables(loop)).jaxpr
    taken = {id(var) for equation in traced.eqns for var in equation.invars}
    read = [id(var) in taken for var in traced.invars[: len(leaves)]]
    return [path for path, seen in zip(sorted(leaves), read, strict=True) if not seen]


def _is_encoder_decoder(model: Any) -> bool:
    from fmjax.nn.seq2seq import EncoderDecoder

    return isinstance(model, EncoderDecoder)


def _is_causal(model: Any) -> bool:
    from fmjax.nn.decoder import Decoder
    from fmjax.nn.encoder import Encoder

    return isinstance(model, Decoder) or (isinstance(model, Encoder) and model.config.is_decoder)


_READ = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
# The network is folded in files, whatever it was.
_OTHER = ("encoder_hidden_size", "prefix_projection", "init_weights", "modules_to_save")


def load(model: Any, variables: Variables, path_or_id: str | Path) -> Variables:
    """The model's variables with the prefix of a PEFT folder, and the parameters it has whole.

    Args:
        model: the base; no encoder-decoder, of which PEFT 0.21 gives only the decoder a prefix and
            several layers the same one.
        variables: its variables.
        path_or_id: of `save`, or of PEFT's ``PrefixTuningConfig``.

    Raises:
        OSError: no such folder.
        ValueError: another method, options that are not supported, or another model's prefix.
    """
    config, tensors = read_adapter(path_or_id)
    fixed = {"num_transformer_submodules": (None, 1)}
    problems = check_config(config, "PREFIX_TUNING", {*_READ, *_OTHER}, fixed)
    refuse(problems, f"prefixes of {path_or_id}")
    length = config.get("num_virtual_tokens") or 0
    paths = _in_order(model, _shapes(model, variables, length, lambda place: True))
    rows = tensors.pop("prompt_embeddings", np.zeros((0, 0)))
    expected = (length, sum(shape[-1] for shape in paths.values()))
    if rows.shape != expected:
        raise ValueError(
            f"prompt_embeddings has shape {rows.shape}; the config's num_virtual_tokens={length} "
            f"and the model's layers make it {expected}"
        )
    ends = np.cumsum([shape[-1] for shape in paths.values()])
    pieces = np.split(rows, ends[:-1], axis=1)
    found = {
        path: jnp.asarray(piece, jnp.float32) for path, piece in zip(paths, pieces, strict=True)
    }
    tree = unflatten(found)
    variables = with_modules(model, variables, tensors)
    return merge(variables, stack_layers(tree) if model.scan else tree)


def save(
    path: str | Path, model: Any, variables: Variables, *, modules: Collection[str] = ()
) -> Path:
    """Writes the prefix as a folder that PEFT loads onto the same base model.

    Args:
        path: the folder, made if missing.
        model: the base; no encoder-decoder.
        variables: with a prefix in every layer, its network folded.
        modules: globs of module paths that are saved whole, ``("head*",)`` where it was trained.

    Raises:
        OSError: the folder cannot be written.
        ValueError: layers without a prefix, or of several widths, which the file cannot say.
    """
    flat = flatten(variables)
    own = {name: leaf for name, leaf in flat.items() if name.rsplit("/", 1)[-1] in _PARTS}
    own = {name: leaf for name, leaf in own.items() if name.startswith("adapters/")}
    if model.scan:
        own = flatten(unstack_layers(unflatten(own)))
    rest = {name: leaf for name, leaf in flat.items() if name.startswith("params/")}
    wanted = _in_order(model, _shapes(model, unflatten(rest), 0, lambda place: True))
    problems = []
    if missing := [name for name in wanted if name not in own]:
        problems.append(
            f"there is no {missing[:3]} ({len(missing)} in all); PEFT has every layer's"
        )
    if _NETWORK in variables:
        problems.append("the prefix is made by a network; fold the variables first")
    widths = {shape[-1] for shape in wanted.values()}
    if len(widths) > 1:
        problems.append(f"layers have the widths {sorted(widths)}; PEFT's have one")
    refuse(problems, "prefixes")
    rows = np.concatenate([np.asarray(own[name]) for name in wanted], axis=1)
    tensors = {"prompt_embeddings": rows}
    whole, names = write_modules(model, variables, modules)
    tensors |= {BASE + name: array for name, array in whole.items()}
    groups = model.cache_shape[0]
    config = {
        "num_virtual_tokens": rows.shape[0],
        "token_dim": widths.pop(),
        "num_layers": len(wanted) // 2,
        "num_attention_heads": groups,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "modules_to_save": names or None,
    }
    return write_adapter(path, model, "PREFIX_TUNING", config, tensors)


def _in_order(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """PEFT's order: layer by layer its key, then its value; each layer's own path."""
    if _is_encoder_decoder(model):
        raise ValueError(
            "PEFT's prefixes of encoder-decoders are of the decoder alone and shared by layers; "
            "they cannot be exchanged"
        )
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    tree = unstack_layers(unflatten(leaves)) if model.scan else unflatten(leaves)
    single = {path: leaf.shape for path, leaf in flatten(tree).items()}

    def order(path: str) -> tuple[int, int]:
        place = stacked_place(path)
        assert place is not None  # attention layers are in layers_{i}
        return place[1], _PARTS.index(path.rsplit("/", 1)[-1])

    return {path: single[path] for path in sorted(single, key=order)}
