"""What generation is given, checked before anything is computed, and padded to buckets."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from fmjax.generate.forward import Prompt
from fmjax.generation_config import GenerationConfig
from fmjax.models import fields_of, width_of
from fmjax.types import Variables

# What encoders read, with its axes.
SOURCES = {
    "input_ids": "B, P",
    "pixel_values": "B, X, Y, C",
    "input_values": "B, T",
    "input_features": "B, T, M",
}
DEFAULT_NEW_TOKENS = 20
SMALLEST_BUCKET = 16


class Plan(NamedTuple):
    """A checked call.

    Args:
        prompt: padded to its bucket, on the host.
        prefix: int32 [B, P], the decoder's prompt as it was given.
        padding: int32 [B], columns of padding in `prefix`.
        limit: new tokens there may be.
        capacity: columns of the cache.
        vocab_size: V.
    """

    prompt: Prompt
    prefix: np.ndarray
    padding: np.ndarray
    limit: int
    capacity: int
    vocab_size: int


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most half of it again is padding."""
    size = SMALLEST_BUCKET
    while size < length:
        half = size + size // 2
        if length <= half:
            return half
        size *= 2
    return size


def vocabulary_sizes(model: Any) -> tuple[int, int]:
    """V of the encoder, where it reads tokens, and of the decoder."""
    config = model.config
    names = {field.name for field in dataclasses.fields(config)}
    if {"encoder", "decoder"} <= names:  # any pair of models
        reader = {field.name for field in dataclasses.fields(config.encoder)}
        size = config.encoder.vocab_size if "vocab_size" in reader else 0
        return size, config.decoder.vocab_size
    if "decoder_vocab_size" in names:  # Marian, perhaps with two vocabularies
        return config.vocab_size, config.decoder_vocab_size or config.vocab_size
    return config.vocab_size, config.vocab_size


