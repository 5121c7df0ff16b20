"""Pictures and texts in one space: trained by contrast, for retrieval and for classes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.metrics.retrieval import retrieval_metrics
from fmjax.nn.norm import unit_length
from fmjax.tasks.apply import apply_fn, collect, once, row_weights
from fmjax.tasks.contrast import sigmoid_contrast, softmax_contrast
from fmjax.types import Aux, Batch, LossFn, Variables

OBJECTIVES = ("softmax", "sigmoid")
SIDES = {
    "image": ("pixel_values", "image_features"),
    "text": (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "text_features",
    ),
}
MOST_SCALE = 4.605170186
"""log 100, which CLIP's training keeps the parameter ``logit_scale`` below (Radford et al. 2021,
section 2.5): ``fmjax.train.optim.bounded({"params/logit_scale": (0.0, MOST_SCALE)})``."""


def loss(
    model: Any,
    *,
    objective: str | None = None,
    axis_name: str | None = None,
    train: bool = True,
) -> LossFn:
    """Contrast (nats) of a batch's pictures and texts, in both directions.

    "softmax" is CLIP's (Radford et al. 2021, arXiv:2103.00020, figure 3), which tells each
    picture's text from the others and each text's picture; "sigmoid" is SigLIP's (Zhai et al.
    2023, arXiv:2303.15343, equation 1), which judges each pair by itself. See
    `fmjax.tasks.contrast`.

    A batch has ``pixel_values`` [B, X, Y, C] and ``input_ids`` and ``attention_mask`` [B, T], or
    ``image_features`` and ``text_features`` [B, D] of an encoder that is not trained (`features`);
    ``weight`` [B]. With ``labels`` int [B], rows of the same label, such as pictures of one name,
    are not told apart.

    More examples are more negatives: accumulated over pieces, each sees those of its own; over
    devices all are seen, under a sharded `jit` as under `pmap` with its axis' name.

    Args:
        model: with the head ``model``, of CLIP, SigLIP or a pair of encoders.
        objective: "softmax", "sigmoid", or None for what the model is made for: "sigmoid" if it has
            a bias of its logits.
        axis_name: of the axis that `pmap` or `shard_map` maps the batch over, if one does.
        train: whether dropout is on.

    Raises:
        ValueError: an unknown objective; or, when called, a model without a scale or bias.
    """
    if objective is not None and objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; it must be one of {OBJECTIVES} or None")
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        _check_sides(batch, ("image", "text"))
        out, updates = apply(variables, batch, rng, train=train)
        if out.image_embeds is None or out.text_embeds is None or out.logit_scale is None:
            raise ValueError(
                f"the model has the head {model.head!r}, which compares no pictures with texts; "
                'load it with head="model"'
            )
        images, texts = out.image_embeds, out.text_embeds
        common = {
            "scale": out.logit_scale,
            "weights": row_weights(batch, images.shape[0]),
            "labels": jnp.asarray(batch["labels"]) if "labels" in batch else None,
            "axis_name": axis_name,
        }
        chosen = objective or ("softmax" if out.logit_bias is None else "sigmoid")
        if chosen == "softmax":
            result = softmax_contrast(images, texts[:, None], symmetric=True, **common)
        elif out.logit_bias is None:
            raise ValueError("the model has no bias of its logits, which a sigmoid needs")
        else:
            result = sigmoid_contrast(images, texts, bias=out.logit_bias, **common)
        return result.loss, Aux(result.weight, {"accuracy": result.accuracy}, updates)

    return loss_fn


def _check_sides(batch: Batch, sides: Sequence[str]) -> None:
    first = {
        "image": ("pixel_values", "image_features"), "text": ("input_ids", "text_features")
    }  # fmt: skip
    missing = [" or ".join(first[side]) for side in sides if not set(first[side]) & set(batch)]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}; it has {sorted(batch)}")


def features(model: Any, *, side: str) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, D]``: what a batch may have as ``image_features`` (side "image")
    or ``text_features`` ("text"), in place of what it is made of."""
    names, method = {
        "image": (("pixel_values",), "pooled_images"),
        "text": (("input_ids", "attention_mask"), "pooled_texts"),
    }[side]

    def encode(variables: Variables, batch: Batch) -> Array:
        given = [jnp.asarray(batch[name]) for name in names]
        return model.apply(variables, *given, method=method)

    return encode


