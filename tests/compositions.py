"""Methods with each other, on different families and tasks: no pair has been told of the other.

python tests/compositions.py          prints the README's table of methods
"""

import functools
import importlib
from pathlib import Path

import compositions_captions  # noqa: F401 - its rows are in the table
import compositions_partly_labelled  # noqa: F401 - its rows are in the table
import compositions_smaller  # noqa: F401 - its rows are in the table
import compositions_speech  # noqa: F401 - its rows are in the table
import jax
import numpy as np
import optax
from composition_table import COMPOSITIONS, composition
from made_up import (
    B,
    V,
    agents,
    completions,
    made,
    pairs,
    pictures,
    responses,
    rounds,
    steps_of_agents,
    tags,
    texts,
)

import fmjax
from fmjax.data.columns import Columns
from fmjax.data.episodes import episodes
from fmjax.methods import bottleneck, dqn, ia3, lora, ppo, prefix_tuning, prompt_tuning, reinforce
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.adversarial import attacked, free_lb, pgd, trades
from fmjax.methods.averaging import track_swa
from fmjax.methods.distillation import distilled, unlabelled, with_teacher
from fmjax.methods.distillation_terms import same_hidden_states, soft_labels
from fmjax.methods.federated import client_update, fed_adam, pseudo_gradient
from fmjax.methods.few_shot import maml, prototypical, reptile
from fmjax.methods.grpo import grpo_loss
from fmjax.methods.imbalance import class_weighted, effective_number_weights, focal
from fmjax.methods.kto import kto_loss
from fmjax.methods.mean_teacher import mean_teacher
from fmjax.methods.multitask import by_uncertainty, join, mix, mix_gradients, with_uncertainty
from fmjax.methods.optimizers import adafactor, lamb, lion, muon
from fmjax.methods.policies import network
from fmjax.methods.ppo_language import ppo_loss, trained_of, with_critic
from fmjax.methods.preference import dpo_loss, orpo_loss
from fmjax.methods.privacy import private_gradient
from fmjax.methods.selection import bitfit, layerwise_decay, matching
from fmjax.methods.shallower import student_of
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.methods.spikes import skip_spikes
from fmjax.tasks import (
    causal_lm,
    seq2seq,
    sequence_classification,
    token_classification,
)
from fmjax.tasks.feature_extraction import encoder
from fmjax.train import accumulate, gradient, is_param, make_mesh


@composition("lora", "adapted_layers", "privacy", on="vit, image classification")
def _():
    model, variables = made("vit", "image_classification")
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": sequence_classification.loss(model),
        "tx": optax.adam(3e-2),
        "batch": pictures(),
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "differentiate": lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.01, expected_batch_size=B, microbatch_size=4
        ),
        "steps": 16,
    }


@composition("distillation", "multitask", on="bert, classes and tags", devices="data=2", slow=True)
def _():
    sentiment, first = made("bert", "sequence_classification")
    tagger, second = made("bert", "token_classification")
    teacher = jax.tree.map(lambda x: 1.5 * x, first)
    distil = functools.partial(distilled, sequence_classification.loss, sentiment, sentiment)
    losses = {
        "sentiment": distil((0.5, soft_labels(2.0)), hard=0.5),
        "tags": token_classification.loss(tagger),
    }
    variables = join({"sentiment": first, "tags": second})
    batch = {f"sentiment/{k}": v for k, v in texts().items()}
    return {
        "variables": with_teacher(variables, teacher),
        "loss": mix(losses),
        "tx": optax.adam(1e-2),
        "batch": batch | {f"tags/{k}": v for k, v in tags().items()},
        "mesh": make_mesh(data=2),
        "steps": 12,
    }


