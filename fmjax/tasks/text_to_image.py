"""Text to image: one causal model of a text's tokens and then an image's (Ramesh et al. 2021,
arXiv:2102.12092, section 2.2), and drawing from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate import Processor, State, generate
from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.tasks.vocabulary_loss import unembed_fn
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

TEXT_WEIGHT = 1 / 8
"""Of the text's loss; the image's has the rest (section 2.2)."""


def loss(model: Any, *, train: bool = True, text_weight: float = TEXT_WEIGHT) -> LossFn:
    """The cross-entropies of texts' and of images' tokens, each a mean over its own, weighed.

    A token of either kind is told from those of its kind alone. The first token of a text is not
    predicted, nor is padding. Batches have ``input_ids`` int [B, T + N], the padded text's and the
    image's, and ``weight`` [B] or none. Metrics: ``text`` and ``image``, nats a token.

    Args:
        model: a DALL-E with the head ``causal_lm``.
        train: whether dropout is on.
        text_weight: of the text's loss, from 0 to 1.

    Raises:
        ValueError: a weight that is no share.
    """
    if not 0 <= text_weight <= 1:
        raise ValueError(f"text_weight={text_weight} must be from 0 to 1")
    apply, config = apply_fn(model, output_logits=False), model.config
    length = config.text_length

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        ids = jnp.asarray(batch["input_ids"])
        output, updates = apply(variables, {"input_ids": ids}, rng, train=train)
        hidden = output.last_hidden_state  # [B, T + N, D]
        assert hidden is not None
        unembed = unembed_fn(model, variables)
        rows = row_weights(batch, len(ids))
        # Position t predicts token t + 1; the text's last one predicts the image's first.
        texts = unembed(hidden[:, : length - 1])[..., : config.text_vocab_size]
        images = unembed(hidden[:, length - 1 : -1])[..., config.image_start :]
        words = ids[:, 1:length]
        real = (words < config.text_vocab_size) * rows[:, None]
        of_text = _nats(texts, jnp.where(real > 0, words, 0), real)
        codes = ids[:, length:] - config.image_start
        of_image = _nats(images, codes, jnp.broadcast_to(rows[:, None], codes.shape))
        value = text_weight * of_text.value + (1 - text_weight) * of_image.value
        weight = jnp.sum(rows)
        return value, Aux(weight, {"text": of_text, "image": of_image}, updates)

    return loss_fn


def _nats(logits: Array, labels: Array, weights: Array) -> Mean:
    """The cross-entropy of tokens [B, T], logits [B, T, V]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    found = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return Mean.of(-found, weights)


def evaluate(model: Any, variables: Variables, batches: Iterable[Batch]) -> dict[str, float]:
    """The loss and its parts over a whole set.

    Args:
        model: a DALL-E with the head ``causal_lm``.
        variables: its variables.
        batches: one epoch.
    """
    totals = means(once(loss, model, train=False), variables, batches)
    return {name: total.value for name, total in totals.items()}


def image_tokens(config: Any, codes: np.ndarray) -> np.ndarray:
    """Codes int [B, x, y] of an image's tokenizer as ids int32 [B, N].

    Raises:
        ValueError: another grid, or codes that the model has no ids for.
    """
    side = config.grid_size
    if codes.shape[1:] != (side, side):
        raise ValueError(f"images have {codes.shape[1:]} tokens; the model's have {(side, side)}")
    if codes.min() < 0 or codes.max() >= config.image_vocab_size:
        raise ValueError(
            f"codes go from {codes.min()} to {codes.max()}; the model has {config.image_vocab_size}"
        )
    return (codes.reshape(len(codes), -1) + config.image_start).astype(np.int32)


def draw_codes(
    model: Any,
    variables: Variables,
    text_ids: np.ndarray,
    *,
    rng: Array,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Codes of images drawn behind texts: int [B, count, x, y].

    Args:
        model: a DALL-E with the head ``causal_lm``.
        variables: its variables.
        text_ids: int [B, text_length], padded as `fmjax.models.dalle.padded_ids` does it.
        rng: a typed key.
        count: images of each text.
        temperature, top_k, top_p: of the draws; see `fmjax.generate`.
    """
    config = model.config
    out = generate(
        model, variables, text_ids, attention_mask=np.ones_like(text_ids), rng=rng, do_sample=True,
        max_new_tokens=config.image_length, temperature=temperature, top_k=top_k, top_p=top_p,
        num_return_sequences=count, processors=(_from_id(config.image_start),),
    )  # fmt: skip
    side = config.grid_size
    return out.tokens.reshape(len(text_ids), count, side, side) - config.image_start


@functools.cache
def _from_id(first: int) -> Processor:
    """Leaves the ids from `first` on; one function for each, or all would be compiled again."""

    def of_images(logits: Array, state: State) -> Array:
        del state  # the same at every step
        return jnp.where(jnp.arange(logits.shape[-1]) < first, -jnp.inf, logits)

    return of_images
