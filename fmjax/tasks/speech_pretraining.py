"""Pretraining of speech encoders by contrast (Baevski et al. 2020, arXiv:2006.11477, section 3):
of a masked frame its quantised features are to be told from those of other masked frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.nn.spans import draw_spans
from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.masking import row_keys
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def draw_negatives(rng: Array, masked: Array, count: int) -> Array:
    """For each masked frame others of the same row's masked ones, uniformly: int [T, K].

    Frames that are not masked, and rows with less than two masked frames, get frames that are to be
    ignored.

    Args:
        rng: a typed key.
        masked: bool [T].
        count: K.
    """
    total = masked.sum()
    rank = jnp.cumsum(masked) - 1  # [T], the number of each among the masked ones
    places = jnp.argsort(~masked, stable=True)  # the masked frames first
    drawn = jax.random.uniform(rng, (len(masked), count))
    drawn = jnp.floor(drawn * (total - 1)).astype(jnp.int32)
    drawn = jnp.clip(drawn, 0, jnp.maximum(total - 2, 0))
    drawn = drawn + (drawn >= rank[:, None])  # never the frame itself
    return jnp.take(places, drawn, mode="clip")


def contrast(
    states: Array, targets: Array, negatives: Array, *, temperature: float
) -> tuple[Array, Array]:
    """-log of the share of each frame's own target among it and others (eq. 3), in nats.

    Others that are the same vector as the target do not count.

    Args:
        states: [B, T, D], what predicts.
        targets: [B, T, D], quantised.
        negatives: int [B, T, K], frames of the same row.
        temperature: cosines are divided by it.

    Returns:
        (float32 [B, T], whether the own target is the nearest, bool [B, T]).
    """
    states, targets = states.astype(jnp.float32), targets.astype(jnp.float32)
    lengths = (
        jnp.linalg.norm(states, axis=-1)[:, :, None] * jnp.linalg.norm(targets, axis=-1)[:, None]
    )
    # All pairs of frames are fewer numbers than the vectors of all negatives.
    cosines = jnp.einsum("BTD,BSD->BTS", states, targets) / jnp.maximum(lengths, 1e-8)
    own = jnp.diagonal(cosines, axis1=1, axis2=2)[..., None]
    others = jnp.take_along_axis(cosines, negatives, axis=2)  # [B, T, K]
    marks = _marks(targets)
    of_others = jax.vmap(lambda row, places: row[places])(marks, negatives)
    others = jnp.where(of_others == marks[..., None], -jnp.inf, others)
    logits = jnp.concatenate([own, others], axis=-1) / temperature
    losses = -jax.nn.log_softmax(logits, axis=-1)[..., 0]
    return losses, own[..., 0] > others.max(axis=-1)


def _marks(vectors: Array) -> Array:
    """A number for each vector, by which equal ones are known: uint32 [B, T].

    A sum of their bits times odd numbers, which different ones share once in 2^32 pairs.
    """
    odd = np.random.default_rng(0).integers(0, 2**31, vectors.shape[-1]) * 2 + 1
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(vectors), jnp.uint32)
    return jnp.sum(bits * jnp.asarray(odd.astype(np.uint32)), axis=-1, dtype=jnp.uint32)


def loss(
    model: Any,
    *,
    train: bool = True,
    mask_probability: float = 0.65,
    mask_length: int = 10,
    least_spans: int = 2,
) -> LossFn:
    """Contrastive loss, a mean over masked frames (nats), and a penalty for unused codevectors.

    The penalty is ``diversity_loss_weight`` times the share of codevectors that the batch's mean
    choice lacks (eq. 4, as transformers computes it): it is of a batch as a whole, and so not the
    mean of its parts' where gradients are accumulated. ``num_negatives`` and
    ``contrastive_logits_temperature`` are the config's. A batch has ``input_values`` [B, T] and,
    for models with layer norms, ``attention_mask``; ``weight`` [B]; and, while the quantiser's
    temperature falls, ``gumbel_temperature`` [B] (see `annealed`). Without a key, masks and
    negatives are those of the example's ``index``.

    Args:
        model: with the head ``pretraining``.
        train: whether dropout and the quantiser's draws are on.
        mask_probability: share of frames that spans would cover if none overlapped; the paper's
            p = 0.065 of all frames that begin one.
        mask_length: frames of a span.
        least_spans: spans that a row has at least.

    Raises:
        ValueError: a model that masks nothing, or makes its states fewer.
    """
    config, apply = model.config, apply_fn(model)
    problems = []
    if not config.apply_spec_augment or config.mask_time_prob == config.mask_feature_prob == 0:
        problems.append(
            "the model masks no frames: it needs apply_spec_augment and mask_time_prob above 0"
        )
    if config.add_adapter:
        problems.append("add_adapter makes states fewer than the frames they are compared with")
    if not 0 < mask_probability <= 1 or mask_length < 1:
        problems.append(
            f"mask_probability={mask_probability} must be above 0 and at most 1, and "
            f"mask_length={mask_length} positive"
        )
    if problems:
        raise ValueError("speech pretraining: " + "; ".join(problems))
    codes = config.num_codevector_groups * config.num_codevectors_per_group

    def masks(batch: Batch, rng: Array | None) -> tuple[Array, Array]:
        """Which frames are masked [B, T], and each one's negatives [B, T, K]."""
        samples = jnp.asarray(batch["input_values"]).shape
        frames = model.frames(samples[1])
        kept = jnp.asarray(batch.get("attention_mask", jnp.ones(samples, jnp.int32)))
        lengths = model.frames(kept.sum(axis=1))
        keys = row_keys(rng, batch, 0)

        def row(key: Array, length: Array) -> tuple[Array, Array]:
            span_key, negative_key = jax.random.split(key)
            masked = draw_spans(
                span_key,
                length[None],
                frames,
                probability=mask_probability,
                length=mask_length,
                least=least_spans,
            )[0]
            return masked, draw_negatives(negative_key, masked, config.num_negatives)

        return jax.vmap(row)(keys, lengths)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        mask_key, model_key = (None, None) if rng is None else jax.random.split(rng)
        masked, negatives = masks(batch, mask_key)
        weights = row_weights(batch, len(masked))
        masked = masked & (weights > 0)[:, None]  # padding rows do not count for the perplexity
        output, updates = apply(
            variables, {**batch, "mask_time_indices": masked}, model_key, train=train
        )
        states, targets = output.projected_states, output.projected_quantized_states
        perplexity = output.codevector_perplexity
        assert states is not None
        assert targets is not None
        assert perplexity is not None
        each, nearest = contrast(
            states, targets, negatives, temperature=config.contrastive_logits_temperature
        )
        counted = masked * weights[:, None]
        mean = Mean.of(each, counted)
        diversity = (codes - perplexity) / codes
        metrics = {
            "contrastive": mean,
            "accuracy": Mean.of(nearest, counted),
            "perplexity": Mean.of(perplexity, mean.weight),
        }
        total = mean.value + config.diversity_loss_weight * diversity
        return total, Aux(mean.weight, metrics, updates)

    return loss_fn


def annealed(
    batches: Iterable[Batch],
    *,
    start: float = 2.0,
    end: float = 0.5,
    decay: float = 0.999995,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Batches with the quantiser's temperature, which falls by a factor a step (section 4.2).

    Args:
        batches: of training, in their order.
        start: the temperature of step 0.
        end: the least one; the paper's is 0.5 for the base model and 0.1 for the large one.
        decay: the factor.
        first: the step that the first of these batches is for, where a run goes on.
    """
    for step, batch in enumerate(batches, first):
        rows = len(next(iter(batch.values())))
        heat = max(start * decay**step, end)
        yield {**batch, "gumbel_temperature": np.full(rows, heat, np.float32)}