@composition("preference", "lora", on="llama, pairs of texts", devices="accumulated")
def _():
    model, variables = made("llama", "causal_lm")
    return {
        "variables": lora.add(
            variables, jax.random.key(1), rank=2, alpha=16.0, targets=("*/mlp/*",)
        ),
        "loss": dpo_loss(model, beta=1.0),
        "tx": optax.adam(3e-2),
        "batch": pairs(),
        "is_trainable": is_adapter,
        "differentiate": lambda loss: accumulate(gradient(loss), 2),
    }  # fmt: skip


@composition("federated", "prompt_tuning", on="t5, sequence to sequence", slow=True)
def _():
    model, variables = made("t5", "seq2seq_lm")
    loss = prompt_tuning.prompted(seq2seq.loss(model), model)
    batch = texts(labels=False) | {"labels": np.full((B, 3), 5)}
    return {
        "variables": prompt_tuning.create(variables, jax.random.key(1), length=2),
        "loss": loss,
        "tx": optax.sgd(1.0),
        "batch": rounds(batch),
        "is_trainable": lambda path: path.startswith("adapters/"),
        "differentiate": lambda loss: pseudo_gradient(
            client_update(loss, optax.adam(0.3)), clients_at_once=2
        ),
        "falls_to": None,
    }


@composition("prefix_tuning", "sharpness_aware", on="gpt2 scanned, language modelling")
def _():
    model, variables = made("gpt2", "causal_lm", scan=True)
    return {
        "variables": prefix_tuning.create(model, variables, jax.random.key(1), length=2),
        "loss": causal_lm.loss(model),
        "tx": optax.adam(0.1),
        "batch": texts(labels=False),
        "is_trainable": lambda path: path.startswith("adapters/"),
        "differentiate": lambda loss: sharpness_aware(gradient(loss)),
        "falls_to": None,
    }


@composition("adversarial", "federated", "imbalance", on="cnn, image classification")
def _():
    model, variables = made("cnn", "image_classification")
    weights = effective_number_weights([5, 3, *[1] * 8], beta=0.9)
    attack = pgd(
        sequence_classification.loss(model, train=False), epsilon=0.02, step_size=0.01, steps=2
    )
    return {
        "variables": variables,
        "loss": attacked(class_weighted(sequence_classification.loss(model), weights), attack),
        "tx": fed_adam(0.03),
        "batch": rounds(pictures()),
        "differentiate": lambda loss: pseudo_gradient(
            client_update(loss, optax.sgd(0.1)), clients_at_once=4
        ),
        "steps": 12,
    }


@composition("privacy", "selection", "spikes", on="bert, text classification", slow=True)
def _():
    model, variables = made("bert", "sequence_classification")
    return {
        "variables": variables,
        "loss": sequence_classification.loss(model),
        "tx": skip_spikes(optax.adam(3e-2)),
        "batch": texts(),
        "is_trainable": bitfit(variables),
        "differentiate": lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.01, expected_batch_size=B, microbatch_size=2
        ),
        "steps": 12,
    }


@composition("shallower", "mean_teacher", "distillation", "selection", on="vit, without labels")
def _():
    model, variables = student_of(*made("vit", "image_classification", layers=3), (0, 2))
    teacher = jax.tree.map(lambda x: 1.2 * x, variables)
    return {
        "variables": with_teacher(variables, teacher),
        "loss": distilled(unlabelled, model, model, (1.0, same_hidden_states({2: 2})), hard=0.0),
        "tx": optax.chain(optax.adam(1e-2), layerwise_decay(0.8, variables)),
        "batch": {k: v for k, v in pictures().items() if k != "labels"},
        "differentiate": lambda loss: mean_teacher(gradient(loss), 0.9),
        "changes": ("teacher/",),
    }


@composition("shallower", "distillation", "bottleneck", on="bert, text classification")
def _():
    teacher, weights = made("bert", "sequence_classification", layers=3)
    weights = jax.tree.map(lambda x: 1.5 * x, weights)
    model, variables = student_of(teacher, weights, (0, 2))
    adapted = bottleneck.add(variables, jax.random.key(1), width=3)
    plain = functools.partial(sequence_classification.loss, train=False)
    loss = distilled(plain, model, teacher, (0.5, soft_labels(2.0)), hard=0.5)
    return {
        "variables": with_teacher(adapted, weights),
        "loss": loss,
        "tx": optax.adam(3e-2),
        "batch": texts(),
        "is_trainable": is_adapter,
        "falls_to": None,
        "steps": 12,
    }


