"""load / save / create: checkpoints of any Hugging Face format in, Hugging Face folders out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from fmjax.config import config_to_json, default_labels, json_text, parse_config, read_config
from fmjax.generation_config import GenerationConfig
from fmjax.models import families, family_for, family_of
from fmjax.nn.compact import Compact
from fmjax.placing import Placer, dtype_for
from fmjax.tree import flatten, layer_paths, unflatten, unstack_layers
from fmjax.types import PyTree, Remat, Variables
from fmjax.weights import (
    Rule,
    export_params,
    fit_prefix,
    import_params,
    modern_names,
    open_checkpoint,
    rule_tensor_names,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("flax_model.msgpack", "flax_model.msgpack.index.json", "flax_model-*.msgpack"),
)
_MOST_THREADS = 4
"""That read one checkpoint: memory has no more to give, and each holds a tensor."""
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja")
TOKENIZER_FILES = (
    "tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json",
)  # fmt: skip
NO_WEIGHTS = ((),)
"""For `find_folder`, where config and tokenizer are all that is wanted."""


@runtime_checkable
class KerasFamily(Protocol):
    """A family that is in keras.applications too."""

    def keras_config(self, config: Any) -> Any:
        """The config with what is otherwise in Keras' model of these sizes.

        Raises:
            ValueError: Keras has no such model.
        """

    def keras_rules(self, config: Any, head: str) -> list[Rule]:
        """Parameters and the tensors of `fmjax.weights.keras_file` that they are."""
        ...


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer or processor of `transformers`."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any: ...


def create(
    model_type: str,
    variant_or_config: Any,
    *,
    head: str = "model",
    rng: Array,
    num_labels: int | Sequence[str] | None = None,
    dtype: Any = None,
    scan: bool = False,
    remat: Remat = "none",
) -> tuple[Any, Variables]:
    """A model with random weights.

    Args:
        model_type: a family, e.g. "bert".
        variant_or_config: a key of the family's VARIANTS, or its Config.
        head: Hugging Face's class suffix in snake case; "model" is the bare model.
        rng: a typed key; the same one gives the same weights, scanned or not.
        num_labels: how many labels, or their names.
        dtype: of the floating-point weights; None is float32.
        scan: layers stacked and scanned: compiles in time independent of depth.
        remat: what of blocks the backward pass recomputes, see `fmjax.types.Remat`: less memory,
            more compute.

    Returns:
        (model, variables): ``model.apply(variables, input_ids=...)``.

    Raises:
        ValueError: an unknown family, variant or head, or an argument that is none.
    """
    family = family_of(model_type)
    config = config_of(family, variant_or_config)
    config = _with_labels(config, num_labels)
    _check_head(model_type, family, head)
    _check_arguments(rng, dtype)
    model = family.Model(config, head=head, scan=scan, remat=remat)
    draw = _drawing(model.clone(scan=False), rng)

    def draw_as(path: str) -> Array:
        leaf = draw(path)
        return leaf.astype(dtype_for(leaf.dtype, dtype))

    flat = {}
    for path, leaf in flatten(abstract_variables(model)).items():
        layers = layer_paths(path, leaf.shape)
        flat[path] = draw_as(path) if layers is None else jnp.stack([*map(draw_as, layers)])
    return model, unflatten(flat)


def config_of(family: ModuleType, variant_or_config: Any) -> Any:
    """The Config, or that of a variant's name."""
    model_type = family.MODEL_TYPE
    if isinstance(variant_or_config, family.Config):
        return variant_or_config
    if not isinstance(variant_or_config, str):
        raise ValueError(
            f"{variant_or_config!r} is neither a variant's name nor a {model_type} Config"
        )
    if variant_or_config not in family.VARIANTS:
        raise ValueError(
            f"{model_type} has no variant {variant_or_config!r}; it has {list(family.VARIANTS)}, "
            f"or pass a fmjax.models.{family.__name__.rsplit('.', 1)[-1]}.Config"
        )
    return family.VARIANTS[variant_or_config]


