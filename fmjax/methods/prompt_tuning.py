"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained vectors among a frozen model's
inputs.

The vectors are rows V, V + 1, ... of the word embeddings, kept as ``adapters/<path of the table>/
prompt`` [P, D]; a batch has them as ids, so examples may have different prompts. They are scaled
and get positions as words do.

    variables = create(variables, rng, length=20)
    loss_fn = prompted(sequence_classification.loss(model), model)
    state = init_state(variables, tx, rng, lambda path: path.startswith("adapters/"))

A tuned prompt of a decoder generates as a prefix: ``prefix_tuning.from_tokens(model, variables,
prompt_ids(variables))``; of an encoder-decoder through its method "encode".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.methods.peft_files import (
    BASE,
    check_config,
    read_adapter,
    read_modules,
    refuse,
    write_adapter,
    write_modules,
)
from fmjax.models import family_for
from fmjax.tasks.vocabulary_loss import IGNORED
from fmjax.tree import flatten, merge, unflatten
from fmjax.types import Batch, Variables

ATTACHES = ("variables", "loss")

Result = TypeVar("Result")

# Of the heads whose labels are those of tokens.
_BY_TOKEN = ("causal_lm", "masked_lm", "pretraining", "token_classification")
# Of the heads whose losses may mask tokens.
_MASKED = ("masked_lm", "pretraining")
# What a batch has for each token, and what stands there for a virtual one.
_FILLED = {"attention_mask": 1, "token_type_ids": 0, "special_tokens_mask": 1}
_PLACES = ("start_positions", "end_positions")
_WORDS = "embed/word/embedding"
_PACKED = ("position_ids", "segment_ids", "word_ids", "inputs_embeds")


def create(
    variables: Variables,
    rng: Array,
    *,
    length: int,
    sets: int = 1,
    init: Literal["random", "vocabulary"] = "vocabulary",
    vocabulary: int = 5000,
    tokens: Sequence[Sequence[int]] | None = None,
) -> Variables:
    """The model's variables with prompts (Lester et al. 2021, section 3.2, "initialization").

    Args:
        variables: the model's.
        rng: a typed key.
        length: P, virtual tokens of a prompt.
        sets: prompts there are, such as one a task.
        init: "random" is uniform in [-0.5, 0.5]; "vocabulary" copies rows of words.
        vocabulary: of how many first rows these are drawn; in most vocabularies the first are the
            most common, and the paper takes 5,000.
        tokens: instead, the words of each set, such as the names of the classes; repeated or cut
            to `length`.

    Returns:
        Variables with "adapters/.../prompt" [sets * P, D].

    Raises:
        ValueError: there are prompts already, no table of words or several, or arguments out of
            range.
    """
    place, table = _table(variables)
    size, width = table.shape
    problems = []
    if length < 1 or sets < 1:
        problems.append(f"length={length} and sets={sets} must be at least 1")
    if init not in ("random", "vocabulary"):
        problems.append(f"init={init!r} is not 'random' or 'vocabulary'")
    if vocabulary < 1:
        problems.append(f"vocabulary={vocabulary} must be at least 1")
    if tokens is not None:
        if len(tokens) != sets or not all(len(row) for row in tokens):
            problems.append(f"tokens has {len(tokens)} rows for sets={sets}, or an empty one")
        if wrong := sorted({int(t) for row in tokens for t in row if not 0 <= t < size}):
            problems.append(f"tokens has {wrong}, outside the vocabulary of {size}")
    if place in flatten(variables):
        problems.append(f"the variables have {place} already")
    refuse(problems, "prompts")
    if tokens is not None:
        rows = table[np.concatenate([np.resize(np.asarray(row), length) for row in tokens])]
    elif init == "vocabulary":
        ids = jax.random.randint(rng, (sets * length,), 0, min(vocabulary, size))
        rows = table[ids]
    else:
        rows = jax.random.uniform(rng, (sets * length, width), minval=-0.5, maxval=0.5)
    return merge(variables, unflatten({place: jnp.asarray(rows, jnp.float32)}))


def prompt_ids(variables: Variables, *, sets: int = 1) -> Array:
    """int32 [sets, P]: the ids of each prompt's virtual tokens.

    Raises:
        ValueError: there are no prompts, or their rows are no multiple of `sets`.
    """
    place, table = _table(variables)
    flat = flatten(variables)
    if place not in flat:
        raise ValueError(f"the variables have no {place}; make one with create")
    rows = flat[place].shape[0]
    if sets < 1 or rows % sets:
        raise ValueError(f"{place} has {rows} rows, which are not sets={sets} prompts")
    return (table.shape[0] + jnp.arange(rows, dtype=jnp.int32)).reshape(sets, -1)


