"""Rows of `compositions` whose batches are labelled in part."""

import jax
import optax
from composition_table import composition
from made_up import halves, made, pictures, texts

from fmjax.data.augment import each_image, erase, flip
from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.domain_adaptation import (
    annealed,
    coral,
    dann,
    is_adapted,
    with_domain_classifier,
)
from fmjax.methods.optimizers import lion
from fmjax.methods.partly_labelled import counting, with_progress
from fmjax.methods.selection import bitfit
from fmjax.methods.self_training import fix_match, pseudo_labelled
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.methods.spikes import skip_spikes
from fmjax.tasks import sequence_classification
from fmjax.train import accumulate, gradient, make_mesh


@composition(
    "domain_adaptation",
    "partly_labelled",
    "optimizers",
    on="bert, texts of two domains",
    devices="accumulated",
)
def _():
    model, variables = made("bert", "sequence_classification", layers=1)
    variables = with_domain_classifier(variables, jax.random.key(1), width=8, hidden=(6,))
    return {
        "variables": with_progress(variables),
        "loss": dann(sequence_classification.loss, model, strength=annealed(1000)),
        "tx": lion(1e-2),
        "batch": halves(texts()),
        "is_trainable": is_adapted,
        "differentiate": lambda loss: counting(accumulate(gradient(loss), 2)),
        "changes": ("progress/",),
        "falls_to": None,
    }


@composition(
    "domain_adaptation",
    "partly_labelled",
    "lora",
    on="vit, pictures of two domains",
    devices="data=2",
    slow=True,
)
def _():
    model, variables = made("vit", "image_classification")
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": coral(sequence_classification.loss, model, strength=10.0),
        "tx": optax.adam(3e-2),
        "batch": halves(pictures()),
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "mesh": make_mesh(data=2),
        "falls_to": None,
    }


@composition("self_training", "partly_labelled", "spikes", on="cnn, some with labels")
def _():
    model, variables = made("cnn", "image_classification")
    return {
        "variables": variables,
        "loss": fix_match(
            sequence_classification.loss, model, weak=each_image(flip()),
            strong=each_image(flip(), erase(1.0)), threshold=0.3,
        ),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": halves(pictures()),
        "falls_to": None,
        "steps": 12,
    }  # fmt: skip


@composition(
    "self_training", "sharpness_aware", "selection", on="bert, some with labels", slow=True
)
def _():
    model, variables = made("bert", "sequence_classification")
    return {
        "variables": variables,
        "loss": pseudo_labelled(sequence_classification.loss, model, threshold=0.5),
        "tx": optax.adam(1e-2),
        "differentiate": lambda loss: sharpness_aware(gradient(loss)),
        "batch": halves(texts()),
        "is_trainable": bitfit(variables),
        "falls_to": None,
        "steps": 12,
    }
