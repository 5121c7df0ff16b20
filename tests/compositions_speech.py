"""Further rows of `compositions`: methods on tasks that hear."""

import functools

import jax
import numpy as np
import optax
from composition_table import composition
from made_up import B, halves, rounds

import fmjax
from fmjax.data.columns import Columns
from fmjax.data.episodes import episodes
from fmjax.methods import bottleneck, ia3, lora, prefix_tuning
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.adversarial import attacked, pgd
from fmjax.methods.averaging import track_swa
from fmjax.methods.distillation import distilled, with_teacher
from fmjax.methods.distillation_terms import same_hidden_states, soft_labels
from fmjax.methods.domain_adaptation import dann, with_domain_classifier
from fmjax.methods.federated import client_update, pseudo_gradient
from fmjax.methods.few_shot import maml
from fmjax.methods.grpo import grpo_loss
from fmjax.methods.imbalance import focal
from fmjax.methods.kto import kto_loss
from fmjax.methods.low_rank import factorise
from fmjax.methods.mean_teacher import mean_teacher
from fmjax.methods.multitask import join, mix
from fmjax.methods.optimizers import lion
from fmjax.methods.ppo_language import ppo_loss, trained_of, with_critic
from fmjax.methods.preference import dpo_loss
from fmjax.methods.privacy import private_gradient
from fmjax.methods.pruning import cubic, gradually
from fmjax.methods.quantization import quantize
from fmjax.methods.selection import matching
from fmjax.methods.self_training import fix_match
from fmjax.methods.shallower import student_of
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.methods.spikes import skip_spikes
from fmjax.methods.structured_pruning import remove_heads
from fmjax.models import wav2vec2, whisper
from fmjax.tasks import audio_classification, ctc, seq2seq, speech_pretraining
from fmjax.train import accumulate, gradient, is_param, make_mesh

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


def heard_classes():
    """Sounds without a transcript, each of one of two classes: low tones or high ones."""
    batch = sounds()
    kinds = np.arange(B) % 2
    waves = np.sin(2 * np.pi * np.arange(96) * (1 + 3 * kinds[:, None]) / 16)
    noise = np.random.default_rng(1).normal(size=(B, 96)) * 0.1
    values = ((waves + noise) * batch["attention_mask"]).astype(np.float32)
    return batch | {"input_values": values, "labels": kinds}


def frames():
    """Frames of sound, of which each symbol's own bin is loud for four."""
    draw = np.random.default_rng(0)
    labels = draw.integers(3, 7, (B, 4))
    loud = np.eye(4, dtype=np.float32)[labels - 3]  # [B, 4, 4]
    noise = draw.normal(size=(B, 16, 4)) * 0.1
    features = (np.repeat(loud, 4, axis=1) + noise).astype(np.float32)
    labels[:, -1] = 2
    return {"input_features": features, "labels": labels, "weight": np.ones(B, np.float32)}


@functools.cache
def writes(layers=1):
    """A tiny Whisper and its variables."""
    config = whisper.Config(
        vocab_size=8, num_mel_bins=4, d_model=8, encoder_layers=layers, encoder_ffn_dim=12,
        encoder_attention_heads=2, decoder_layers=1, decoder_ffn_dim=12, decoder_attention_heads=2,
        max_source_positions=8, max_target_positions=10, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, init_std=0.3,
    )  # fmt: skip
    return fmjax.create("whisper", config, head="seq2seq_lm", rng=jax.random.key(0))


def judged():
    """Pairs of transcripts of one sound: the right one, and the one of the next sound."""
    batch = frames()
    right = batch.pop("labels")
    return batch | {"chosen_labels": right, "rejected_labels": np.roll(right, 1, axis=0)}


def drawn():
    """Transcripts that were drawn, good and bad ones."""
    batch = frames()
    tokens = batch.pop("labels")
    known = np.full((B, 4), -np.log(8), np.float32)
    return batch | {
        "decoder_input_ids": np.concatenate([np.ones((B, 1), int), tokens], axis=1),
        "response_mask": np.ones((B, 4), np.float32), "log_probs": known,
        "reference_log_probs": known,
        "advantages": np.where(np.arange(B) % 2, 1.0, -1.0).astype(np.float32),
    }  # fmt: skip


@composition("adversarial", "averaging", "spikes", on="wav2vec2, CTC", slow=True)
def _():
    model, variables = hears("ctc")
    attack = pgd(
        ctc.loss(model, train=False), epsilon=0.02, step_size=0.01, steps=2, name="input_values"
    )
    return {
        "variables": variables,
        "loss": attacked(ctc.loss(model), attack),
        "tx": optax.chain(skip_spikes(optax.adam(1e-2)), track_swa(start=2, period=2)),
        "batch": sounds(),
    }


@composition(
    "domain_adaptation", "partly_labelled", "bottleneck", on="wav2vec2, sounds of two domains"
)
def _():
    model, variables = hears("sequence_classification")
    variables = with_domain_classifier(variables, jax.random.key(1), width=8, hidden=(6,))
    return {
        "variables": bottleneck.add(variables, jax.random.key(1), width=3),
        "loss": dann(audio_classification.loss, model, strength=0.5),
        "tx": optax.adam(1e-2),
        "batch": halves(heard_classes()),
        "is_trainable": lambda path: path.startswith(("adapters/", "domain/", "params/head")),
        "falls_to": None,
        "steps": 12,
    }  # fmt: skip