def abstract_variables(model: Any) -> Variables:
    """The shapes and dtypes of a model's variables, without computing them.

    Only the scanned form is traced, which takes the time of one layer whatever the depth.
    """
    flat = dict(_abstract_scanned(model.clone(scan=True)))
    return unflatten(flat) if model.scan else unstack_layers(unflatten(flat))


@functools.lru_cache(maxsize=64)
def _abstract_scanned(model: Any) -> tuple[tuple[str, jax.ShapeDtypeStruct], ...]:
    """Paths and leaves; loading, saving and planning a model all ask for them."""
    return tuple(jax.eval_shape(lambda: _initial(model, jax.random.key(0))).items())


def _initial(model: Any, rng: Array) -> dict[str, Array]:
    """What a model's ``init`` gives, by path."""
    return flatten(model.init(rng, **family_for(model).inputs(model.config, model.head)))


def load(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    num_labels: int | Sequence[str] | None = None,
    new: Sequence[str] = (),
    dtype: Any = None,
    scan: bool = False,
    remat: Remat = "none",
    shardings: PyTree | Callable[[Variables], PyTree] = None,
    rng: Array | None = None,
) -> tuple[Any, Variables]:
    """A model and its weights from a checkpoint folder or a hub id; no torch is needed.

    Reads safetensors, PyTorch .bin and Flax msgpack, whole or sharded, leaf by leaf.

    Args:
        path_or_id: a folder with config.json and weights, or a hub id such as
            "google-bert/bert-base-uncased" (through huggingface_hub, its cache and HF_HUB_OFFLINE).
        head: which head the model gets; None reads it from config.json's ``architectures``.
        num_labels: how many labels, or their names; None is what config.json says.
        new: patterns of parameters to initialise afresh instead of reading, matched at the start
            of their path inside the collection: ``("head/",)``. Nothing else is ever initialised.
        dtype: floating-point weights are cast to it; None keeps the file's.
        scan: layers stacked and scanned.
        remat: what of blocks the backward pass recomputes, see `fmjax.types.Remat`.
        shardings: where each leaf goes: a tree like the variables, a function from their abstract
            tree to such a tree (``partial(fmjax.train.layout, mesh=mesh)``), or None for the
            default device. Of files that layouts let be sliced, each process then reads no more
            than its devices hold.
        rng: typed key for what `new` names; None is ``jax.random.key(0)``.

    Returns:
        (model, variables).

    Raises:
        OSError: no such folder, or the hub cannot be reached.
        ValueError: a config key, tensor or shape that does not fit; everything wrong is listed.
    """
    folder = find_folder(path_or_id)
    data = read_config(folder)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"{folder / 'config.json'} has model_type={model_type!r}; it must name one of the "
            f"families {families()}"
        )
    family = family_of(model_type)
    config = _with_labels(parse_config(family.Config, data, family.FIXED), num_labels)
    if head is None:
        head = _head_of(data, family, folder)
    return _read(folder, family, config, head, new, dtype, scan, remat, shardings, rng)


def load_weights(
    file: str | Path,
    model_type: str,
    variant_or_config: Any,
    *,
    head: str = "model",
    num_labels: int | Sequence[str] | None = None,
    new: Sequence[str] = (),
    dtype: Any = None,
    scan: bool = False,
    remat: Remat = "none",
    shardings: PyTree | Callable[[Variables], PyTree] = None,
    rng: Array | None = None,
) -> tuple[Any, Variables]:
    """A model and its weights from a file that stands alone, such as torchvision's state dicts.

    Files of keras.applications are read for the families that are there. The model then takes
    pixels as Keras' does: see each one's ``preprocess_input`` there.

    Args:
        file: .safetensors, .pth, .pt, .bin, .msgpack, .h5 or .keras; no code in it is run.
        model_type, variant_or_config, head, num_labels: of the model, as in `create`.
        new, dtype, scan, remat, shardings, rng: as in `load`.

    Returns:
        (model, variables).

    Raises:
        OSError: there is no such file.
        ValueError: an unknown model, or a tensor or shape that does not fit; everything wrong is
            listed.
    """
    family = family_of(model_type)
    config = _with_labels(config_of(family, variant_or_config), num_labels)
    place = Path(file).expanduser()
    return _read(place, family, config, head, new, dtype, scan, remat, shardings, rng)