def decoder_positions(model: Any) -> int | None:
    """How many positions the decoder has; None where any position is computed."""
    return model.side_positions[1] if is_encoder_decoder(model) else model.max_positions


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model reads its prompt with an encoder.

    Raises:
        ValueError: it does not generate.
    """
    # Here, because they import Flax, which whoever has a model has already loaded.
    from fmjax.nn.decoder import Decoder
    from fmjax.nn.encoder import Encoder
    from fmjax.nn.seq2seq import EncoderDecoder, WithDecoderAlone

    name = type(model).__module__.rsplit(".", 1)[-1]
    if isinstance(model, EncoderDecoder) and model.head == "seq2seq_lm":
        return True
    if isinstance(model, Decoder | WithDecoderAlone) and model.head == "causal_lm":
        return False
    if isinstance(model, Encoder) and model.head == "causal_lm" and model.config.is_decoder:
        return False  # BERT and its relatives as decoders
    raise ValueError(
        f"{name} with the head {model.head!r} does not generate; load a decoder with "
        "head='causal_lm' or an encoder-decoder with head='seq2seq_lm'"
    )


def make_plan(
    model: Any,
    variables: Variables,
    config: GenerationConfig,
    explicit: Mapping[str, Any],
    *,
    input_ids: Any,
    attention_mask: Any,
    sources: Mapping[str, Any] = MappingProxyType({}),
    decoder_input_ids: Any = None,
    encoder_outputs: Array | None = None,
    extra_columns: int = 0,
) -> Plan:
    """Checks and pads the inputs.

    Args:
        model: what generates.
        variables: its variables.
        config: the options.
        explicit: options of this call, which are not cut down to what the model can.
        input_ids: int [B, P]; of an encoder-decoder, the encoder's tokens.
        attention_mask: [B, P], 1 = token; None is everything but the padding token.
        sources: what an encoder reads that does not read tokens, by name, such as "pixel_values";
            None for what was not given.
        decoder_input_ids: int [B, P], what the decoder of an encoder-decoder starts with.
        encoder_outputs: [B, S, D], in place of an encoder-decoder's `input_ids`.
        extra_columns: columns beyond the limit that drafted tokens may take.

    Raises:
        ValueError: everything that is wrong.
    """
    _, vocab_size = vocabulary_sizes(model)
    problems = _token_problems(config, vocab_size)
    both = is_encoder_decoder(model)
    encoder: dict[str, Any] = {}
    given = {name: value for name, value in sources.items() if value is not None}
    if both:
        batch = _encoder_inputs(
            model, config, given | ({} if input_ids is None else {"input_ids": input_ids}),
            attention_mask, encoder_outputs, encoder, problems,
        )  # fmt: skip
        prefix = _decoder_prefix(config, decoder_input_ids, batch, vocab_size, problems)
        mask = np.ones(prefix.shape, np.int32)
    else:
        if decoder_input_ids is not None or encoder_outputs is not None or given:
            names = ", ".join(["decoder_input_ids", *given])
            problems.append(
                f"{names} and encoder_outputs are for encoder-decoders; a decoder's prompt is "
                "input_ids"
            )
        if input_ids is None:
            raise ValueError("generation:\n  " + "\n  ".join([*problems, "give input_ids"]))
        prefix = _ids(input_ids, "input_ids", vocab_size, problems)
        mask = _mask(attention_mask, prefix, config, problems)
        if prefix.size and mask.shape == prefix.shape:
            if (np.diff(mask, axis=1) < 0).any():
                rows = np.flatnonzero((np.diff(mask, axis=1) < 0).any(axis=1)).tolist()
                problems.append(
                    f"attention_mask has padding after tokens in the rows {rows}; a decoder "
                    "continues the right end: pad on the left (tokenizer.padding_side='left')"
                )
            if (mask.sum(axis=1) == 0).any():
                rows = np.flatnonzero(mask.sum(axis=1) == 0).tolist()
                problems.append(f"the prompts of the rows {rows} are empty")
    if problems:
        raise ValueError("generation:\n  " + "\n  ".join(problems))
    batch, width = prefix.shape
    padding = (width - mask.sum(axis=1)).astype(np.int32)
    longest = int(mask.sum(axis=1).max())
    most = decoder_positions(model)
    if most is not None and not both:
        from fmjax.nn.attention import prefix_length

        most -= prefix_length(variables)  # its own prefixes come before the first token
    # The positions of an encoder-decoder's decoder are counted by columns, drafted ones too.
    limit = _limit(most, config, explicit, width, longest, extra_columns if both else 0)
    if both:
        room, columns = width, width + bucket(limit) + extra_columns
        if most is not None:
            columns = min(columns, most)
    else:
        # Columns that are padding in all rows are not kept, so that they fill no bucket.
        room = bucket(longest)
        columns = room + bucket(limit) + extra_columns
    tokens = np.zeros((batch, room), np.int32)
    tokens[:, max(room - width, 0) :] = prefix[:, max(width - room, 0) :]
    prompt = Prompt(tokens, padding + (room - width), **encoder)
    return Plan(prompt, prefix, padding, limit, columns, vocab_size)


def _token_problems(config: GenerationConfig, vocab_size: int) -> list[str]:
    """Options that name tokens which the vocabulary does not have."""
    problems = []
    for name in (
        "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
        "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
        "sequence_bias",
    ):  # fmt: skip
        value = vars(config)[name]
        if name == "sequence_bias" and value is not None:
            value = tuple(tokens for tokens, _ in value)
        if wrong := sorted({token for token in _flat(value) if token >= vocab_size}):
            problems.append(f"{name} has {wrong}, outside the vocabulary of {vocab_size}")
    return problems


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, tuple):
        return [token for item in value for token in _flat(item)]
    return [value]


def _ids(value: Any, name: str, vocab_size: int, problems: list[str]) -> np.ndarray:
    """int32 [B, P]; what is wrong is added to the problems."""
    try:
        ids = np.asarray(value)
    except ValueError:
        problems.append(f"{name} has rows of different lengths; pad them")
        return np.zeros((1, 0), np.int32)
    if ids.dtype.kind in "OSU":
        problems.append(
            f"{name} must be token ids and holds {type(value).__name__}s of "
            f"{type(ids.flat[0]).__name__}: give what the tokenizer makes of texts, "
            "**tokenizer(texts, padding=True, return_tensors='np')"
        )
        return np.zeros((1, 0), np.int32)
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        problems.append(
            f"{name} has shape {ids.shape}; it must be [B, P] with at least one token a row"
        )
        return np.zeros((1, 0), np.int32)
    if not np.issubdtype(ids.dtype, np.integer):
        problems.append(f"{name} has dtype {ids.dtype}; it must be integers")
        return np.zeros((1, 0), np.int32)
    if wrong := np.unique(ids[(ids < 0) | (ids >= vocab_size)])[:10].tolist():
        problems.append(f"{name} has the tokens {wrong}, outside the vocabulary of {vocab_size}")
    return ids.astype(np.int32)


def _mask(value: Any, ids: np.ndarray, config: GenerationConfig, problems: list[str]) -> np.ndarray:
    """int32 [B, P]; without one, the padding token is padding, unless it also ends texts."""
    if value is None:
        pad = config.pad_token_id
        if pad is None or pad in config.eos:
            return np.ones(ids.shape, np.int32)
        return (ids != pad).astype(np.int32)
    mask = np.asarray(value)
    if mask.shape != ids.shape:
        problems.append(f"attention_mask has shape {mask.shape}; it must be {ids.shape}")
        return np.ones(ids.shape, np.int32)
    return (mask != 0).astype(np.int32)


def _encoder_inputs(
    model: Any,
    config: GenerationConfig,
    sources: dict[str, Any],
    attention_mask: Any,
    encoder_outputs: Array | None,
    result: dict[str, Any],
    problems: list[str],
) -> int:
    """Fills in the encoder's part of a `Prompt`; returns B."""
    read = inspect.signature(model.encode).parameters
    if len(sources) + (encoder_outputs is not None) != 1 or sources.keys() - read:
        names = ", ".join(name for name in SOURCES if name in read)
        got = [*sources, *["encoder_outputs"] * (encoder_outputs is not None)]
        problems.append(f"give exactly one of {names} and encoder_outputs; got {got}")
        return 1
    if encoder_outputs is not None:
        states: Any = encoder_outputs
        if not isinstance(states, Array):
            states = np.asarray(states, np.float32)
        width = _state_width(model)
        if states.ndim != 3 or 0 in states.shape:
            problems.append(f"encoder_outputs has shape {states.shape}; it must be [B, S, D]")
            return 1
        if states.shape[2] != width:
            problems.append(f"encoder_outputs has D={states.shape[2]}; the encoder's is {width}")
        shape = states.shape[:2]
        mask = np.ones(shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != shape:
            problems.append(f"attention_mask has shape {mask.shape}; it must be {shape}")
        elif empty := np.flatnonzero((mask == 0).all(axis=1)).tolist():
            problems.append(f"attention_mask hides all of the encoder_outputs of the rows {empty}")
        result |= {"encoder_states": states, "encoder_mask": mask}
        return shape[0]
    if "input_ids" not in sources:
        ((name, value),) = sources.items()
        return _continuous_inputs(name, value, attention_mask, read, result, problems)
    input_ids = sources["input_ids"]
    ids = _ids(input_ids, "input_ids", vocabulary_sizes(model)[0], problems)
    mask = _mask(attention_mask, ids, config, problems)
    if mask.size and (mask.sum(axis=1) == 0).any():
        rows = np.flatnonzero(mask.sum(axis=1) == 0).tolist()
        problems.append(f"the texts of the rows {rows} are empty")
    most, length = model.side_positions[0], ids.shape[1]
    room = bucket(length)
    if most is not None:
        if length > most:
            problems.append(
                f"input_ids has {length} tokens a row, more than the model's {most}; cut them"
            )
        room = max(min(room, most), length)
    grow = ((0, 0), (0, room - length))
    result |= {
        "encoder_inputs": {"input_ids": np.pad(ids, grow)},
        "encoder_mask": np.pad(mask, grow),
    }
    return ids.shape[0]


def _state_width(model: Any) -> int:
    """D of the encoder's states."""
    pair = {"encoder", "decoder"} <= fields_of(model.config).keys()  # any pair of models
    return model.config.widths[0] if pair else width_of(model.config)


def _continuous_inputs(
    name: str,
    value: Any,
    attention_mask: Any,
    read: Collection[str],
    result: dict[str, Any],
    problems: list[str],
) -> int:
    """The same of images and sounds, whose length is compiled for as it is."""
    array, rank = np.asarray(value, np.float32), SOURCES[name]
    if array.ndim != len(rank.split(", ")) or 0 in array.shape:
        problems.append(f"{name} has shape {array.shape}; it must be [{rank}]")
        return 1
    if not np.isfinite(array).all():
        rows = np.unique(np.argwhere(~np.isfinite(array))[:, 0])[:10].tolist()
        problems.append(f"{name} is not finite in the rows {rows}")
    result["encoder_inputs"] = {name: array}
    if attention_mask is not None:
        mask = np.asarray(attention_mask)
        if "attention_mask" not in read:
            problems.append(f"{name} takes no attention_mask: the encoder sees all of it")
        elif mask.shape != array.shape[:2]:
            problems.append(f"attention_mask has shape {mask.shape}; it must be {array.shape[:2]}")
        result["encoder_mask"] = mask
    return array.shape[0]


def _decoder_prefix(
    config: GenerationConfig, value: Any, batch: int, vocab_size: int, problems: list[str]
) -> np.ndarray:
    """int32 [B, P]: what the decoder starts with."""
    start = config.decoder_start_token_id
    if start is None:
        start = config.bos_token_id
        if start is not None and start >= vocab_size:
            problems.append(
                f"bos_token_id, with which the decoder starts, has [{start}], outside the "
                f"vocabulary of {vocab_size}"
            )
    if value is None:
        if start is None:
            problems.append("give decoder_start_token_id (or bos_token_id, or decoder_input_ids)")
            start = 0
        return np.full((batch, 1), start, np.int32)
    ids = _ids(value, "decoder_input_ids", vocab_size, problems)
    if ids.shape[1] and ids.shape[0] != batch:
        problems.append(f"decoder_input_ids has {ids.shape[0]} rows; input_ids has {batch}")
    if start is not None and ids.shape[1] and (ids[:, 0] != start).all():
        ids = np.concatenate([np.full((ids.shape[0], 1), start, np.int32), ids], axis=1)
    return ids


def _limit(
    most: int | None,
    config: GenerationConfig,
    explicit: Mapping[str, Any],
    width: int,
    longest: int,
    drafted: int,
) -> int:
    """New tokens there may be, by the options and the model's positions (None for any), of which
    drafted tokens take some."""
    also = f" and {drafted} drafted ones" if drafted else ""
    if most is not None and longest + drafted >= most:
        raise ValueError(
            f"the prompt has {longest} tokens{also} and the model {most} positions; cut the prompt "
            "so that new tokens have room"
        )
    limit, name = DEFAULT_NEW_TOKENS, ""
    if config.max_new_tokens is not None:
        limit, name = config.max_new_tokens, "max_new_tokens"
    elif config.max_length is not None:
        limit, name = config.max_length - width, "max_length"
        if limit < 1:
            raise ValueError(
                f"the prompt is {width} long, with its padding, and max_length="
                f"{config.max_length}: no token may follow; set max_new_tokens"
            )
    if most is not None and longest + limit + drafted > most:
        if name in explicit:
            raise ValueError(
                f"{name}={vars(config)[name]} after a prompt of {longest} tokens{also} is "
                f"{longest + limit + drafted} positions, more than the model's {most}"
            )
        limit = most - longest - drafted
    shortest = minimum_new_tokens(config, width)
    # A minimum that this call did not ask for ends where the text does.
    if shortest > limit and explicit.keys() & {"min_new_tokens", "min_length"}:
        raise ValueError(
            f"at least {shortest} new tokens (min_new_tokens or min_length), but at most {limit}"
        )
    return limit


def minimum_new_tokens(config: GenerationConfig, width: int) -> int:
    """New tokens before an end may come, after a prompt of this width."""
    if config.min_new_tokens is not None:
        return config.min_new_tokens
    return config.min_length - width
