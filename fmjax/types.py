"""The contract: loss -> gradient -> step. Every other file is written in these words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

PyTree = Any
Variables = dict[str, Any]
"""Flax collections as nested dicts: ``{"params": ..., "batch_stats": ..., ...}``."""
Batch = Mapping[str, Array | np.ndarray]
"""Named arrays; every leaf has leading axis B."""
Remat = Literal["none", "dots", "block", "offload"]
"""From the least work to the least memory.

- "none" keeps all that the gradient reads;
- "dots" the products of dense layers and convolutions: what lies between them is computed again,
  and attention's scores, which grow with the square of the length;
- "block" each block's input alone: the whole block is computed again;
- "offload" as "block", and keeps the inputs in the host's memory, from where the gradient fetches
  them. On a CPU, whose memory is the host's, that is "block".
"""


def at_least_float32(dtype: Any) -> Any:
    """float32, or the dtype itself where it is wider: in what sums and small updates are kept."""
    return jnp.promote_types(dtype, jnp.float32)


def one_text(name: str, texts: Any, *, rows: bool = False) -> list[str]:
    """What is wrong where a string stands in a list's place: it would be read by its characters.

    Args:
        name: of the argument.
        texts: what was given for it.
        rows: whether its items are lists of texts too.
    """
    wrong = [name] if isinstance(texts, str) else []
    if rows and not wrong:
        wrong = [f"{name}[{n}]" for n, row in enumerate(texts) if isinstance(row, str)][:1]
    return [f"{where}: one text was given where a list of texts is expected" for where in wrong]


class Mean(NamedTuple):
    """A weighted mean kept as its two sums, so that means of unequal parts combine exactly.

    Args:
        total: weighted sum, float32 [].
        weight: sum of weights (examples, tokens, ...), float32 [].
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array | np.ndarray) -> Mean:
        """The mean of ``values`` under ``weights`` (same shape)."""
        values, weights = jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32)
        # A row of weight 0 is padding: whatever was computed there, even nan, must not count.
        return cls(jnp.sum(jnp.where(weights == 0, 0.0, values * weights)), jnp.sum(weights))

    @property
    def value(self) -> Array:
        """total / weight; 0 where nothing was weighed."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)

    def __add__(self, other: Mean) -> Mean:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Mean(self.total + other.total, self.weight + other.weight)


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Args:
        weight: what the loss is a mean over (examples, tokens), float32 []; it is how losses and
            gradients of parts are averaged.
        metrics: further means to log.
        updates: new values of mutable collections (``batch_stats``); ``{}`` if there are none.
    """

    weight: Array
    metrics: dict[str, Mean]
    updates: Variables


class LossFn(Protocol):
    """(variables, batch, rng) -> (loss, Aux): the mean loss over the batch, float32 []."""

    def __call__(
        self, variables: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Array, Aux]: ...