def _read(
    place: Path,
    family: ModuleType,
    config: Any,
    head: str,
    new: Sequence[str],
    dtype: Any,
    scan: bool,
    remat: Remat,
    shardings: PyTree | Callable[[Variables], PyTree],
    rng: Array | None,
) -> tuple[Any, Variables]:
    """The model of a config and its weights in a folder or file."""
    _check_head(family.MODEL_TYPE, family, head)
    rng = jax.random.key(0) if rng is None else rng
    _check_arguments(rng, dtype, new)
    with open_checkpoint(place) as checkpoint:
        tensors, rules = checkpoint.tensors, family.rules
        if checkpoint.format == "keras":
            layout = _keras_layout(family)
            config, rules = layout.keras_config(config), layout.keras_rules
        else:
            tensors = modern_names(tensors)
            config = family.from_tensors(config, head, tensors)
        model = family.Model(config, head=head, scan=scan, remat=remat)
        loop = model.clone(scan=False)
        abstract = flatten(abstract_variables(loop))
        table = rules(config, head)
        if checkpoint.format != "keras":
            tensors = fit_prefix(tensors, rule_tensor_names(table, abstract), family.PREFIX)
        if callable(shardings):
            shardings = shardings(abstract_variables(model))
        placer = Placer(abstract, dtype, shardings, scan)
        read = import_params(
            table,
            tensors,
            abstract,
            place=placer.place,
            new=new,
            ignored=family.IGNORED,
            known=_known_names(family, rules, config, head, tensors),
            views=True,
            threads=min(_MOST_THREADS, os.cpu_count() or 1),
        )
    fresh = [path for path in abstract if path not in read]
    if fresh:
        logger.info("initialised %d new leaves: %s", len(fresh), ", ".join(fresh))
        draw = _drawing(loop, rng)
        for path in fresh:
            placer.place(path, np.asarray(draw(path)))
    return model, unflatten({path: placer.placed[path] for path in placer.order})


def _keras_layout(family: Any) -> KerasFamily:
    if not isinstance(family, KerasFamily):
        raise ValueError(f"{family.MODEL_TYPE} is not read from Keras' files")
    return family


def _drawing(model: Any, rng: Array) -> Callable[[str], Array]:
    """A function that computes one leaf, by path, of what a model's ``init`` gives.

    Compiled as a whole, hundreds of draws take XLA longer than any step of the model does: ``init``
    is traced, and what a leaf needs of it is run operation by operation, so that leaves of one
    shape share a compilation.
    """
    closed, shapes = jax.make_jaxpr(lambda rng: _initial(model, rng), return_shape=True)(rng)
    jaxpr = closed.jaxpr
    results = dict(zip(shapes, jaxpr.outvars, strict=True))
    makers = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}

    def draw(path: str) -> Array:
        needed, pending = set(), [results[path]]
        while pending:
            number = None if isinstance(var := pending.pop(), Literal) else makers.get(var)
            if number is not None and number not in needed:
                needed.add(number)
                pending += jaxpr.eqns[number].invars
        eqns = [jaxpr.eqns[number] for number in sorted(needed)]
        (leaf,) = jaxpr_as_fun(
            ClosedJaxpr(jaxpr.replace(eqns=eqns, outvars=[results[path]]), closed.consts)
        )(rng)
        return leaf if eqns else jnp.array(leaf)  # a constant of the trace: nobody's own until then

    return draw


