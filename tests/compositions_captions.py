"""Further rows of `compositions`: pictures and texts in one model."""

import dataclasses
import functools

import jax
import numpy as np
import optax
from composition_table import composition
from made_up import B, T, V, halves, made, named_pictures, pictures, rounds, texts

import fmjax
from fmjax.data.columns import Columns
from fmjax.data.episodes import episodes
from fmjax.methods import bottleneck, ia3, lora, prefix_tuning, prompt_tuning
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.adversarial import attacked, pgd
from fmjax.methods.averaging import track_swa
from fmjax.methods.distillation import distilled, with_teacher
from fmjax.methods.distillation_terms import same_hidden_states, soft_labels
from fmjax.methods.domain_adaptation import dann, with_domain_classifier
from fmjax.methods.federated import client_update, pseudo_gradient
from fmjax.methods.few_shot import prototypical
from fmjax.methods.grpo import grpo_loss
from fmjax.methods.imbalance import class_weighted, focal
from fmjax.methods.kto import kto_loss
from fmjax.methods.low_rank import factorise
from fmjax.methods.mean_teacher import mean_teacher
from fmjax.methods.multitask import join, mix
from fmjax.methods.optimizers import adafactor, lion
from fmjax.methods.ppo_language import ppo_loss, trained_of, with_critic
from fmjax.methods.preference import orpo_loss
from fmjax.methods.privacy import private_gradient
from fmjax.methods.pruning import cubic, gradually
from fmjax.methods.quantization import quantization_aware, quantize
from fmjax.methods.selection import bitfit, layerwise_decay, matching
from fmjax.methods.self_training import pseudo_labelled
from fmjax.methods.shallower import student_of
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.methods.spikes import skip_spikes
from fmjax.methods.structured_pruning import remove_heads, remove_units
from fmjax.models import dalle, fusion, vision_encoder_decoder, visual_bert
from fmjax.tasks import (
    image_text,
    seq2seq,
    sequence_classification,
    text_to_image,
    visual_question_answering,
)
from fmjax.tasks.feature_extraction import encoder
from fmjax.train import accumulate, gradient, make_mesh


