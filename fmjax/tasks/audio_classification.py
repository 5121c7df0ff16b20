"""Classification of sounds: of whole clips, of frames, and of speakers by their voices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks import sequence_classification, token_classification
from fmjax.tasks.apply import apply_fn
from fmjax.tasks.masking import weigh
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

CLIPS, FRAMES, SPEAKERS = "sequence_classification", "audio_frame_classification", "xvector"


def check_head(model: Any) -> str:
    """The model's head, which must be one of the three.

    Raises:
        ValueError: it is another.
    """
    if model.head not in (CLIPS, FRAMES, SPEAKERS):
        raise ValueError(
            f"sounds are classified by the heads {CLIPS!r}, {FRAMES!r} and {SPEAKERS!r}; the "
            f"model has {model.head!r}"
        )
    return model.head


def loss(model: Any, *, train: bool = True, label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy (nats), a mean over clips or frames; of speakers, see `speaker_loss`.

    A batch has ``labels``: as `sequence_classification.loss` has them for clips; int [B, T], -100
    for frames that do not count, for frames; int [B], -100 for rows that do not, for speakers.

    Args:
        model: with one of the three heads.
        train: whether dropout is on.
        label_smoothing: share of probability spread over all classes; not for speakers.

    Raises:
        ValueError: another head, or a value out of range.
    """
    head = check_head(model)
    if head == CLIPS:
        return sequence_classification.loss(model, train=train, label_smoothing=label_smoothing)
    if head == FRAMES:
        return token_classification.loss(model, train=train, label_smoothing=label_smoothing)
    if label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} is not for the loss of speakers")
    return speaker_loss(model, train=train)


def speaker_loss(
    model: Any, *, train: bool = True, scale: float = 30.0, margin: float = 0.4
) -> LossFn:
    """Cross-entropy of cosines with a margin (Wang et al. 2018, arXiv:1801.05599, eq. 5).

    Each speaker has a direction; the cosine to the true one counts less by the margin.

    Args:
        model: with the head ``xvector``; ``id2label`` are the speakers.
        train: whether dropout is on.
        scale: of the cosines; PyTorch's is 30.
        margin: PyTorch's is 0.4.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        cosines, labels = output.cosines, jnp.asarray(batch["labels"])  # [B, C]
        if cosines is None:
            raise ValueError(f"the loss of speakers needs the head {SPEAKERS!r}")
        own = jax.nn.one_hot(labels, cosines.shape[-1])
        losses = sequence_classification.class_losses(scale * (cosines - margin * own), labels)
        weights = weigh(batch, labels)
        mean = Mean.of(losses, weights)
        accuracy = Mean.of(jnp.argmax(cosines, axis=-1) == labels, weights)
        return mean.value, Aux(mean.weight, {"accuracy": accuracy}, updates)

    return loss_fn


def embed(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> float32 [B, D]``: each voice's vector, of length 1.

    Two voices are the same speaker's where the product of their vectors, the cosine, is above a
    threshold: see `fmjax.metrics.verification.equal_error_rate`.
    """
    apply = apply_fn(model)

    def embed_fn(variables: Variables, batch: Batch) -> Array:
        vectors = apply(variables, batch, None, train=False)[0].embeddings
        if vectors is None:
            raise ValueError(f"vectors of speakers need the head {SPEAKERS!r}")
        vectors = vectors.astype(jnp.float32)
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

    return embed_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> float32``: probabilities of clips' classes [B, C] or of frames'
    [B, T, C]; of speakers their cosines [B, C].
    """
    head = check_head(model)
    if head == CLIPS:
        return sequence_classification.predict(model)
    if head == FRAMES:
        return token_classification.predict(model)
    return functools.partial(_cosines, apply_fn(model))


def _cosines(apply: Any, variables: Variables, batch: Batch) -> Array:
    cosines = apply(variables, batch, None, train=False)[0].cosines
    assert cosines is not None
    return cosines