def _known_names(
    family: ModuleType,
    rules: Callable[[Any, str], list[Rule]],
    config: Any,
    head: str,
    names: Iterable[str],
) -> set[str]:
    """Of a checkpoint's names, those that only other heads of the family read, prefix or not.

    Inside layers these are tensors of a kind that this head has none of, such as the decoder's for
    an encoder alone; a layer too many of its own kind is not among them.
    """

    def kind(name: str) -> str:  # "model.decoder.layers.7.fc1.bias" -> "decoder.layers.#.fc1.bias"
        return re.sub(r"(?<=\.)(\d+|\{\w+\})(?=\.)", "#", name.removeprefix(family.PREFIX))

    def read_by(head: str) -> set[str]:
        return {name for rule in rules(config, head) for name in rule.tensor_names()}

    own = read_by(head)
    foreign = set().union(*(read_by(other) for other in family.HEADS)) - own
    kinds = set(map(kind, foreign)) - set(map(kind, own))
    exact = {name.removeprefix(family.PREFIX) for name in foreign}
    exact -= {name.removeprefix(family.PREFIX) for name in own}
    return {
        name for name in names if kind(name) in kinds or name.removeprefix(family.PREFIX) in exact
    }


def _with_labels(config: Any, num_labels: Any) -> Any:
    if num_labels is None:
        return config
    if "id2label" not in {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"num_labels={num_labels!r} with a family whose heads have no labels")
    if isinstance(num_labels, int | np.integer) and not isinstance(num_labels, bool):
        names = default_labels(int(num_labels))
    elif isinstance(num_labels, Sequence | np.ndarray) and not isinstance(num_labels, str | bytes):
        names = tuple(num_labels)
    else:
        names = ()
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"num_labels={num_labels!r} must be a positive int, or distinct names in the order of "
            "the labels' numbers, as ['negative', 'positive']"
        )
    return dataclasses.replace(config, id2label=tuple(map(str, names)))


def _check_arguments(rng: Any, dtype: Any, new: Any = ()) -> None:
    """Raises a ValueError that lists which of these are none."""
    problems = []
    if not isinstance(rng, Array):
        problems.append(f"rng={rng!r} must be a key: jax.random.key(seed)")
    try:
        floats = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        problems.append(f"dtype={dtype!r} must be of floats, as 'bfloat16' or jnp.float16")
    if isinstance(new, str):
        problems.append(f"new={new!r} is one string and must be several: new=({new!r},)")
    if problems:
        raise ValueError("; ".join(problems))


def _check_head(model_type: str, family: ModuleType, head: str) -> None:
    if head not in family.HEADS:
        raise ValueError(f"{model_type} has no head {head!r}; it has {list(family.HEADS)}")


def _head_of(data: Mapping[str, Any], family: ModuleType, folder: Path) -> str:
    """The head that config.json's ``architectures`` names; the bare model where it names none."""
    names = data.get("architectures") or [family.HEADS["model"]]
    by_class = {name: head for head, name in family.HEADS.items()}
    known = [by_class[plain] for name in names if (plain := name.removeprefix("Flax")) in by_class]
    if not known:
        raise ValueError(
            f"{folder / 'config.json'} has architectures={names}, none of {list(by_class)}; "
            f"say which head to load: head= one of {list(family.HEADS)}"
        )
    return known[0]