@functools.cache
def describes():
    """A ViT before a GPT-2 that looks at it, and their variables."""
    image, _ = made("vit", "image_classification")
    text, _ = made("gpt2", "causal_lm")
    config = vision_encoder_decoder.Config(
        image.config,
        dataclasses.replace(text.config, add_cross_attention=True),
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    return fmjax.create("vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0))


def described():
    """Pictures with captions; those of light ones are of the upper half of the vocabulary."""
    seen = pictures()
    words = np.random.default_rng(1).integers(2, V // 2, (B, T))
    return seen | {"labels": words + seen["labels"][:, None] * (V // 2 - 2)}


def judged():
    """Pairs of captions of one picture: the right one, and the one of the next picture."""
    batch = described()
    right = batch.pop("labels")
    return batch | {"chosen_labels": right, "rejected_labels": np.roll(right, 1, axis=0)}


def drawn(ids, length):
    """What a policy drew, good and bad, with the last columns of ids as its response."""
    known = np.full((B, length), -np.log(V), np.float32)
    return {
        "response_mask": np.ones((B, length), np.float32), "log_probs": known,
        "reference_log_probs": known, "weight": np.ones(B, np.float32),
        "advantages": np.where(np.arange(B) % 2, 1.0, -1.0).astype(np.float32),
    } | ids  # fmt: skip


@functools.cache
def looks(head, layers=2):
    """A tiny VisualBERT and its variables."""
    config = visual_bert.Config(
        vocab_size=V, hidden_size=8, visual_embedding_dim=6, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=12, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
        pad_token_id=0,
    )  # fmt: skip
    return fmjax.create("visual_bert", config, head=head, rng=jax.random.key(0))


def looked_at():
    """Sentences with three regions of a picture; some lack the last one."""
    batch = texts()
    regions = np.random.default_rng(2).normal(size=(B, 3, 6))
    there = np.ones((B, 3), np.int32)
    there[::3, 2] = 0
    return batch | {
        "visual_embeds": (regions + batch["labels"][:, None, None]).astype(np.float32),
        "visual_attention_mask": there,
    }


def asked():
    """The same with answers that are right in part."""
    batch = looked_at()
    worth = np.eye(2, dtype=np.float32)[batch["labels"]] * 0.9
    return batch | {"labels": worth}


@functools.cache
def draws():
    """A tiny DALL-E and its variables."""
    config = dalle.Config(
        text_vocab_size=10, text_length=2, image_vocab_size=6, grid_size=2, hidden_size=8,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        attention_pattern=("row",), window=1, dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    return fmjax.create("dalle", config, head="causal_lm", rng=jax.random.key(0))


def drawings(shift=0):
    """Ids of texts and, behind them, of pictures that go with the text before."""
    config = draws()[0].config
    first = np.arange(B) % 5
    words = np.stack([first, first + 5], axis=1)
    codes = np.repeat(((first + shift) % 5)[:, None], 4, axis=1)
    return np.concatenate([words, codes + config.image_start], axis=1)


@composition("lora", "adapted_layers", "privacy", on="vit and gpt2, captions", slow=True)
def _():
    model, variables = describes()
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=16.0),
        "loss": seq2seq.loss(model),
        "tx": optax.adam(3e-2),
        "batch": described(),
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


@composition(
    "lora", "sharpness_aware", on="clip, pictures and texts", devices="accumulated", slow=True
)
def _():
    model, variables = made("clip", "model")
    targets = ("*/attn/*", "*/mlp/*")
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0, targets=targets),
        "loss": image_text.loss(model),
        "tx": optax.adam(3e-2),
        "batch": named_pictures(),
        "is_trainable": is_adapter,
        "differentiate": lambda loss: sharpness_aware(accumulate(gradient(loss), 2)),
        "falls_to": None,
    }


@composition("selection", "averaging", on="siglip, pictures and texts", devices="data=2", slow=True)
def _():
    model, variables = made("siglip", "model")
    return {
        "variables": variables,
        "loss": image_text.loss(model),
        "tx": optax.chain(optax.adam(1e-2), track_swa(start=2, period=2)),
        "batch": named_pictures(),
        "is_trainable": matching(["params/text/*", "params/logit_*"], variables),
        "mesh": make_mesh(data=2),
        "falls_to": None,
    }


@composition("adversarial", "federated", "optimizers", on="clip, pictures and texts", slow=True)
def _():
    model, variables = made("clip", "model")
    attack = pgd(image_text.loss(model, train=False), epsilon=0.02, step_size=0.01, steps=2)
    return {
        "variables": variables,
        "loss": attacked(image_text.loss(model), attack),
        "tx": lion(1e-2),
        "batch": rounds(named_pictures()),
        "differentiate": lambda loss: pseudo_gradient(
            client_update(loss, optax.sgd(0.1)), clients_at_once=2
        ),
        "falls_to": None,
        "steps": 12,
    }


@composition("prompt_tuning", "spikes", on="clip, pictures and texts")
def _():
    model, variables = made("clip", "model")
    return {
        "variables": prompt_tuning.create(variables, jax.random.key(1), length=2),
        "loss": prompt_tuning.prompted(image_text.loss(model), model, after=1),
        "tx": skip_spikes(optax.adam(0.1)),
        "batch": named_pictures(),
        "is_trainable": is_adapter,
        "falls_to": None,
    }


@composition(
    "domain_adaptation", "partly_labelled", "bottleneck", on="visual_bert, two domains", slow=True
)
def _():
    model, variables = looks("visual_reasoning")
    variables = with_domain_classifier(variables, jax.random.key(1), width=8, hidden=(6,))
    return {
        "variables": bottleneck.add(variables, jax.random.key(1), width=3),
        "loss": dann(sequence_classification.loss, model, strength=0.5),
        "tx": optax.adam(1e-2),
        "batch": halves(looked_at()),
        "is_trainable": lambda path: (
            is_adapter(path) or path.startswith(("domain/", "params/head"))
        ),
        "falls_to": None,
        "steps": 12,
    }


@composition("few_shot", "ia3", on="visual_bert, episodes")
def _():
    model, variables = looks("model")
    shown = {name: np.concatenate([leaf] * 3) for name, leaf in looked_at().items()}
    shown.pop("weight")
    batch = next(episodes(Columns((), shown), ways=2, shots=1, queries=2, tasks=4))
    return {
        "variables": ia3.add(variables),
        "loss": prototypical(encoder(model), 2),
        "tx": optax.adam(3e-2),
        "batch": batch,
        "is_trainable": is_adapter,
        "steps": 12,
        "falls_to": None,
    }


@composition("imbalance", "quantization", "low_rank", on="visual_bert, visual reasoning")
def _():
    model, variables = looks("visual_reasoning")
    loss = class_weighted(focal(model), [0.5, 1.5])
    return {
        "variables": factorise(variables, targets=("*/mlp/*",), rank=4),
        "loss": quantization_aware(loss, bits=8, targets=("*/attn/*/kernel",)),
        "tx": optax.adam(1e-2),
        "batch": looked_at(),
        "steps": 12,
    }


@composition("multitask", "selection", on="visual_bert, answers and reasoning")
def _():
    answers, first = looks("question_answering")
    reasons, second = looks("visual_reasoning")
    losses = {
        "answer": visual_question_answering.loss(answers),
        "reason": sequence_classification.loss(reasons),
    }
    variables = join({"answer": first, "reason": second})
    batch = {f"answer/{name}": leaf for name, leaf in asked().items()}
    return {
        "variables": variables,
        "loss": mix(losses),
        "tx": optax.adam(1e-2),
        "batch": batch | {f"reason/{name}": leaf for name, leaf in looked_at().items()},
        "is_trainable": bitfit(variables, head=("params/heads/*",)),
        "falls_to": None,
        "steps": 12,
    }


@composition(
    "distillation", "mean_teacher", "averaging", on="visual_bert, questions", devices="data=2"
)
def _():
    model, variables = looks("question_answering")
    teacher = jax.tree.map(lambda x: 1.2 * x, variables)
    loss = distilled(
        visual_question_answering.loss, model, model, (0.5, same_hidden_states({2: 2})), hard=0.5
    )
    return {
        "variables": with_teacher(variables, teacher),
        "loss": loss,
        "tx": optax.chain(optax.adam(1e-2), track_swa(start=2, period=2)),
        "batch": asked(),
        "differentiate": lambda loss: mean_teacher(gradient(loss), 0.9),
        "changes": ("teacher/",),
        "mesh": make_mesh(data=2),
    }


@composition(
    "self_training", "partly_labelled", "spikes", on="visual_bert, some labelled", slow=True
)
def _():
    model, variables = looks("visual_reasoning")
    return {
        "variables": variables,
        "loss": pseudo_labelled(sequence_classification.loss, model, threshold=0.5),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": halves(looked_at()),
        "falls_to": None,
    }


@composition(
    "shallower", "structured_pruning", "pruning", "distillation", on="visual_bert, questions",
    slow=True,
)  # fmt: skip
def _():
    teacher, weights = looks("question_answering", layers=3)
    weights = jax.tree.map(lambda x: 1.5 * x, weights)
    model, variables = student_of(teacher, weights, (0, 2))
    model, variables = remove_heads(model, variables, {"layers_0/attn": [1]})
    model, variables = remove_units(model, variables, {"layers_1/mlp": [0, 5, 8, 9]})
    plain = functools.partial(visual_question_answering.loss, train=False)
    return {
        "variables": with_teacher(variables, weights),
        "loss": distilled(plain, model, teacher, (0.5, soft_labels(2.0)), hard=0.5),
        "tx": gradually(optax.adam(1e-2), cubic(0.3, steps=8), every=2),
        "batch": asked(),
        "steps": 12,
        "falls_to": None,
    }


@composition("preference", "prefix_tuning", on="vit and gpt2, pairs of captions")
def _():
    model, variables = describes()
    return {
        "variables": prefix_tuning.create(model, variables, jax.random.key(1), length=2),
        "loss": orpo_loss(model, odds_weight=0.5),
        "tx": optax.adam(3e-2),
        "batch": judged(),
        "is_trainable": is_adapter,
        "falls_to": None,
    }


@composition("kto", "quantization", "lora", on="dalle, pictures of texts", slow=True)
def _():
    model, variables = draws()
    kept = quantize(variables, bits=8, targets=("*/attn/*/kernel",))
    good = np.arange(B) % 2 == 0
    batch = {"desirable": good.astype(np.int32), "weight": np.ones(B, np.float32)}
    right, wrong = drawings(), drawings(shift=1)
    for kind, ids in (
        ("completion", np.where(good[:, None], right, wrong)), ("mismatched", wrong),
    ):  # fmt: skip
        labels = np.where(np.arange(6) < 2, -100, ids)
        batch |= {f"{kind}_input_ids": ids, f"{kind}_labels": labels}
    return {
        "variables": lora.add(kept, jax.random.key(1), rank=2, alpha=16.0),
        "loss": kto_loss(model, beta=0.5),
        "tx": optax.adam(1e-2),
        "batch": batch,
        "is_trainable": is_adapter,
        "falls_to": None,
    }


@composition("grpo", "policy_gradient", "optimizers", on="vit and gpt2, captions", slow=True)
def _():
    model, variables = describes()
    batch = described()
    tokens = batch.pop("labels")
    ids = np.concatenate([np.ones((B, 1), int), tokens], axis=1)
    return {
        "variables": variables,
        "loss": grpo_loss(model),
        "tx": lion(3e-3),
        "batch": batch | drawn({"decoder_input_ids": ids}, T),
        "falls_to": None,
    }


@composition(
    "ppo_language", "policy_gradient", "spikes", on="dalle, pictures of texts",
    devices="accumulated", slow=True,
)  # fmt: skip
def _():
    model, variables = draws()
    ids = drawings()
    batch = drawn({"input_ids": ids, "attention_mask": np.ones_like(ids)}, 4)
    batch["advantages"] = np.repeat(batch["advantages"][:, None], 4, axis=1)
    return {
        "variables": with_critic(model, variables),
        "loss": ppo_loss(model),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": batch | {name: np.ones((B, 4), np.float32) for name in ("values", "returns")},
        "is_trainable": trained_of(variables),
        "differentiate": lambda loss: accumulate(gradient(loss), 2),
        "falls_to": None,
    }


@composition("lora", "optimizers", on="dalle, pictures of texts")
def _():
    model, variables = draws()
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=16.0),
        "loss": text_to_image.loss(model),
        "tx": adafactor(0.05),
        "batch": {"input_ids": drawings(), "weight": np.ones(B, np.float32)},
        "is_trainable": is_adapter,
        "falls_to": None,
    }
