"""`generate` and `stream`: checked inputs in, compiled loops, texts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.beam import Scoring, beam_search
from fmjax.generate.build import build_processors
from fmjax.generate.inputs import (
    Plan,
    decoder_positions,
    is_encoder_decoder,
    make_plan,
    vocabulary_sizes,
)
from fmjax.generate.search import go_on, start
from fmjax.generate.speculative import speculate, start_draft
from fmjax.generate.state import Controls, Processor
from fmjax.generate.stop_strings import stop_states, stop_table
from fmjax.generation_config import GenerationConfig
from fmjax.types import Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate` returns, on the host.

    Rows are those of the prompts, each `num_return_sequences` times in a row.

    Args:
        sequences: int32 [B, P + n], prompt and new tokens as transformers returns them: n is the
            length of the longest row, and what ends earlier is padded.
        tokens: int32 [B, N], the new tokens, padded to `max_new_tokens`.
        lengths: int32 [B], new tokens of each row, its end included.
        scores: float32 [B], of beams: log-probability over length ** length_penalty.
        step_logits: float32 [B, N, V], as the model gave them, when asked for.
        step_scores: float32 [B, N, V], after the processors, when asked for.
        log_probs: float32 [B, N], of the new tokens after all processors but temperature, 0 behind
            a row's end, when asked for.
        drafted, accepted: tokens that a draft model proposed, and those that were taken.
    """

    sequences: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None = None
    step_logits: np.ndarray | None = None
    step_scores: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    drafted: int | None = None
    accepted: int | None = None


def generate(
    model: Any,
    variables: Variables,
    input_ids: Any = None,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    rng: Array | None = None,
    processors: Sequence[Processor] = (),
    tokenizer: Any = None,
    draft: tuple[Any, Variables] | None = None,
    pixel_values: Any = None,
    input_values: Any = None,
    input_features: Any = None,
    decoder_input_ids: Any = None,
    encoder_outputs: Array | None = None,
    output_logits: bool = False,
    output_scores: bool = False,
    output_log_probs: bool = False,
    **options: Any,
) -> Generated:
    """Continues prompts: greedily, by drawing, by beam search, or with a draft model's help.

    >>> out = fmjax.generate(model, variables, ids, max_new_tokens=20)  # doctest: +SKIP
    >>> tokenizer.batch_decode(out.sequences, skip_special_tokens=True)  # doctest: +SKIP

    It is compiled for the batch size, the buckets of the prompt's length and of `max_new_tokens`
    (16, 24, 32, 48, 64, ...), and for which options are used; their numbers are free.

    Args:
        model: a decoder with the head "causal_lm" or an encoder-decoder with "seq2seq_lm".
        variables: its variables.
        input_ids: int [B, P]; prompts, padded on the left. Of an encoder-decoder, the encoder's
            tokens, padded on the right.
        attention_mask: [B, P], 1 = token; None is everything but `pad_token_id`, where that is
            given and ends no text.
        generation_config: options, such as `fmjax.load_generation_config` returns; None is the
            defaults.
        rng: a typed key, for ``do_sample=True``.
        processors: pure functions ``(logits [B, V], State) -> logits``, see
            `Processor` of this package.
        tokenizer: for ``stop_strings``.
        draft: (model, variables) of a smaller model with the same vocabulary that proposes
            ``num_assistant_tokens`` at a time; the result is the same, respectively drawn from
            the same distribution (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).
        pixel_values: [B, X, Y, C], input_values: [B, T] or input_features: [B, T, M], in place of
            `input_ids` where an encoder-decoder's encoder reads images or sounds; `attention_mask`
            is then over their T.
        decoder_input_ids: int [B, P], what an encoder-decoder's decoder starts with, all real
            tokens; None is ``decoder_start_token_id``.
        encoder_outputs: [B, S, D], in place of an encoder-decoder's `input_ids`, from its method
            "encode".
        output_logits, output_scores: whether each step's are returned, before and after the
            processors; not of a beam search.
        output_log_probs: whether the new tokens' log-probabilities are returned; not of a beam
            search.
        **options: fields of `GenerationConfig`, in place of its values.

    Raises:
        ValueError: before anything is computed: contradictory options, empty or too long prompts,
            tokens outside the vocabulary. All problems of a kind are listed.
    """
    config = _configured(generation_config, options)
    kept = output_logits or output_scores or output_log_probs
    problems = _problems(config, rng, tokenizer, draft is not None, kept)
    if problems:
        raise ValueError("generation:\n  " + "\n  ".join(problems))
    plan = make_plan(
        model,
        variables,
        config,
        options,
        input_ids=input_ids,
        attention_mask=attention_mask,
        sources={
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        },
        decoder_input_ids=decoder_input_ids,
        encoder_outputs=encoder_outputs,
        extra_columns=0 if draft is None else config.num_assistant_tokens,
    )
    if draft is not None:
        _check_draft(model, draft[0], plan)
    controls = _controls(config, plan, processors, tokenizer, rng)
    limit, stop = np.int32(plan.limit), stop_states(controls.stop, plan.prompt)
    if config.num_beams > 1:
        finished = beam_search(
            model,
            variables,
            plan.prompt,
            controls,
            _scoring(config),
            limit,
            stop,
            num_beams=config.num_beams,
            capacity=plan.capacity,
        )
        several = config.num_return_sequences
        tokens, scores, lengths, _ = (np.asarray(part)[:, :several] for part in finished)
        flat = tokens.reshape(-1, tokens.shape[-1])
        return _generated(config, plan, flat, lengths.reshape(-1), scores=scores.reshape(-1))
    carry, context = start(
        model,
        variables,
        plan.prompt,
        controls,
        limit,
        stop,
        capacity=plan.capacity,
        repeats=config.num_return_sequences,
        keep_logits=output_logits,
        keep_scores=output_scores,
        keep_log_probs=output_log_probs,
    )
    if draft is not None:
        draft_cache, draft_context = start_draft(
            *draft,
            plan.prompt,
            limit,
            capacity=plan.capacity,
            repeats=config.num_return_sequences,
        )
        loop = speculate(
            model,
            variables,
            *draft,
            carry,
            context,
            draft_cache,
            draft_context,
            controls,
            count=config.num_assistant_tokens,
        )
        tokens, lengths = np.asarray(loop.carry.state.tokens), np.asarray(loop.carry.lengths)
        return _generated(
            config, plan, tokens, lengths, drafted=int(loop.drafted), accepted=int(loop.accepted)
        )
    carry = go_on(model, variables, carry, context, controls, limit)
    steps = {
        name: None if store is None else np.moveaxis(np.asarray(store), 0, 1)[:, : plan.limit]
        for name, store in (("step_logits", carry.logits), ("step_scores", carry.scores))
    }
    lengths = np.asarray(carry.lengths)
    if carry.log_probs is not None:
        new = np.arange(plan.limit) < lengths[:, None]
        steps["log_probs"] = np.where(new, np.asarray(carry.log_probs)[:, : plan.limit], 0.0)
    return _generated(config, plan, np.asarray(carry.state.tokens), lengths, **steps)