class GradFn(Protocol):
    """(trainable, non_trainable, batch, rng) -> (grads, loss, Aux); grads shaped as trainable."""

    def __call__(
        self, trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, and arrays only: Orbax saves and restores it as it is.

    Args:
        step: steps done, int32 [].
        trainable: what is differentiated and updated.
        non_trainable: what the loss reads besides: frozen weights, teacher, batch statistics.
        opt_state: the Optax state over ``trainable``.
        rng: typed base key; it never changes: step t uses ``fold_in(rng, t)``, so resuming is
            exact.
    """

    step: Array
    trainable: Variables
    non_trainable: Variables
    opt_state: optax.OptState
    rng: Array


StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Mean]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a model returns, under Hugging Face's names; a field is None where it does not apply.

    Args:
        logits: float32; [B, C] per example, [B, T, C] per token, [B, X, Y, C] per pixel,
            [B, T, V] over the vocabulary.
        last_hidden_state: [B, T, D].
        state_mask: bool [B, T], which of them are no padding (of encoder-decoders: which of the
            encoder's), where states are not one for each place of the inputs' mask.
        pooler_output: [B, D].
        prediction_logits: [B, T, V], pretraining head.
        seq_relationship_logits: [B, 2], pretraining head.
        sop_logits: [B, 2], sentence order.
        mc_logits: [B, N], which of N choices, beside the vocabulary's logits.
        start_logits, end_logits: [B, T], question answering.
        cls_logits, distillation_logits: [B, C], of the class and the distillation token.
        auxiliary_logits: as `logits`, of heads at earlier layers that training counts besides.
        pred_boxes: [B, N, 4], of N objects: centre, width and height as shares of the image.
        auxiliary_boxes: [B, N, 4] each, of the layers of `auxiliary_logits`.
        intermediate_hidden_states: [L, B, N, D], normed, of a decoder of objects.
        extract_features: [B, T, C], normed, of a speech encoder's convolutions.
        projected_states, projected_quantized_states: [B, T, D'], what predicts and what is to be
            predicted in the pretraining of speech encoders.
        codevector_perplexity: [], of the codebooks' use.
        embeddings: [B, D'], of speakers.
        cosines: [B, C], of the angles between a speaker's logits and each label's direction.
        logit_lengths: int [B], how many of the T frames are of each example, where its logits are
            scores of a symbol at each frame (CTC).
        ctc_logits: [B, S, V], such scores of an encoder, where `logits` are its decoder's.
        reconstruction: [B, X, Y, C], pixels of images that were partly masked.
        mask: [B, N], 1 for patches that the encoder did not see.
        ids_restore: int [B, N], where each patch stands in the order in which the seen ones come
            first.
        hidden_states: L + 1 arrays [B, T, D], embeddings first, when asked for.
        reshaped_hidden_states: the same as images [B, X, Y, D], of models whose states shrink.
        attentions: L arrays [B, H, T, S] of probabilities, when asked for.
        cross_attentions: the same over the encoder's states.
        encoder_last_hidden_state: [B, S, D]; in encoder-decoders the fields without "encoder" are
            the decoder's.
        encoder_hidden_states, encoder_attentions: as `hidden_states` and `attentions`.
        image_embeds, text_embeds: [B, D], of pairs in one space; of length 1 where the model
            compares them.
        logits_per_image, logits_per_text: float32 [images, texts] and its transpose, how well each
            fits each.
        logit_scale, logit_bias: float32 [], by which cosines become such logits.
        vision_model_output, text_model_output: what the two sides returned.
        router_logits: L arrays [B * T, E], mixture-of-experts models, when asked for.
        cache: keys and values so far, to be passed to the next call, when one was given.
        images: [B, X, Y, C], as a generator or a decoder of images makes them.
        image_location, image_log_scale: [B, X, Y, C], of each pixel's distribution, in the
            family's own units.
        latent_mean, latent_log_variance: [B, Z], of each image's latent variables.
        latents: [B, x, y, D], an image's grid before it is quantised.
        quantised: [B, x, y, D], the nearest vectors of the codebook.
        codes: int [B, x, y], their numbers.
    """

    logits: Array | None = None
    last_hidden_state: Array | None = None
    state_mask: Array | None = None
    pooler_output: Array | None = None
    prediction_logits: Array | None = None
    seq_relationship_logits: Array | None = None
    sop_logits: Array | None = None
    mc_logits: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    cls_logits: Array | None = None
    distillation_logits: Array | None = None
    auxiliary_logits: tuple[Array, ...] | None = None
    pred_boxes: Array | None = None
    auxiliary_boxes: tuple[Array, ...] | None = None
    intermediate_hidden_states: Array | None = None
    extract_features: Array | None = None
    projected_states: Array | None = None
    projected_quantized_states: Array | None = None
    codevector_perplexity: Array | None = None
    embeddings: Array | None = None
    cosines: Array | None = None
    logit_lengths: Array | None = None
    ctc_logits: Array | None = None
    reconstruction: Array | None = None
    mask: Array | None = None
    ids_restore: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    reshaped_hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    image_embeds: Array | None = None
    text_embeds: Array | None = None
    logits_per_image: Array | None = None
    logits_per_text: Array | None = None
    logit_scale: Array | None = None
    logit_bias: Array | None = None
    vision_model_output: Output | None = None
    text_model_output: Output | None = None
    router_logits: tuple[Array, ...] | None = None
    cache: PyTree = None
    images: Array | None = None
    image_location: Array | None = None
    image_log_scale: Array | None = None
    latent_mean: Array | None = None
    latent_log_variance: Array | None = None
    latents: Array | None = None
    quantised: Array | None = None
    codes: Array | None = None
