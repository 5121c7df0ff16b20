"""config.json in and out, strictly: a key that is not understood is an error, never dropped.

Silently dropping a key such as ``rope_scaling`` is how wrong models are born.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Keys that say nothing about the function: provenance, how to run it, how to generate with it.
BOOKKEEPING = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels
    architectures attn_implementation auto_map directionality dtype finetuning_task
    gradient_checkpointing model_type name_or_path output_attentions output_hidden_states
    output_past pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type return_dict task_specific_params tf_legacy_loss
    tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
    xla_device cache_implementation max_sequence_length pretraining_tp seq_length
    unk_token_id custom_pipelines
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
    sep_token_id suppress_tokens temperature top_k top_p typical_p
    chunk_size_feed_forward tie_encoder_decoder label2id num_labels is_encoder_decoder
    """.split()
)
# Keys that would change the function if they had another value, in every family.
FIXED_EVERYWHERE = {"pruned_heads": {}, "cross_attention_hidden_size": None}


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """The parsed config.json of a folder, or its config of another name.

    Raises:
        OSError: there is no such file.
        ValueError: it is not UTF-8 JSON, not an object, or unreasonably large.
    """
    file = path / name
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {name}; give a folder that a library of Hugging Face or fmjax wrote"
        )
    if file.stat().st_size > 10_000_000:
        raise ValueError(f"{file} is {file.stat().st_size} bytes; a config is under 10 MB")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not UTF-8 JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; it must be a JSON object")
    return data


