"""Further rows of `compositions`: models made smaller, with each other and with other methods."""

import functools

import jax
import numpy as np
import optax
from composition_table import composition
from made_up import made, pictures, steps_of_agents, texts

from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.distillation import distilled, with_teacher
from fmjax.methods.distillation_terms import soft_labels
from fmjax.methods.low_rank import factorise
from fmjax.methods.optimizers import lion
from fmjax.methods.pruning import apply_masks, cubic, gradually, masked, n_of_m_masks
from fmjax.methods.quantization import quantization_aware, quantize
from fmjax.methods.spikes import skip_spikes
from fmjax.methods.structured_pruning import remove_heads, remove_units
from fmjax.tasks import causal_lm, sequence_classification


@composition("quantization", "low_rank", "structured_pruning", "lora", on="vit, classification")
def _():
    model, variables = made("vit", "image_classification", layers=1)
    model, variables = remove_heads(model, variables, {"layers_0/attn": [0]})
    thin = factorise(variables, targets=("*/mlp/up",), rank=2)
    kept = quantize(thin, bits=4, group=4, targets=("*/attn/*/kernel",))
    return {
        "variables": lora.add(
            kept, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/up", "*/attn/query")
        ),
        "loss": sequence_classification.loss(model),
        "tx": optax.adam(3e-2),
        "batch": pictures(),
        "is_trainable": is_adapter,
    }


@composition("quantization", "lora", on="llama scanned, language modelling", slow=True)
def _():
    model, variables = made("llama", "causal_lm", scan=True)
    kept = quantize(
        variables, bits=4, group=4, normal=True, targets=("*/kernel", "params/embed/word/*")
    )
    return {
        "variables": lora.add(kept, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/*",)),
        "loss": causal_lm.loss(model),
        "tx": optax.adam(3e-2),
        "batch": texts(labels=False),
        "is_trainable": is_adapter,
    }


@composition("quantization", "pruning", "optimizers", on="mlp, classification")
def _():
    model, variables = made("mlp", "classification")
    seen = steps_of_agents()
    labels = (seen["observations"].sum(axis=1) > 0).astype(np.int32)
    return {
        "variables": variables,
        "loss": quantization_aware(sequence_classification.loss(model), bits=4),
        "tx": gradually(lion(3e-2, weight_decay=0.0), cubic(0.5, steps=8), every=2),
        "batch": {"features": seen["observations"], "labels": labels, "weight": seen["weight"]},
        "steps": 12,
    }


@composition(
    "pruning", "structured_pruning", "distillation", on="bert, text classification", slow=True
)
def _():
    teacher, weights = made("bert", "sequence_classification")
    weights = jax.tree.map(lambda x: 1.5 * x, weights)
    model, variables = remove_heads(teacher, weights, {"layers_0/attn": [1]})
    model, variables = remove_units(model, variables, {"layers_1/mlp": [0, 5, 8, 9]})
    masks = n_of_m_masks(variables)
    plain = functools.partial(sequence_classification.loss, train=False)
    loss = distilled(plain, model, teacher, (0.5, soft_labels(2.0)), hard=0.5)
    return {
        "variables": with_teacher(apply_masks(variables, masks), weights),
        "loss": loss,
        "tx": masked(optax.adamw(1e-2, weight_decay=0.1), masks),
        "batch": texts(),
        "steps": 12,
        "falls_to": None,
    }


@composition("low_rank", "structured_pruning", "spikes", on="vit, image classification", slow=True)
def _():
    model, variables = made("vit", "image_classification")
    model, variables = remove_heads(model, variables, {"layers_0/attn": [0]})
    return {
        "variables": factorise(variables, targets=("*/mlp/*", "layers_1/attn/query"), rank=2),
        "loss": sequence_classification.loss(model),
        "tx": skip_spikes(optax.adam(3e-3)),
        "batch": pictures(),
    }


@composition("low_rank", "lora", on="gpt2, language modelling", slow=True)
def _():
    model, variables = made("gpt2", "causal_lm")
    thin = factorise(variables, targets=("*/mlp/*",), energy=0.8)
    return {
        "variables": lora.add(thin, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/*",)),
        "loss": causal_lm.loss(model),
        "tx": optax.adam(3e-2),
        "batch": texts(labels=False),
        "is_trainable": is_adapter,
    }