def prompted(
    fn: Callable[..., Result], model: Any, *, sets: int = 1, after: int = 0
) -> Callable[..., Result]:
    """A LossFn or predictions, ``fn(variables, batch, ...)``, on batches with the prompt in front.

    Labels of tokens are none for virtual ones (a causal model predicts the first real token from
    the last virtual one), masked language models do not mask them, and places of answers move.
    What predictions return by token has P more. Of an encoder-decoder the encoder gets the prompt.

    Args:
        fn: what a task has made of the model.
        model: for its head and kind.
        sets: as in `create`; if there are several, a batch has ``task`` int [B], which to take.
        after: real tokens that stay before the prompt: 1 keeps BERT's [CLS] first, where its
            pooler reads; PEFT and the paper put the prompt first (0).

    Raises:
        ValueError: `after` is negative; at the call, batches of packed documents, of given
            positions or of vectors, or prompts that do not fit `sets`.
    """
    if after < 0:
        raise ValueError(f"after is {after}; it must not be negative")
    both = _is_encoder_decoder(model)

    def on_prompted(variables: Variables, batch: Batch, *rest: Any, **options: Any) -> Result:
        ids = prompt_ids(variables, sets=sets)
        return fn(variables, _add(batch, ids, model.head, both, after), *rest, **options)

    return on_prompted


def _add(batch: Batch, ids: Array, head: str, both: bool, after: int) -> Batch:
    """The batch with the virtual tokens."""
    batch = dict(batch)
    packed = [name for name in _PACKED if name in batch]
    if len(np.shape(batch.get("attention_mask", 0))) > len(np.shape(batch.get("input_ids", 0))):
        packed.append("attention_mask [B, T, T]")
    if packed or "input_ids" not in batch:
        raise ValueError(
            f"a prompt needs input_ids and does not go with {packed or 'a batch without them'}: "
            "give whole texts, with a mask of padding alone"
        )
    if (len(ids) > 1) != ("task" in batch):
        raise ValueError(
            f"there are {len(ids)} prompts and the batch has {'a' if 'task' in batch else 'no'} "
            "task: of several prompts it must say which, int [B]; of one it must not"
        )
    tokens = jnp.asarray(batch["input_ids"])  # [B, T], or [B, N, T] of choices
    lead, length = tokens.shape[:-1], ids.shape[1]
    own = ids[jnp.asarray(batch.pop("task"))] if "task" in batch else ids[0]
    own = own.reshape(*own.shape[:-1], *(1 for _ in lead[1:]), length) if own.ndim > 1 else own

    def joined(values: Any, new: Any) -> Array:
        values = jnp.asarray(values)
        new = jnp.broadcast_to(jnp.asarray(new, values.dtype), (*lead, length))
        return jnp.concatenate([values[..., :after], new, values[..., after:]], axis=-1)

    if head in _BY_TOKEN and not both:
        if head == "causal_lm":
            batch.setdefault("labels", tokens)  # as the task does, before they are joined
        if "labels" in batch:
            batch["labels"] = joined(batch["labels"], IGNORED)
    if head in _MASKED and not both:
        batch.setdefault("special_tokens_mask", jnp.zeros_like(tokens))
    for name, fill in _FILLED.items():
        if name in batch:
            batch[name] = joined(batch[name], fill)
    for name in _PLACES:
        if name in batch:
            places = jnp.asarray(batch[name])
            batch[name] = jnp.where(places >= after, places + length, places)
    batch["input_ids"] = joined(tokens, own)
    return batch


def check_rows(model: Any, variables: Variables) -> None:
    """Refuses a model that changes words' vectors (by a factor) but not vectors given to it.

    PEFT puts its prompts among the latter, so that a file's rows would be others here.
    """
    inputs = dict(family_for(model).inputs(model.config, model.head))
    ids = jnp.ones_like(inputs["input_ids"])
    vectors = _table(variables)[1][ids]
    options: dict[str, Any] = {}
    if _is_encoder_decoder(model):
        inputs, options = {}, {"method": "encode"}
    by_id = model.apply(variables, **(inputs | {"input_ids": ids}), **options)
    inputs.pop("input_ids", None)
    by_vector = model.apply(variables, **inputs, inputs_embeds=vectors, **options)
    close = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, 1e-3, 1e-5)), by_id, by_vector)
    if not all(jax.tree.leaves(close)):
        raise ValueError(
            f"{family_for(model).MODEL_TYPE} scales the vectors of words, which PEFT does not do "
            "to a prompt: its files cannot be exchanged"
        )