def find_folder(path_or_id: str | Path, weights: Sequence[Sequence[str]] = WEIGHT_FILES) -> Path:
    """A local folder as it is, or the snapshot of a hub id in huggingface_hub's cache.

    Args:
        path_or_id: a folder or a hub id.
        weights: names of files of weights, of which the first that a repository has are fetched.

    Raises:
        OSError: no such folder or repository, or the hub cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; give the folder with its config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_id)):
        raise FileNotFoundError(f"there is no folder {path}, and it is not a hub id either")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = None
    try:
        for patterns in weights:
            folder = Path(
                huggingface_hub.snapshot_download(
                    str(path_or_id), allow_patterns=[*OTHER_FILES, *patterns]
                )
            )
            if any(file for pattern in patterns for file in folder.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no folder {str(path_or_id)!r}, and as a hub id it could not be fetched: "
            f"{error}"
        ) from error
    assert folder is not None
    return folder


def save(
    path: str | Path,
    model: Any,
    variables: Variables,
    tokenizer: Any = None,
    *,
    generation_config: GenerationConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a Hugging Face folder that PyTorch's ``from_pretrained`` loads.

    Args:
        path: the folder, made if missing.
        model: from `load` or `create`.
        variables: its variables; scanned layers are unstacked.
        tokenizer: anything with ``save_pretrained``; written alongside.
        generation_config: of a model that generates: with which tokens texts begin and end, and
            what else ``generate`` is to do, such as `load_generation_config` says of the folder
            that the model is from. It is no part of the model: without it, what reads the folder
            goes by the defaults of its class.
        max_shard_size: bytes, or "5GB", "200MB"; above it the weights are sharded.

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be written.
        ValueError: variables that are not this model's; or adapters, or parameters in another
            form than arrays, among them; or a tokenizer that is none.
    """
    folder = Path(path).expanduser()
    if not isinstance(tokenizer, SavesItself | None):
        raise ValueError(
            f"tokenizer={tokenizer!r} has no save_pretrained; give what fmjax.load_tokenizer gives"
        )
    if "adapters" in variables:
        raise ValueError(
            "the variables have adapters, for which a model's files have no place: merge them into "
            "the kernels first, or save them as adapters"
        )
    if compact := [path for path, leaf in flatten(variables).items() if isinstance(leaf, Compact)]:
        raise ValueError(
            f"{len(compact)} parameters ({compact[0]}, ...) are quantised or in factors, for which "
            "a model's files have no place: save fmjax.nn.compact.whole_arrays(variables), or "
            "write them as they are"
        )
    family = family_for(model)
    leaves = flatten(unstack_layers(variables) if model.scan else variables)
    expected = flatten(abstract_variables(model.clone(scan=False)))
    wrong = [
        f"{name} has shape {tuple(leaf.shape)}, the model's is {expected[name].shape}"
        for name, leaf in leaves.items()
        if name in expected and tuple(leaf.shape) != expected[name].shape
    ]
    wrong += [f"{name} is missing" for name in expected if name not in leaves]
    wrong += [f"{name} is not in the model" for name in leaves if name not in expected]
    if wrong:
        raise ValueError("the variables are not this model's:\n  " + "\n  ".join(wrong))
    tensors = export_params(family.rules(model.config, model.head), leaves)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {
        str(leaf.dtype) for leaf in leaves.values() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    extra: dict[str, Any] = {
        "model_type": family.MODEL_TYPE,
        "architectures": [family.HEADS[model.head]],
    }
    if len(dtypes) == 1:
        extra["dtype"] = dtypes.pop()
    described = {"config.json": json_text(config_to_json(model.config, extra))}
    write_checkpoint(folder, tensors, max_shard_size=max_shard_size, described=described)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if generation_config is not None:
        generation_config.write(folder)
    return folder


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The Hugging Face tokenizer of a folder or hub id.

    Raises:
        OSError: there is none, or one without a vocabulary.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

    folder = find_folder(path_or_id, NO_WEIGHTS)
    advice = (
        "copy them from the checkpoint that the model was trained from, or write them: "
        f"tokenizer.save_pretrained({str(folder)!r})"
    )
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise FileNotFoundError(
            f"{folder} has no files of a tokenizer (tokenizer.json, vocab.txt, spiece.model, ...); "
            + advice
        )
    options = {}
    # Of a family that is ours alone transformers would warn, and then do this itself.
    if (folder / "config.json").is_file() and (
        read_config(folder).get("model_type") not in CONFIG_MAPPING
    ):
        options["config"] = PreTrainedConfig()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    # Where its files are missing, transformers makes one of special tokens (and of SentencePiece's
    # word boundary), to which every text is unknown.
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder) + 1:
        raise FileNotFoundError(
            f"the tokenizer of {folder} has no vocabulary, only the special tokens "
            f"{tokenizer.all_special_tokens[:5]}: its files (tokenizer.json, vocab.txt, "
            f"spiece.model, ...) are missing or empty; {advice}"
        )
    return tokenizer


def load_generation_config(path_or_id: str | Path) -> GenerationConfig:
    """How the authors of a checkpoint want text generated, for `fmjax.generate`.

    Read from generation_config.json, or from the generation keys of an older config.json.

    Raises:
        OSError: no such folder, or the hub cannot be reached.
        ValueError: keys that are not known or not supported; all are listed.
    """
    return GenerationConfig.read(find_folder(path_or_id, NO_WEIGHTS))