@composition("preference", "ia3", "optimizers", on="gpt2, pairs of texts")
def _():
    model, variables = made("gpt2", "causal_lm")
    return {
        "variables": ia3.add(variables),
        "loss": orpo_loss(model),
        "tx": lion(3e-2),
        "batch": pairs(),
        "is_trainable": is_adapter,
        "falls_to": None,
    }


@composition("kto", "optimizers", on="gpt2, responses")
def _():
    model, variables = made("gpt2", "causal_lm", layers=1)
    known = np.full(B, -3 * np.log(V), np.float32)
    return {
        "variables": variables,
        "loss": kto_loss(model, beta=0.5),
        "tx": lion(3e-3),
        "batch": completions() | {"ref_completion_logps": known, "ref_mismatched_logps": known},
        "falls_to": None,
    }


@composition("kto", "ia3", "spikes", on="gpt2, responses", devices="accumulated", slow=True)
def _():
    model, variables = made("gpt2", "causal_lm")
    return {
        "variables": ia3.add(variables),
        "loss": kto_loss(model, beta=0.5, desirable_weight=1.5),
        "tx": skip_spikes(optax.adam(3e-2)),
        "batch": completions(),
        "is_trainable": is_adapter,
        "differentiate": lambda loss: accumulate(gradient(loss), 2),
        "falls_to": None,
    }


@composition(
    "adversarial", "lora", "optimizers", on="vit, image classification", devices="data=2", slow=True
)
def _():
    model, variables = made("vit", "image_classification")
    loss = sequence_classification.loss(model)
    return {
        "variables": lora.add(
            variables, jax.random.key(1), rank=2, alpha=8.0, weight_decomposed=True
        ),
        "loss": trades(model, loss, beta=1.0, epsilon=0.02, step_size=0.01, steps=2),
        "tx": lamb(0.1),
        "batch": pictures(),
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/head"),
        "mesh": make_mesh(data=2),
        "steps": 12,
    }


@composition("few_shot", "spikes", "optimizers", on="cnn, episodes")
def _():
    model, variables = made("cnn", "model")
    shown = pictures(classes=4)
    more = {name: np.concatenate([shown[name]] * 3) for name in ("pixel_values", "labels")}
    batch = next(episodes(Columns((), more), ways=2, shots=1, queries=2, tasks=4))
    return {
        "variables": variables,
        "loss": prototypical(encoder(model), 2),
        "tx": skip_spikes(muon(3e-2, weight_decay=0.0)),
        "batch": batch,
        "steps": 12,
        "falls_to": None,
    }


@composition("few_shot", "bottleneck", on="vit, episodes", slow=True)
def _():
    model, variables = made("vit", "image_classification")
    shown = pictures(classes=4)
    more = {name: np.concatenate([shown[name]] * 3) for name in ("pixel_values", "labels")}
    batch = next(episodes(Columns((), more), ways=2, shots=1, queries=2, tasks=4))
    loss = sequence_classification.loss(model, train=False)
    return {
        "variables": bottleneck.add(variables, jax.random.key(1), width=3),
        "loss": maml(loss, inner_rate=0.3, inner_steps=2, adapts=is_adapter),
        "tx": optax.adam(3e-2),
        "is_trainable": lambda path: is_adapter(path) or is_param(path),
        "batch": batch,
        "steps": 12,
        "falls_to": None,
    }


