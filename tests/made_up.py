"""Tiny models and batches that compositions of methods are trained on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import fmjax
from fmjax.methods.policies import actor_critic
from fmjax.tree import together

V, B, T = 20, 8, 6
TEXT = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip


def towers(family):
    """The configs of encoders of texts and pictures of one width."""
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
             "num_hidden_layers": 2}  # fmt: skip
    text, vision = (
        fmjax.models.family_of(f"{family}_{side}_model").Config for side in ("text", "vision")
    )
    end = {"eos_token_id": V - 1} if family == "clip" else {}
    return {
        "text_config": text(**small, **end, vocab_size=V, max_position_embeddings=16),
        "vision_config": vision(**small, image_size=8, patch_size=4, num_channels=1),
    }


@functools.cache
def made(family, head, layers=2, scan=False):
    """A tiny model and its variables."""
    text = {**TEXT, "num_hidden_layers": layers}
    sizes = {
        "bert": text,
        "llama": text | {"num_key_value_heads": 1},
        "gemma": text | {"num_key_value_heads": 1, "head_dim": 4},
        "gpt2": {"vocab_size": V, "n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 16,
                 "initializer_range": 0.3},
        "t5": {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
               "num_decoder_layers": 1, "num_heads": 2},
        "vit": {"hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2,
                "intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_channels": 1,
                "initializer_range": 0.3},
        "cnn": {"image_size": 8, "hidden_sizes": (4, 6), "pooled_size": 2, "dense_sizes": (10,)},
        "clip": towers("clip"),
        "siglip": towers("siglip"),
        "mlp": {"hidden_sizes": (8,), "num_features": 3, "id2label": ("left", "right")},
    }  # fmt: skip
    config = fmjax.models.family_of(family).Config(**sizes[family])
    return fmjax.create(family, config, head=head, rng=jax.random.key(0), scan=scan)


def texts(labels=True):
    """Sentences of tokens of one class's half of the vocabulary."""
    draw = np.random.default_rng(0)
    kinds = np.arange(B) % 2
    ids = draw.integers(2, V // 2, (B, T)) + kinds[:, None] * (V // 2 - 2)
    batch = {"input_ids": ids, "attention_mask": np.ones((B, T), np.int32)}
    return batch | ({"labels": kinds} if labels else {}) | {"weight": np.ones(B, np.float32)}


def named_pictures():
    """Gray squares, each with a text that says how light it is."""
    ids = np.full((B, T), 1, np.int32)
    ids[:, 1], ids[:, -1] = np.arange(2, 2 + B), V - 1
    shades = np.linspace(-1, 1, B, dtype=np.float32)[:, None, None, None]
    return {
        "input_ids": ids, "attention_mask": np.ones((B, T), np.int32),
        "pixel_values": np.broadcast_to(shades, (B, 8, 8, 1)).copy(),
        "weight": np.ones(B, np.float32),
    }  # fmt: skip


def tags():
    """Sentences whose tokens are labelled by their halves of the vocabulary."""
    draw = np.random.default_rng(0)
    ids = draw.integers(2, V, (B, T))
    labels = (ids >= V // 2).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "weight": np.ones(B, np.float32)}


def pictures(classes=2):
    """Gray squares, lighter the higher their class."""
    draw = np.random.default_rng(0)
    labels = np.arange(B) % classes
    pixels = draw.uniform(0, 0.4, (B, 8, 8, 1)) + 0.5 * labels[:, None, None, None] / classes
    return {
        "pixel_values": pixels.astype(np.float32),
        "labels": labels,
        "weight": np.ones(B, np.float32),
    }


def pairs():
    """Responses of three tokens after prompts of three."""
    draw = np.random.default_rng(0)
    batch = {"weight": np.ones(B, np.float32)}
    for kind, low in (("chosen", 2), ("rejected", V // 2)):
        ids = draw.integers(low, low + 5, (B, T))
        labels = ids.copy()
        labels[:, :3] = -100
        batch |= {
            f"{kind}_input_ids": ids,
            f"{kind}_attention_mask": np.ones((B, T), np.int32),
            f"{kind}_labels": labels,
        }
    return batch


def completions():
    """Good and bad responses of three tokens, and those of the next ones."""
    draw = np.random.default_rng(0)
    good = np.arange(B) % 2 == 0
    ids = draw.integers(2, 7, (B, T)) + np.where(good[:, None], 0, V // 2 - 2)
    other = np.concatenate([ids[:, :3], np.roll(ids[:, 3:], -1, axis=0)], axis=1)
    batch = {"desirable": good.astype(np.int32), "weight": np.ones(B, np.float32)}
    for kind, rows in (("completion", ids), ("mismatched", other)):
        batch |= {
            f"{kind}_input_ids": rows,
            f"{kind}_attention_mask": np.ones((B, T), np.int32),
            f"{kind}_labels": np.where(np.arange(T) < 3, -100, rows),
        }
    return batch


def responses():
    """Rollouts of three tokens after prompts of three, good and bad ones."""
    draw = np.random.default_rng(0)
    ids = draw.integers(2, V, (B, T))
    log_probs = np.full((B, 3), -np.log(V), np.float32)
    return {
        "input_ids": ids, "attention_mask": np.ones((B, T), np.int32),
        "response_mask": np.ones((B, 3), np.float32), "log_probs": log_probs,
        "reference_log_probs": log_probs, "values": np.zeros((B, 3), np.float32),
        "advantages": np.where(np.arange(B) % 2, 1.0, -1.0).astype(np.float32),
        "returns": np.ones((B, 3), np.float32), "weight": np.ones(B, np.float32),
    }  # fmt: skip


def steps_of_agents():
    """What an agent saw, did and got."""
    draw = np.random.default_rng(0)
    floats = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "observations": floats(B, 3), "next_observations": floats(B, 3),
        "actions": draw.integers(0, 2, B), "rewards": floats(B),
        "discounts": np.full(B, 0.9, np.float32), "returns": floats(B), "values": floats(B),
        "advantages": floats(B), "log_probabilities": np.full(B, -0.7, np.float32),
        "weight": np.ones(B, np.float32),
    }  # fmt: skip


def rounds(batch):
    """Four clients, each with one step of two examples."""
    return {name: leaf.reshape(4, 1, 2, *leaf.shape[1:]) for name, leaf in batch.items()}


def halves(batch):
    """The first half of the rows with their labels, the second without."""
    half = B // 2
    labelled = {f"labelled/{name}": leaf[:half] for name, leaf in batch.items()}
    rest = {f"unlabelled/{name}": leaf[half:] for name, leaf in batch.items() if name != "labels"}
    return labelled | rest


def agents():
    """Networks for a policy and its values, and their variables."""
    policy, first = made("mlp", "classification")
    names = dataclasses.replace(policy.config, id2label=("value",))
    value = policy.clone(config=names)
    second = value.init(jax.random.key(1), jnp.zeros((1, 3)))
    return actor_critic(policy, value), together(policy=first, value=second)