def parse_config(cls: type[T], data: Mapping[str, Any], fixed: Mapping[str, Any]) -> T:
    """The dataclass `cls` from the keys of a config.json.

    A field whose type the file itself names, such as a config inside a config, has in its metadata
    ``read``, from JSON to the value, and ``write``, the inverse.

    Args:
        cls: a family's Config.
        data: the parsed file.
        fixed: keys that are not fields and must have the value given here, or one of the values
            of a frozenset; `...` takes any value, of what the family never reads.

    Raises:
        ValueError: keys that are neither fields, nor bookkeeping, nor at their fixed value; values
            of the wrong type; contradictory labels. All problems are listed.
    """
    fixed = FIXED_EVERYWHERE | dict(fixed)
    hints = typing.get_type_hints(cls)
    problems: list[str] = []
    values: dict[str, Any] = {}
    readers = {field.name: field.metadata.get("read") for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    named, alias_problems = _own_names(one_rope_dialect(data, hints), cls)
    problems += alias_problems
    for key, value in named.items():
        if key == "id2label":
            continue
        if key in hints:
            try:
                read = readers[key]
                values[key] = _read(value, hints[key]) if read is None else read(value)
            except ValueError as error:
                problems.append(f"{key}={value!r} {error}")
        elif key in fixed:
            if fixed[key] is ...:
                continue
            allowed = fixed[key] if isinstance(fixed[key], frozenset) else [fixed[key]]
            if value not in list(allowed):
                only = " or ".join(sorted(map(repr, allowed)))
                problems.append(f"{key}={value!r} is not supported; only {only} is")
        elif key not in BOOKKEEPING:
            problems.append(f"{key}={value!r} is not a key this family knows")
    if "id2label" in hints:
        labels, label_problems = _labels(data)
        problems += label_problems
        if labels is not None:
            values["id2label"] = labels
    if problems:
        raise ValueError(
            f"config.json of model_type {data.get('model_type')!r}:\n  "
            + "\n  ".join(problems)
            + "\nA key that changes nothing can be deleted from the file; one that matters needs "
            "support in the family."
        )
    return cls(**values)


def _own_names(data: Mapping[str, Any], cls: Any) -> tuple[dict[str, Any], list[str]]:
    """Keys that are other names of a field (its metadata's ``also``) under the field's name."""
    result, problems = dict(data), []
    for field in dataclasses.fields(cls):
        for alias in field.metadata.get("also", ()):
            if alias not in result:
                continue
            value = result.pop(alias)
            if result.setdefault(field.name, value) != value:
                problems.append(
                    f"{alias}={value!r} is another name of {field.name}, which is "
                    f"{result[field.name]!r}; delete the wrong one"
                )
    return result, problems


def one_rope_dialect(data: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """A config.json with transformers 5's ``rope_parameters`` spelt as version 4 does.

    Both versions read version 4's keys, so they are the fields of our configs: ``rope_theta``,
    ``rope_scaling`` and, by family, ``partial_rotary_factor`` or ``rotary_pct``, and for layers
    with a sliding window ``rope_local_base_freq``.

    Args:
        data: the parsed file.
        fields: of the family's config.
    """
    if not isinstance(data.get("rope_parameters"), dict):
        return {key: value for key, value in data.items() if key != "rope_parameters" or value}
    result = dict(data)
    rope = dict(result.pop("rope_parameters"))
    local = None
    if "full_attention" in rope:  # by type of layer
        local, rope = dict(rope.get("sliding_attention") or {}), dict(rope["full_attention"])

    def move(value: Any, *names: str) -> None:
        """To the first of the names that is a field and that the file does not give itself."""
        name = next((name for name in names if name in fields), names[0])
        result.setdefault(name, value)

    if "rope_theta" in rope:
        move(rope.pop("rope_theta"), "rope_theta", "global_rope_theta", "rotary_emb_base")
    if "partial_rotary_factor" in rope:
        move(rope.pop("partial_rotary_factor"), "partial_rotary_factor", "rotary_pct")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        move(rope, "rope_scaling")
    if local is not None:
        if "rope_theta" in local:
            move(local.pop("rope_theta"), "rope_local_base_freq", "local_rope_theta")
        if local.get("rope_type", "default") != "default":
            move(local, "rope_local_scaling")
    return result


def _read(value: Any, hint: Any) -> Any:
    """A JSON value as a field of this type: lists become tuples, objects dataclasses.

    Raises:
        ValueError: it does not fit; the message continues "key=value ...".
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option in (type(None), None) and value is None:
            return value
        # bool is an int in Python, but not in a config.
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (bool, str) and isinstance(value, option):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list):
            item = typing.get_args(option)[0]
            return tuple(_read(element, item) for element in value)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _read_nested(option, value)
    raise ValueError(f"must be {_readable(hint)}")


def _read_nested(cls: Any, value: Mapping[str, Any]) -> Any:
    """A dataclass from a nested object; every key must be a field."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"has the unknown keys {unknown}; known are {sorted(hints)}")
    return cls(**{key: _read(element, hints[key]) for key, element in value.items()})


def _readable(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _labels(data: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, list[str]]:
    """Label names in order of their numbers, and what is wrong with them."""
    table = data.get("id2label")
    number = data.get("num_labels", data.get("_num_labels"))
    if table is None:
        if number is None:
            return None, []
        if type(number) is not int or not 0 < number < 1_000_000:
            return None, [f"num_labels={number!r} must be a positive int"]
        return default_labels(number), []
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        return None, [f"id2label={table!r} must map numbers to names"]
    try:
        numbered = sorted((int(key), name) for key, name in table.items())
    except ValueError:
        return None, [f"id2label has keys {sorted(table)}; they must be numbers"]
    if [key for key, _ in numbered] != list(range(len(numbered))):
        return None, [
            f"id2label has keys {[key for key, _ in numbered]}; they must be 0, 1, 2, ..."
        ]
    return tuple(name for _, name in numbered), []


def default_labels(number: int) -> tuple[str, ...]:
    """Names for labels that have none: LABEL_0, LABEL_1, ..., as Hugging Face calls them."""
    return tuple(f"LABEL_{i}" for i in range(number))


def config_to_json(config: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json for a Config dataclass, sorted; `extra` is added to them.

    Fields whose metadata say ``saved=False`` are told by the weights and are not written, and those
    that say ``saved="set"`` are written where they are not None: PyTorch takes an absent key for
    the default and stumbles over null.
    """
    data: dict[str, Any] = {
        field.name: field.metadata.get("write", _written)(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if (saved := field.metadata.get("saved", True))
        and not (saved == "set" and getattr(config, field.name) is None)
    }
    labels: Sequence[str] | None = data.pop("id2label", None)
    if labels is not None:
        data["id2label"] = {str(i): name for i, name in enumerate(labels)}
        data["label2id"] = {name: i for i, name in enumerate(labels)}
    data |= extra
    return dict(sorted(data.items()))


def _written(value: Any) -> Any:
    """The inverse of `_read`; keys of nested objects that are None are left out."""
    if isinstance(value, tuple):
        return [_written(element) for element in value]
    if dataclasses.is_dataclass(value):
        nested = {f.name: _written(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {key: element for key, element in nested.items() if element is not None}
    return value


def json_text(data: Any) -> str:
    """JSON as it is written to files."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json_text(data), "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
