"""Policy gradients of language models: what their losses share, token by token.

A batch has R rows of a prompt of P columns (padded on the left) and a response of N columns:
``input_ids`` and ``attention_mask`` int [R, P + N]; ``response_mask`` [R, N], 1 for what was drawn,
the end included; ``log_probs`` [R, N], of the policy that drew it; perhaps
``reference_log_probs`` [R, N]; and perhaps ``weight`` [R]. They are made by
`fmjax.methods.sampled_responses`.

Of encoder-decoders the source is the prompt: ``pixel_values``, ``input_values``,
``input_features`` or ``input_ids`` and perhaps their ``attention_mask``, as the model takes them,
and ``decoder_input_ids`` int [R, P + N], the tokens that the decoder starts with and the response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from fmjax.generate.inputs import SOURCES, is_encoder_decoder
from fmjax.methods.advantages import generalised_advantages
from fmjax.methods.policies import entropy, log_probability
from fmjax.methods.preference import policy_of
from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.causal_lm import first_position
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE, over_vocabulary, unembed_fn
from fmjax.types import Batch, Variables

ATTACHES = ("loss",)


class Scores(NamedTuple):
    """What a model says of responses.

    Args:
        log_probs: float32 [R, N] of each token given those before it, in nats.
        entropy: float32 [R, N] of the distributions they were drawn from, in nats.
        hidden: [R, N, D], the states that predict them.
    """

    log_probs: Array
    entropy: Array
    hidden: Array


def response_scores(
    model: Any, *, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> Callable[[Variables, Batch], Scores]:
    """``(variables, batch) -> Scores``, without dropout: the policy that drew had none either.

    Args:
        model: a decoder with the head ``causal_lm``, or an encoder-decoder with ``seq2seq_lm``.
        temperature: divides the logits, as when the responses were drawn.
        chunk_size: see `fmjax.tasks.vocabulary_loss`; only what predicts responses gets logits.
    """
    apply, both = apply_fn(model, output_logits=False), is_encoder_decoder(model)

    def of_tokens(logits: Array, tokens: Array) -> tuple[Array, Array]:
        scaled = logits / temperature
        return log_probability(scaled, tokens), entropy(scaled)

    def score(variables: Variables, batch: Batch) -> Scores:
        ids = jnp.asarray(batch["decoder_input_ids" if both else "input_ids"])
        count = batch["response_mask"].shape[1]
        first = ids.shape[1] - count  # P
        if both:
            inputs = {name: batch[name] for name in (*SOURCES, "attention_mask") if name in batch}
            inputs["decoder_input_ids"] = ids
        else:
            mask = jnp.asarray(batch["attention_mask"])
            positions = first_position(model) + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        policy = policy_of(variables)
        hidden = apply(policy, inputs, None, train=False)[0].last_hidden_state
        assert hidden is not None
        hidden = hidden[:, first - 1 : -1]  # [R, N, D]
        log_probs, spread = over_vocabulary(
            unembed_fn(model, policy), of_tokens, hidden, ids[:, first:], chunk_size=chunk_size
        )
        return Scores(log_probs, spread, hidden)

    return score


def token_weights(batch: Batch) -> Array:
    """float32 [R, N]: the row's weight where a token was drawn, else 0."""
    mask = jnp.asarray(batch["response_mask"], jnp.float32)
    return mask * row_weights(batch, len(mask))[:, None]


def log_ratio(log_probs: Array, old: Array, weights: Array) -> Array:
    """[R, N]: log(policy / the policy that drew), 0 where nothing was drawn.

    There a ratio may be anything, and infinity times 0 is nan.
    """
    return jnp.where(weights > 0, log_probs - old, 0.0)


def clipped_losses(log_ratio: Array, advantages: Array, low: float, high: float) -> Array:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with the ratio r of probabilities.

    Schulman et al. 2017, arXiv:1707.06347, equation 7; with a bound of its own on each side as in
    Yu et al. 2025 (DAPO), arXiv:2503.14476, equation 10. At r = 1 the gradient is -A times that of
    the log-probability: the policy gradient.

    Args:
        log_ratio: [...], in nats.
        advantages: [...], constants.
        low, high: how far the ratio may fall and rise before the gradient vanishes.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def is_clipped(log_ratio: Array, advantages: Array, low: float, high: float) -> Array:
    """bool: where the clipping of `clipped_losses` takes the gradient away."""
    ratio = jnp.exp(log_ratio)
    rises, falls = (advantages > 0) & (ratio > 1 + high), (advantages < 0) & (ratio < 1 - low)
    return rises | falls


def reverse_kl(log_probs: Array, reference: Array) -> Array:
    """r - log r - 1 with r = reference / policy, in nats: never negative.

    An unbiased estimate, for tokens that the policy drew, of KL(policy || reference) (Schulman
    2020's k3; Shao et al. 2024, arXiv:2402.03300, equation 4).
    """
    difference = reference - log_probs
    return jnp.expm1(difference) - difference


def response_advantages(
    rewards: Array, values: Array, mask: Array, *, discount: float, trace: float
) -> tuple[Array, Array]:
    """`fmjax.methods.advantages.generalised_advantages` of responses, after which comes nothing.

    Args:
        rewards: [R, N], of the step that chose each token.
        values: [R, N], expected before each token.
        mask: [R, N], 1 for tokens.
        discount, trace: gamma and lambda.

    Returns:
        (advantages [R, N], returns [R, N]: advantage plus value), 0 where there is no token.
    """
    mask = jnp.asarray(mask, jnp.float32)
    advantages = generalised_advantages(
        rewards.T,
        jnp.pad(values.T, ((0, 1), (0, 0))),
        jnp.full(rewards.T.shape, discount),
        trace,
        mask=mask.T,
    ).T
    return advantages, advantages + values * mask


def bound_problems(low: float, high: float) -> list[str]:
    """What is wrong with the bounds of a ratio."""
    problems = []
    if not 0 < low < 1:
        problems.append(f"the lower clip is {low}; it must be in (0, 1)")
    if not high > 0:
        problems.append(f"the upper clip is {high}; it must be positive")
    return problems