@composition("adversarial", "ia3", "selection", on="bert, text classification")
def _():
    model, variables = made("bert", "sequence_classification")
    variables = ia3.add(variables)
    own = matching(["params/head/*"], variables)
    return {
        "variables": variables,
        "loss": sequence_classification.loss(model),
        "tx": optax.adam(3e-2),
        "batch": texts(),
        "is_trainable": lambda path: is_adapter(path) or own(path),
        "differentiate": lambda loss: free_lb(loss, table="params/embed/word/embedding"),
        "steps": 12,
    }


@composition("prompt_tuning", "imbalance", "optimizers", on="bert, text classification")
def _():
    model, variables = made("bert", "sequence_classification")
    return {
        "variables": prompt_tuning.create(variables, jax.random.key(1), length=2),
        "loss": prompt_tuning.prompted(focal(model), model, after=1),
        "tx": adafactor(0.1),
        "batch": texts(),
        "is_trainable": lambda path: path.startswith(("adapters/", "params/head")),
        "falls_to": None,
        "steps": 12,
    }


@composition(
    "prefix_tuning", "mean_teacher", "distillation", on="bert, text classification", slow=True
)
def _():
    model, variables = made("bert", "sequence_classification")
    variables = prefix_tuning.create(model, variables, jax.random.key(1), length=2)
    loss = distilled(sequence_classification.loss, model, model, (0.1, soft_labels()))
    return {
        "variables": with_teacher(variables, variables),
        "loss": loss,
        "tx": optax.adam(3e-2),
        "batch": texts(),
        "differentiate": lambda loss: mean_teacher(accumulate(gradient(loss), 2), 0.9),
        "is_trainable": lambda path: path.startswith(("adapters/", "params/head")),
        "changes": ("teacher/",),
        "steps": 12,
    }


@composition("multitask", "lora", "sharpness_aware", on="bert, classes and tags", slow=True)
def _():
    sentiment, first = made("bert", "sequence_classification")
    tagger, second = made("bert", "token_classification")
    losses = {
        "sentiment": by_uncertainty(sequence_classification.loss(sentiment)),
        "tags": by_uncertainty(token_classification.loss(tagger)),
    }
    variables = join({"sentiment": with_uncertainty(first), "tags": with_uncertainty(second)})
    batch = {f"sentiment/{k}": v for k, v in texts().items()}
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": losses,
        "tx": optax.adam(1e-2),
        "batch": batch | {f"tags/{k}": v for k, v in tags().items()},
        "is_trainable": lambda path: is_adapter(path) or path.startswith("params/heads/"),
        "differentiate": lambda losses: sharpness_aware(mix_gradients(losses)),
        "steps": 12,
    }


@composition("federated", "few_shot", "optimizers", "averaging", on="cnn, tasks as clients")
def _():
    model, variables = made("cnn", "image_classification")
    return {
        "variables": variables,
        "loss": sequence_classification.loss(model),
        "tx": optax.chain(lion(1e-2, weight_decay=0.0), track_swa(start=2, period=3)),
        "batch": rounds(pictures()),
        "differentiate": lambda loss: reptile(loss, optax.sgd(0.1)),
    }


@composition("grpo", "policy_gradient", "lora", on="gpt2, responses", devices="accumulated")
def _():
    model, variables = made("gpt2", "causal_lm")
    return {
        "variables": lora.add(variables, jax.random.key(1), rank=2, alpha=8.0),
        "loss": grpo_loss(model),
        "tx": optax.adam(1e-2),
        "batch": {k: v for k, v in responses().items() if k not in ("values", "returns")},
        "is_trainable": is_adapter,
        "differentiate": lambda loss: accumulate(gradient(loss), 2),
        "falls_to": None,
    }


@composition("grpo", "policy_gradient", "spikes", on="llama scanned, responses")
def _():
    model, variables = made("llama", "causal_lm", scan=True)
    return {
        "variables": variables,
        "loss": grpo_loss(model, kl_weight=0.0, average="token"),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": {k: v for k, v in responses().items() if k not in ("values", "returns")},
        "falls_to": None,
    }