def with_modules(model: Any, variables: Variables, tensors: Mapping[str, np.ndarray]) -> Variables:
    """Variables with the parameters that a file has whole, beside the method's own tensors.

    Raises:
        ValueError: tensors that are not the model's.
    """
    variables, read = read_modules(
        model, variables, {name.removeprefix(BASE): array for name, array in tensors.items()}
    )
    if unread := sorted(name for name in tensors if name.removeprefix(BASE) not in read):
        raise ValueError(f"the adapter's tensors {unread} belong to no parameter of the model")
    return variables


def _table(variables: Variables) -> tuple[str, Array]:
    """(where the prompt of the table of words belongs, the table)."""
    flat = flatten(variables)
    tables = [path for path in flat if path.startswith("params/") and path.endswith(_WORDS)]
    if len(tables) != 1:
        raise ValueError(
            f"a prompt is put into the one table of words, {_WORDS}; the model has {tables}"
        )
    place = "adapters/" + tables[0].removeprefix("params/").replace("/embedding", "/prompt")
    return place, flat[tables[0]]


def _is_encoder_decoder(model: Any) -> bool:
    # Here, because it imports Flax, which whoever has a model has already loaded.
    from fmjax.nn.seq2seq import EncoderDecoder

    return isinstance(model, EncoderDecoder) and model.head != "causal_lm"


_READ = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "modules_to_save")
# Sizes of the base, which it has itself, and how the prompt was first made.
_OTHER = ("num_layers", "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text")
_OTHER += ("tokenizer_name_or_path", "tokenizer_kwargs")


def load(model: Any, variables: Variables, path_or_id: str | Path) -> Variables:
    """The model's variables with the prompt of a PEFT folder, and the parameters it has whole.

    Args:
        model: the base, whose words are not scaled on their way in (PEFT scales no prompt).
        variables: its variables.
        path_or_id: of `save`, or of PEFT's ``PromptTuningConfig``. Of an encoder-decoder PEFT keeps
            as many rows again, which it never reads; they are left out.

    Raises:
        OSError: no such folder.
        ValueError: another method, options that are not supported, or another model's prompt.
    """
    check_rows(model, variables)
    config, tensors = read_adapter(path_or_id)
    problems = check_config(config, "PROMPT_TUNING", {*_READ, *_OTHER}, {})
    refuse(problems, f"prompts of {path_or_id}")
    place, table = _table(variables)
    rows = tensors.pop("prompt_embeddings", np.zeros((0, 0)))
    length = config.get("num_virtual_tokens")
    repeats = config.get("num_transformer_submodules") or 1
    if not length or rows.shape != (length * repeats, table.shape[1]):
        raise ValueError(
            f"prompt_embeddings has shape {rows.shape}; the config's num_virtual_tokens={length} "
            f"(times {repeats}) and the model's width make it {(length, table.shape[1])}"
        )
    variables = with_modules(model, variables, tensors)
    return merge(variables, unflatten({place: jnp.asarray(rows[:length], jnp.float32)}))


def save(
    path: str | Path, model: Any, variables: Variables, *, modules: Collection[str] = ()
) -> Path:
    """Writes the prompt as a folder that PEFT loads onto the same base model.

    Args:
        path: the folder, made if missing.
        model: the base.
        variables: with one prompt.
        modules: globs of module paths that are saved whole, ``("head*",)`` where it was trained.

    Raises:
        OSError: the folder cannot be written.
        ValueError: no prompt, or a family of scaled words.
    """
    check_rows(model, variables)
    place, table = _table(variables)
    length = prompt_ids(variables).shape[1]
    tensors = {"prompt_embeddings": np.asarray(flatten(variables)[place])}
    whole, names = write_modules(model, variables, modules)
    tensors |= {BASE + name: array for name, array in whole.items()}
    config = {
        "num_virtual_tokens": length,
        "token_dim": table.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": names or None,
    }
    return write_adapter(path, model, "PROMPT_TUNING", config, tensors)
