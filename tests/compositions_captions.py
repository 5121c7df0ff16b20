"""Further rows of `compositions`: pictures and texts in one model."""

import dataclasses

import jax
import numpy as np
import optax
from composition_table import composition
from made_up import B, T, V, made, pictures, texts

import fmjax
from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.distillation import distilled, with_teacher
from fmjax.methods.distillation_terms import soft_labels
from fmjax.methods.privacy import private_gradient
from fmjax.methods.selection import layerwise_decay
from fmjax.models import fusion, vision_encoder_decoder
from fmjax.tasks import seq2seq, sequence_classification


@composition("lora", "adapted_layers", "privacy", on="vit and gpt2, captions", slow=True)
def _():
    image, _ = made("vit", "image_classification")
    text, _ = made("gpt2", "causal_lm")
    config = vision_encoder_decoder.Config(
        image.config,
        dataclasses.replace(text.config, add_cross_attention=True),
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    model, variables = fmjax.create(
        "vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0)
    )
    # Light pictures are of the upper half of the vocabulary.
    seen = pictures()
    words = np.random.default_rng(1).integers(2, V // 2, (B, T))
    batch = seen | {"labels": words + seen["labels"][:, None] * (V // 2 - 2)}
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=16.0),
        "loss": seq2seq.loss(model),
        "tx": optax.adam(3e-2),
        "batch": batch,
        "is_trainable": is_adapter,
        "differentiate": lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.01, expected_batch_size=B, microbatch_size=4
        ),
        "steps": 16,
        "falls_to": None,
    }


@composition("distillation", "selection", on="bert and vit fused, classification", slow=True)
def _():
    text, _ = made("bert", "sequence_classification")
    image, _ = made("vit", "image_classification")
    parts = {
        name: dataclasses.replace(model.config, add_pooling_layer=False)
        for name, model in (("text", text), ("image", image))
    }
    config = fusion.Config(
        tuple(parts.items()), num_hidden_layers=1, hidden_size=8, num_attention_heads=2,
        intermediate_size=12, initializer_range=0.3,
    )  # fmt: skip
    model, variables = fmjax.create("fusion", config, head="classification", rng=jax.random.key(0))
    teacher = jax.tree.map(lambda x: 1.5 * x, variables)
    present = np.ones((B, 2), np.int32)
    present[::3, 1] = 0  # some have no picture
    return {
        "variables": with_teacher(variables, teacher),
        "loss": distilled(
            sequence_classification.loss, model, model, (0.5, soft_labels(2.0)), hard=0.5
        ),
        "tx": optax.chain(optax.adam(1e-2), layerwise_decay(0.8, variables)),
        "batch": pictures() | texts() | {"present": present},
        "steps": 12,
    }
