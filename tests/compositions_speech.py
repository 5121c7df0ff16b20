"""Further rows of `compositions`: methods on tasks that hear."""

import functools

import jax
import numpy as np
import optax
from composition_table import composition
from made_up import B, rounds

import fmjax
from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.distillation import distilled, with_teacher
from fmjax.methods.distillation_terms import same_hidden_states
from fmjax.methods.federated import client_update, pseudo_gradient
from fmjax.methods.mean_teacher import mean_teacher
from fmjax.methods.optimizers import lion
from fmjax.methods.privacy import private_gradient
from fmjax.models import wav2vec2
from fmjax.tasks import ctc, speech_pretraining
from fmjax.train import gradient

# Norms over features: a norm over time, before masks, would make padding count.
SMALL = wav2vec2.sized(
    wav2vec2.Config, 1, 8, 2, vocab_size=5, conv_dim=(6, 6), conv_kernel=(4, 3), conv_stride=(4, 2),
    num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.1,
    mask_time_length=2, mask_time_min_masks=0, initializer_range=0.3, num_codevectors_per_group=4,
    codevector_dim=6, proj_codevector_dim=6, num_negatives=3, **wav2vec2.STABLE,
)  # fmt: skip


@functools.cache
def hears(head):
    """A tiny model of sounds and its variables."""
    return fmjax.create("wav2vec2", SMALL, head=head, rng=jax.random.key(0))


def sounds():
    """Three tones after each other, each of them a symbol; the last rows are shorter."""
    draw = np.random.default_rng(0)
    labels = draw.integers(1, 5, (B, 3))
    time = np.arange(32)
    waves = np.sin(2 * np.pi * time * labels[..., None] / 16)  # [B, 3, 32]
    values = waves.reshape(B, 96) + draw.normal(size=(B, 96)) * 0.05
    mask = np.ones((B, 96), np.int32)
    mask[B // 2 :, 64:] = 0
    labels[B // 2 :, 2] = -100
    return {
        "input_values": (values * mask).astype(np.float32), "attention_mask": mask,
        "labels": labels, "weight": np.ones(B, np.float32),
    }  # fmt: skip


@composition("lora", "adapted_layers", "privacy", on="wav2vec2, CTC")
def _():
    model, variables = hears("ctc")
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": ctc.loss(model, reduction="mean"),
        "tx": optax.adam(3e-2),
        "batch": sounds(),
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "differentiate": lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.01, expected_batch_size=B, microbatch_size=4
        ),
        "steps": 12,
    }


@composition("federated", "optimizers", on="wav2vec2, CTC", slow=True)
def _():
    model, variables = hears("ctc")
    return {
        "variables": variables,
        "loss": ctc.loss(model),
        "tx": lion(1e-2),
        "batch": rounds(sounds()),
        "differentiate": lambda loss: pseudo_gradient(
            client_update(loss, optax.adam(1e-2)), clients_at_once=2
        ),
        "steps": 12,
    }


@composition("distillation", "mean_teacher", on="wav2vec2, CTC", slow=True)
def _():
    model, variables = hears("ctc")
    teacher = jax.tree.map(lambda x: 1.2 * x, variables)
    loss = distilled(ctc.loss, model, model, (0.5, same_hidden_states({1: 1})), hard=0.5)
    return {
        "variables": with_teacher(variables, teacher),
        "loss": loss,
        "tx": optax.adam(1e-2),
        "batch": sounds(),
        "differentiate": lambda loss: mean_teacher(gradient(loss), 0.9),
        "changes": ("teacher/",),
        "steps": 12,
    }


@composition("lora", "privacy", on="wav2vec2, contrastive pretraining", slow=True)
def _():
    model, variables = hears("pretraining")
    batch = {name: value for name, value in sounds().items() if name != "labels"}
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": speech_pretraining.loss(model, mask_length=2, mask_probability=0.5),
        "tx": optax.adam(3e-2),
        "batch": batch,
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "differentiate": lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.01, expected_batch_size=B, microbatch_size=4
        ),
        "steps": 24,
        "falls_to": None,
    }