def predict(model: Any, *, side: str) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, D]`` float32: vectors of length 1 of one side of the batch.

    Args:
        model: with the head ``model``.
        side: "image" or "text"; what the batch has of the other is not read.

    Raises:
        ValueError: an unknown side.
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; it must be one of {list(SIDES)}")
    apply = apply_fn(model)

    def embed(variables: Variables, batch: Batch) -> Array:
        _check_sides(batch, (side,))
        inputs = {name: value for name, value in batch.items() if name in SIDES[side]}
        out, _ = apply(variables, inputs, None, train=False)
        vectors = out.image_embeds if side == "image" else out.text_embeds
        if vectors is None:
            raise ValueError(f"the head {model.head!r} has no vectors of the side {side!r}")
        return unit_length(vectors)

    return embed


def class_vectors(prompts: Any, classes: Any, count: int) -> Array:
    """What stands for each class: the mean of its prompts' vectors, of length 1 again.

    Radford et al. 2021, section 3.1.4: an ensemble over prompts, in the space of the vectors, costs
    no more than one prompt once it is made.

    Args:
        prompts: [N, D], vectors of length 1, of all classes' prompts.
        classes: int [N], the class that each is of.
        count: C.

    Returns:
        [C, D] float32.

    Raises:
        ValueError: classes without a prompt, or outside the count.
    """
    classes = np.asarray(classes)
    without = sorted(set(range(count)) - set(classes.tolist()))
    outside = sorted(set(classes.tolist()) - set(range(count)))
    if without or outside:
        raise ValueError(
            f"of {count} classes {without} have no prompt, and prompts are of {outside}, which "
            "there are not"
        )
    sums = jax.ops.segment_sum(jnp.asarray(prompts, jnp.float32), jnp.asarray(classes), count)
    return unit_length(sums)


def classify(model: Any, *, logit_scale: float = 100.0) -> Callable[..., Array]:
    """``(variables, batch, classes) -> [B, C]`` float32: logits of classes that are given by name.

    Args:
        model: with the head ``model``.
        logit_scale: of the cosines; 100 is what CLIP ended with. It says how sure the model is, and
            changes no order.
    """
    embed = predict(model, side="image")

    def logits(variables: Variables, batch: Batch, classes: Array) -> Array:
        return logit_scale * (embed(variables, batch) @ jnp.asarray(classes, jnp.float32).T)

    return logits


def evaluate(
    model: Any,
    variables: Variables,
    images: Iterable[Batch],
    texts: Iterable[Batch],
    captions: Sequence[Sequence[int]],
    *,
    num_texts: int,
    cutoffs: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """How well each picture finds its texts among all, and each text its pictures.

    Args:
        model: with the head ``model``.
        variables: the model's.
        images: one epoch of P pictures.
        texts: one epoch of N texts.
        captions: for each picture the numbers of its texts.
        num_texts: N.
        cutoffs: the k of the metrics.

    Returns:
        See `retrieval_metrics`; "image_to_text/recall@1", "text_to_image/recall@1", ...
    """
    pictures = jax.jit(once(predict, model, side="image"))
    names = jax.jit(once(predict, model, side="text"))
    return both_ways(
        collect(pictures, variables, images, size=len(captions)),
        collect(names, variables, texts, size=num_texts),
        captions,
        cutoffs=cutoffs,
    )


def both_ways(
    images: Any,
    texts: Any,
    captions: Sequence[Sequence[int]],
    *,
    cutoffs: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """The same of vectors: [P, D] of pictures and [N, D] of texts."""
    pictures: list[list[int]] = [[] for _ in range(len(texts))]
    for picture, numbers in enumerate(captions):
        for number in numbers:
            if 0 <= number < len(pictures):  # others are refused below
                pictures[number].append(picture)
    return {
        f"{direction}/{name}": value
        for direction, scores in (
            ("image_to_text", retrieval_metrics(images, texts, captions, cutoffs=cutoffs)),
            ("text_to_image", retrieval_metrics(texts, images, pictures, cutoffs=cutoffs)),
        )
        for name, value in scores.items()
    }
