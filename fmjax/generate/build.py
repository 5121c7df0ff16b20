"""From options to processors, in the order in which transformers applies them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fmjax.generate import processors as p
from fmjax.generate import sampling as s
from fmjax.generate.forward import Prompt
from fmjax.generate.inputs import Plan, minimum_new_tokens
from fmjax.generate.state import Processor
from fmjax.generation_config import GenerationConfig


def build_processors(
    config: GenerationConfig, plan: Plan, own: Sequence[Processor] = ()
) -> tuple[Processor, ...]:
    """All processors of a call.

    Args:
        config: the options.
        plan: the inputs.
        own: the user's, applied before those that shape the distribution of draws.

    Raises:
        ValueError: an option for the encoder's tokens, and there are none.
    """
    vocab_size = plan.vocab_size
    width = plan.prefix.shape[1]
    eos = p.token_mask(config.eos, vocab_size)
    chain: list[Processor] = []
    if config.sequence_bias is not None:
        chain.append(p.SequenceBias.of(config.sequence_bias, vocab_size))
    if config.encoder_repetition_penalty != 1.0:
        ids, mask = _encoder_text(plan.prompt, "encoder_repetition_penalty")
        seen = np.zeros((ids.shape[0], vocab_size), bool)
        rows, columns = np.nonzero(mask)
        seen[rows, ids[rows, columns]] = True
        chain.append(
            p.EncoderRepetitionPenalty(np.float32(config.encoder_repetition_penalty), seen)
        )
    if config.repetition_penalty != 1.0:
        chain.append(p.RepetitionPenalty(np.float32(config.repetition_penalty)))
    if config.no_repeat_ngram_size:
        chain.append(p.NoRepeatNgrams(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size:
        ids, mask = _encoder_text(plan.prompt, "encoder_no_repeat_ngram_size")
        chain.append(p.NoEncoderNgrams(ids, mask.astype(bool), config.encoder_no_repeat_ngram_size))
    if config.bad_words_ids:
        ends = {(token,) for token in config.eos}
        words = [(word, -math.inf) for word in config.bad_words_ids if word not in ends]
        chain.append(p.SequenceBias.of(words, vocab_size))
    if config.eos and (shortest := minimum_new_tokens(config, width)) > 0:
        chain.append(p.MinNewTokens(np.int32(shortest), eos))
    if config.forced_bos_token_id is not None and width == 1:
        forced = p.token_mask((config.forced_bos_token_id,), vocab_size)
        chain.append(p.ForceAt(forced, np.int32(0)))
    if config.forced_eos_token_id is not None:
        forced = config.forced_eos_token_id
        forced = forced if isinstance(forced, tuple) else (forced,)
        chain.append(p.ForceAt(p.token_mask(forced, vocab_size), np.int32(-1)))
    if config.remove_invalid_values:
        chain.append(p.RemoveInvalid())
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        chain.append(p.ExponentialDecay(np.int32(start), np.float32(factor), eos))
    if config.suppress_tokens:
        chain.append(p.SuppressTokens(p.token_mask(config.suppress_tokens, vocab_size)))
    if config.begin_suppress_tokens:
        first = 1 if width == 1 and config.forced_bos_token_id is not None else 0
        tokens = p.token_mask(config.begin_suppress_tokens, vocab_size)
        chain.append(p.SuppressAt(tokens, np.int32(first)))
    chain += [_as_tree(processor) for processor in own]
    if config.do_sample:
        chain += _for_draws(config)
    if config.renormalize_logits:
        chain.append(p.Normalize())
    return tuple(chain)


def _for_draws(config: GenerationConfig) -> list[Processor]:
    # A beam search needs a token beside every end.
    at_least = 1 if config.num_beams == 1 else max(2, len(config.eos) + 1)
    chain: list[Processor] = [s.Temperature(np.float32(config.temperature))]
    if config.top_k:
        chain.append(s.TopK(np.int32(max(config.top_k, at_least))))
    if config.top_p < 1.0:
        chain.append(s.TopP(np.float32(config.top_p), at_least))
    if config.min_p is not None:
        chain.append(s.MinP(np.float32(config.min_p), at_least))
    if config.typical_p < 1.0:
        chain.append(s.Typical(np.float32(config.typical_p), at_least))
    if config.epsilon_cutoff > 0.0:
        chain.append(s.EpsilonCutoff(np.float32(config.epsilon_cutoff), at_least))
    if config.eta_cutoff > 0.0:
        chain.append(s.EtaCutoff(np.float32(config.eta_cutoff), at_least))
    return chain


def _encoder_text(prompt: Prompt, option: str) -> tuple[Any, Any]:
    if prompt.encoder_inputs is None or "input_ids" not in prompt.encoder_inputs:
        raise ValueError(f"{option} needs the encoder's input_ids")
    return prompt.encoder_inputs["input_ids"], prompt.encoder_mask


def _as_tree(processor: Processor) -> Processor:
    """A plain function as a tree without leaves; a registered dataclass as it is."""
    leaves = jax.tree.leaves(processor)
    is_leaf = len(leaves) == 1 and leaves[0] is processor
    return jax.tree_util.Partial(processor) if is_leaf else processor