@composition("few_shot", "ia3", on="wav2vec2, episodes of sounds", slow=True)
def _():
    model, variables = hears("sequence_classification")
    shown = {name: np.concatenate([leaf] * 3) for name, leaf in heard_classes().items()}
    shown.pop("weight")
    batch = next(episodes(Columns((), shown), ways=2, shots=1, queries=2, tasks=4))
    loss = audio_classification.loss(model, train=False)
    return {
        "variables": ia3.add(variables),
        "loss": maml(loss, inner_rate=0.3, inner_steps=2, adapts=is_adapter),
        "tx": optax.adam(1e-2),
        "is_trainable": lambda path: is_adapter(path) or is_param(path),
        "batch": batch,
        "steps": 12,
        "falls_to": None,
    }


@composition(
    "imbalance", "low_rank", "sharpness_aware", on="wav2vec2, classes of sounds",
    devices="accumulated", slow=True,
)  # fmt: skip
def _():
    model, variables = hears("sequence_classification")
    return {
        "variables": factorise(variables, targets=("*/mlp/*",), rank=4),
        "loss": focal(model),
        "tx": optax.adam(1e-2),
        "batch": heard_classes(),
        "differentiate": lambda loss: sharpness_aware(accumulate(gradient(loss), 2)),
        "steps": 12,
    }


@composition("multitask", "selection", on="wav2vec2, CTC and classes")
def _():
    writer, first = hears("ctc")
    judge, second = hears("sequence_classification")
    losses = {"text": ctc.loss(writer), "class": audio_classification.loss(judge)}
    variables = join({"text": first, "class": second})
    batch = {f"text/{name}": leaf for name, leaf in sounds().items()}
    return {
        "variables": variables,
        "loss": mix(losses),
        "tx": optax.adam(1e-2),
        "batch": batch | {f"class/{name}": leaf for name, leaf in heard_classes().items()},
        # As usual, the convolutions stay as they were pretrained.
        "is_trainable": matching(["params/*", "!params/embed/features/*"], variables),
    }


@composition("preference", "lora", on="whisper, pairs of transcripts", devices="data=2", slow=True)
def _():
    model, variables = writes()
    return {
        "variables": lora.add(
            variables, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/*", "*/cross_attn/*")
        ),
        "loss": dpo_loss(model, beta=1.0),
        "tx": optax.adam(3e-3),
        "batch": judged(),
        "is_trainable": is_adapter,
        "mesh": make_mesh(data=2),
        "steps": 12,
    }


@composition("kto", "prefix_tuning", on="whisper, transcripts")
def _():
    model, variables = writes()
    batch = judged()
    right, wrong = batch.pop("chosen_labels"), batch.pop("rejected_labels")
    good = np.arange(B) % 2 == 0
    batch["completion_labels"] = np.where(good[:, None], right, wrong)
    batch["mismatched_labels"] = wrong
    return {
        "variables": prefix_tuning.create(model, variables, jax.random.key(1), length=2),
        "loss": kto_loss(model, beta=0.5),
        "tx": optax.adam(3e-2),
        "batch": batch | {"desirable": good.astype(np.int32)},
        "is_trainable": is_adapter,
        "falls_to": None,
    }


@composition("grpo", "policy_gradient", "optimizers", on="whisper, transcripts", slow=True)
def _():
    model, variables = writes()
    return {
        "variables": variables,
        "loss": grpo_loss(model),
        "tx": lion(3e-3),
        "batch": drawn(),
        "falls_to": None,
    }


@composition("ppo_language", "policy_gradient", "spikes", on="whisper, transcripts")
def _():
    model, variables = writes()
    batch = drawn()
    batch["advantages"] = np.repeat(batch["advantages"][:, None], 4, axis=1)
    return {
        "variables": with_critic(model, variables),
        "loss": ppo_loss(model),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": batch | {name: np.ones((B, 4), np.float32) for name in ("values", "returns")},
        "is_trainable": trained_of(variables),
        "falls_to": None,
    }


@composition("self_training", "partly_labelled", "ia3", on="wav2vec2, some with labels")
def _():
    model, variables = hears("sequence_classification")

    def louder(rng, batch):
        return {**batch, "input_values": batch["input_values"] * 1.1}

    def noisy(rng, batch):
        noise = jax.random.normal(rng, batch["input_values"].shape) * 0.1
        return {**batch, "input_values": batch["input_values"] + noise}

    return {
        "variables": ia3.add(variables),
        "loss": fix_match(
            audio_classification.loss, model, weak=louder, strong=noisy, threshold=0.3
        ),
        "tx": optax.adam(3e-2),
        "batch": halves(heard_classes()),
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "falls_to": None,
        "steps": 12,
    }


@composition(
    "shallower", "structured_pruning", "pruning", "distillation", on="whisper, transcription"
)
def _():
    teacher, weights = writes(layers=2)
    weights = jax.tree.map(lambda x: 1.5 * x, weights)
    model, variables = student_of(teacher, weights, (1,), stack="encoder/")
    model, variables = remove_heads(model, variables, {"encoder/layers_0/attn": [0]})
    plain = functools.partial(seq2seq.loss, train=False)
    return {
        "variables": with_teacher(variables, weights),
        "loss": distilled(plain, model, teacher, (0.5, soft_labels(2.0)), hard=0.5),
        "tx": gradually(optax.adam(1e-2), cubic(0.3, steps=8), every=2),
        "batch": frames(),
        "steps": 12,
    }


@composition("quantization", "lora", "low_rank", on="whisper, transcription")
def _():
    model, variables = writes()
    thin = factorise(variables, targets=("*/mlp/up",), rank=3)
    kept = quantize(thin, bits=4, group=4, normal=True, targets=("*/attn/*/kernel",))
    return {
        "variables": lora.add(
            kept, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/up", "*/attn/query")
        ),
        "loss": seq2seq.loss(model),
        "tx": optax.adam(3e-2),
        "batch": frames(),
        "is_trainable": is_adapter,
    }