def stream(
    model: Any,
    variables: Variables,
    input_ids: Any = None,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    rng: Array | None = None,
    processors: Sequence[Processor] = (),
    tokenizer: Any = None,
    pixel_values: Any = None,
    input_values: Any = None,
    input_features: Any = None,
    decoder_input_ids: Any = None,
    encoder_outputs: Array | None = None,
    chunk_size: int = 1,
    **options: Any,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as they come: int32 [B, n], n at most `chunk_size`.

    It runs what `generate` has compiled, and yields the same tokens: rows that have ended are
    continued with padding until all have.

    Args:
        chunk_size: tokens between two answers; more are a little faster.
        model, variables, input_ids, attention_mask, generation_config, rng, processors, tokenizer,
            pixel_values, input_values, input_features, decoder_input_ids, encoder_outputs,
            **options: see `generate`.

    Raises:
        ValueError: as `generate`, at the call; a beam search cannot be streamed.
    """
    config = _configured(generation_config, options)
    problems = _problems(config, rng, tokenizer, False, False)
    if config.num_beams > 1:
        problems.append("a beam search knows its text only at the end; stream with num_beams=1")
    if chunk_size < 1:
        problems.append(f"chunk_size={chunk_size} must be at least 1")
    if problems:
        raise ValueError("generation:\n  " + "\n  ".join(problems))
    plan = make_plan(
        model,
        variables,
        config,
        options,
        input_ids=input_ids,
        attention_mask=attention_mask,
        sources={
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        },
        decoder_input_ids=decoder_input_ids,
        encoder_outputs=encoder_outputs,
    )
    controls = _controls(config, plan, processors, tokenizer, rng)
    return _stream(model, variables, config, plan, controls, chunk_size)


def _stream(
    model: Any,
    variables: Variables,
    config: GenerationConfig,
    plan: Plan,
    controls: Controls,
    chunk_size: int,
) -> Iterator[np.ndarray]:
    carry, context = start(
        model,
        variables,
        plan.prompt,
        controls,
        np.int32(plan.limit),
        stop_states(controls.stop, plan.prompt),
        capacity=plan.capacity,
        repeats=config.num_return_sequences,
    )
    width, done = plan.prompt.tokens.shape[1], 0
    while True:
        # The first token is there already; a whole chunk takes the steps that are missing.
        carry = go_on(model, variables, carry, context, controls, np.int32(done + chunk_size))
        # A copy: the next step overwrites the buffer.
        tokens = np.array(carry.state.tokens)
        step = int(carry.state.step)
        yield tokens[:, width + done : width + step]
        done = step
        if done >= plan.limit or bool(np.asarray(carry.finished).all()):
            return


def _configured(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    if not isinstance(config, GenerationConfig | None):
        raise ValueError(
            f"generation_config is a {type(config).__module__}.{type(config).__name__}; it must be "
            "a fmjax.GenerationConfig, which fmjax.GenerationConfig.from_dict makes of a dict"
        )
    if "token_type_ids" in options:
        raise ValueError(
            "token_type_ids are not read in generation, which takes every prompt for one text: "
            "leave them out, as tokenizer(texts, return_token_type_ids=False) does"
        )
    return (config or GenerationConfig()).replace(**options)


def _problems(
    config: GenerationConfig, rng: Array | None, tokenizer: Any, drafted: bool, kept: bool
) -> list[str]:
    """Options and arguments that do not go together."""
    problems = []
    if config.do_sample and rng is None:
        problems.append("do_sample=True needs rng, a jax.random.key")
    elif config.do_sample and not (
        isinstance(rng, Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    ):
        problems.append(f"rng={rng!r} must be a typed key: jax.random.key(seed)")
    if config.stop_strings and tokenizer is None:
        problems.append("stop_strings needs the tokenizer")
    if config.num_beams > 1 and drafted:
        problems.append("a draft model does not help a beam search; set num_beams=1")
    if config.num_beams > 1 and kept:
        problems.append("logits, scores and log-probabilities are not of a beam search")
    if drafted and kept:
        problems.append("logits, scores and log-probabilities are not kept with a draft model")
    return problems


def _check_draft(model: Any, draft_model: Any, plan: Plan) -> None:
    problems = []
    if is_encoder_decoder(model) != is_encoder_decoder(draft_model):
        problems.append("of the model and the draft model one alone has an encoder")
    if (size := vocabulary_sizes(draft_model)[1]) != plan.vocab_size:
        problems.append(
            f"the draft model's vocabulary has {size} tokens, the model's {plan.vocab_size}"
        )
    if plan.prompt.encoder_states is not None:
        problems.append("a draft model encodes for itself: give input_ids, not encoder_outputs")
    longest = int(plan.prompt.tokens.shape[1] - plan.prompt.padding.min())
    most = decoder_positions(draft_model)
    if most is not None and longest + plan.limit > most:
        problems.append(
            f"{longest} + {plan.limit} tokens are more than the draft model's {most} positions"
        )
    if problems:
        raise ValueError("generation:\n  " + "\n  ".join(problems))


def _controls(
    config: GenerationConfig,
    plan: Plan,
    processors: Sequence[Processor],
    tokenizer: Any,
    rng: Array | None,
) -> Controls:
    stop = None
    if config.stop_strings:
        stop = stop_table(config.stop_strings, tokenizer, plan.vocab_size)
    return Controls(
        build_processors(config, plan, processors),
        np.array(config.eos, np.int32),
        np.array(config.pad, np.int32),
        stop,
        rng if config.do_sample else None,
    )


def _scoring(config: GenerationConfig) -> Scoring:
    return Scoring(
        np.array(config.length_penalty, np.float32),
        np.array(config.early_stopping is True),
        np.array(config.early_stopping == "never"),
    )


def _generated(
    config: GenerationConfig,
    plan: Plan,
    tokens: np.ndarray,
    lengths: np.ndarray,
    **others: Any,
) -> Generated:
    """The result from the texts [B, S] with their padded prompts."""
    width = plan.prompt.tokens.shape[1]
    new = tokens[:, width : width + plan.limit].astype(np.int32)
    prefix = np.repeat(plan.prefix, config.num_return_sequences, axis=0)
    sequences = np.concatenate([prefix, new[:, : int(lengths.max())]], axis=1)
    return Generated(sequences=sequences, tokens=new, lengths=lengths, **others)