@composition("ppo_language", "policy_gradient", "optimizers", on="gpt2, responses")
def _():
    model, variables = made("gpt2", "causal_lm")
    batch = responses()
    batch["advantages"] = np.repeat(batch["advantages"][:, None], 3, axis=1)
    return {
        "variables": with_critic(model, variables),
        "loss": ppo_loss(model),
        "tx": adafactor(0.05),
        "batch": batch,
        "is_trainable": trained_of(variables),
        "falls_to": None,
    }


@composition("ppo_language", "sharpness_aware", on="llama, responses", devices="data=2", slow=True)
def _():
    model, variables = made("llama", "causal_lm")
    batch = responses()
    batch["advantages"] = np.repeat(batch["advantages"][:, None], 3, axis=1)
    return {
        "variables": with_critic(model, variables),
        "loss": ppo_loss(model),
        "tx": optax.adam(1e-2),
        "batch": batch,
        "is_trainable": trained_of(variables),
        "differentiate": lambda loss: sharpness_aware(gradient(loss)),
        "mesh": make_mesh(data=2),
        "falls_to": None,
    }


@composition("reinforce", "sharpness_aware", on="mlp, steps of an agent", devices="accumulated")
def _():
    policy, variables = agents()
    return {
        "variables": variables,
        "loss": reinforce.loss(policy),
        "tx": optax.adam(3e-2),
        "batch": steps_of_agents(),
        "differentiate": lambda loss: sharpness_aware(accumulate(gradient(loss), 2)),
        "falls_to": None,
    }


@composition("reinforce", "selection", on="mlp, steps of an agent")
def _():
    policy, variables = agents()
    return {
        "variables": variables,
        "loss": reinforce.loss(policy, baseline=False),
        "tx": optax.adam(3e-2),
        "batch": steps_of_agents(),
        "is_trainable": matching(["params/policy/head/*"], variables),
        "falls_to": None,
    }


@composition("ppo", "spikes", on="mlp, steps of an agent")
def _():
    policy, variables = agents()
    return {
        "variables": variables,
        "loss": ppo.loss(policy, entropy_coefficient=0.01),
        "tx": skip_spikes(optax.adam(1e-2)),
        "batch": steps_of_agents(),
        "falls_to": None,
    }


@composition("ppo", "optimizers", "averaging", on="mlp, steps of an agent", devices="data=2")
def _():
    policy, variables = agents()
    return {
        "variables": variables,
        "loss": ppo.loss(policy),
        "tx": optax.chain(lamb(3e-2), track_swa(start=2, period=2)),
        "batch": steps_of_agents(),
        "mesh": make_mesh(data=2),
        "falls_to": None,
    }


def with_q_values():
    model, variables = made("mlp", "classification")
    return {
        "variables": dqn.with_target(variables, B),
        "loss": dqn.loss(network(model), period=100),
        "batch": steps_of_agents(),
        "changes": ("target/", "temporal_difference/"),
        "falls_to": None,
    }


@composition("dqn", "optimizers", on="mlp, steps of an agent")
def _():
    return with_q_values() | {"tx": lion(3e-3)}


@composition("dqn", "sharpness_aware", on="mlp, steps of an agent")
def _():
    return with_q_values() | {
        "tx": optax.adam(1e-2),
        "differentiate": lambda loss: sharpness_aware(gradient(loss)),
    }


def table():
    """Every method, where it attaches, what it is, and what it was composed with in the tests."""
    folder = Path(fmjax.__file__).parent / "methods"
    lines = ["| method | attaches to | what it is | trained together with |", "|---|---|---|---|"]
    for name in sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"):
        module = importlib.import_module(f"fmjax.methods.{name}")
        what = " ".join(module.__doc__.split("\n\n")[0].split()).rstrip(".")
        others = sorted(
            {other for row in COMPOSITIONS if name in row.methods for other in row.methods} - {name}
        )
        lines.append(f"| {name} | {', '.join(module.ATTACHES)} | {what} | {', '.join(others)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
