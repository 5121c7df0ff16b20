"""Preference learning: from pairs of responses to a prompt, one chosen and one rejected.

A reward model by Bradley and Terry (Stiennon et al. 2020, arXiv:2009.01325, section 3.4; Ouyang et
al. 2022, arXiv:2203.02155, equation 1), and losses that train the language model itself on pairs:
DPO (Rafailov et al. 2023, arXiv:2305.18290), IPO (Azar et al. 2023, arXiv:2310.12036), ORPO (Hong
et al. 2024, arXiv:2403.07691) and SimPO (Meng et al. 2024, arXiv:2405.14734).

A batch of B pairs has, for ``chosen_`` and ``rejected_`` each (`fmjax.data.encode_preferences`):
``input_ids`` and ``attention_mask`` [B, T], and for language models ``labels`` [B, T], -100 outside
the response (not shifted); and perhaps ``weight`` [B], 0 for padding rows. Of encoder-decoders,
that describe pictures or write down sounds, both responses are to one source: it has
``chosen_labels`` and ``rejected_labels`` alone, beside ``pixel_values``, ``input_values``,
``input_features`` or ``input_ids``, and perhaps their ``attention_mask``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.generate.inputs import SOURCES
from fmjax.methods.adapted_layers import without_adapters
from fmjax.tasks import causal_lm, seq2seq
from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE, IGNORED
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("variables", "loss")

REFERENCE = "reference"
"""The collection of the frozen policy that a loss compares with: collections of its own."""
KINDS = ("chosen", "rejected")


def with_reference(variables: Variables) -> Variables:
    """The variables and, in the collection ``reference``, a copy of them that does not train.

    Args:
        variables: a policy's; a reference that they have already is replaced.
    """
    policy = policy_of(variables)
    return {**policy, REFERENCE: jax.tree.map(jnp.copy, policy)}


def policy_of(variables: Variables) -> Variables:
    """The variables without the reference: what the model is applied with, and what is saved."""
    return {name: value for name, value in variables.items() if name != REFERENCE}


def reference_of(variables: Variables) -> Variables | None:
    """The reference's variables: the collection ``reference``; else, of a model with adapters, the
    model without them; else None."""
    if REFERENCE in variables:
        return variables[REFERENCE]
    return without_adapters(variables) if "adapters" in variables else None


class Sequences(NamedTuple):
    """Log-probabilities of responses.

    Args:
        log_probs: float32 [B], of all of a response's tokens, in nats.
        tokens: float32 [B], how many they are.
        updates: new values of mutable collections.
    """

    log_probs: Array
    tokens: Array
    updates: Variables

    @property
    def mean(self) -> Array:
        """float32 [B]: log-probability a token."""
        return self.log_probs / jnp.maximum(self.tokens, 1.0)


def sequence_log_probs(
    model: Any, *, train: bool = False, chunk_size: int = CHUNK_SIZE
) -> Callable[[Variables, Batch, Array | None], Sequences]:
    """``(variables, batch, rng) -> Sequences``: the log-probability of each row's labels.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        train: whether dropout is on.
        chunk_size: see `fmjax.tasks.vocabulary_loss`; logits exist for a chunk of tokens only.

    Raises:
        ValueError: another head.
    """
    scorers = {
        "causal_lm": causal_lm.token_log_probs,
        "seq2seq_lm": seq2seq.token_log_probs,
    }
    if model.head not in scorers:
        raise ValueError(
            f"the head is {model.head!r}; log-probabilities of responses are of {list(scorers)}"
        )
    score = scorers[model.head](model, train=train, chunk_size=chunk_size)

    def sequences(variables: Variables, batch: Batch, rng: Array | None) -> Sequences:
        found = score(variables, batch, rng)
        return Sequences(found.log_probs.sum(axis=1), found.mask.sum(axis=1) * 1.0, found.updates)

    return sequences


def pair_rows(batch: Batch, pad_id: int = 0, kinds: tuple[str, str] = KINDS) -> dict[str, Array]:
    """Both sequences of every pair as rows of one batch, [2 B, T]: chosen, rejected, chosen, ...

    Neighbours stay on the device that has the pair. The shorter T is padded to the longer one.

    Args:
        batch: names with the prefixes ``chosen_`` and ``rejected_``; others are left out, but what
            an encoder reads where both sides are labels alone: it is repeated.
        pad_id: what ``input_ids`` are padded with.
        kinds: other prefixes, without the underscore.

    Raises:
        ValueError: a name that only one of the two has, or neither ``input_ids`` nor a source.
    """
    sides = [
        {name.removeprefix(f"{kind}_"): jnp.asarray(batch[name])
         for name in batch if name.startswith(f"{kind}_")}
        for kind in kinds
    ]  # fmt: skip
    shared: list[str] = []
    if sides[0].keys() == sides[1].keys() == {"labels"}:
        shared = [name for name in (*SOURCES, "attention_mask") if name in batch]
    if sides[0].keys() != sides[1].keys() or not ("input_ids" in sides[0] or shared):
        raise ValueError(
            f"a batch of pairs needs {kinds[0]}_input_ids and {kinds[1]}_input_ids, or, beside one "
            f"of {list(SOURCES)}, {kinds[0]}_labels and {kinds[1]}_labels alone, and the same "
            f"names for both; it has {sorted(sides[0])} of {kinds[0]}, {sorted(sides[1])} of "
            f"{kinds[1]} and {sorted(set(batch) & set(SOURCES))}"
        )
    fill = {"labels": IGNORED, "input_ids": pad_id}
    joined = {name: jnp.repeat(jnp.asarray(batch[name]), 2, axis=0) for name in shared}
    for name, chosen in sides[0].items():
        pair = chosen, sides[1][name]
        length = max(part.shape[1] for part in pair)
        padded = [
            jnp.pad(part, ((0, 0), (0, length - part.shape[1])), constant_values=fill.get(name, 0))
            for part in pair
        ]
        joined[name] = jnp.stack(padded, axis=1).reshape(-1, length)  # [2 B, T]
    return joined


def _halves(values: Array) -> tuple[Array, Array]:
    """[2 B] of `pair_rows` -> chosen [B], rejected [B]."""
    return values[0::2], values[1::2]


def _found(
    losses: Array, chosen: Array, rejected: Array, weights: Array, updates: Variables, **more: Array
) -> tuple[Array, Aux]:
    """The mean loss over pairs, and what it says of rewards [B] of both sides."""
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": chosen > rejected,
        **more,
    }
    mean = Mean.of(losses, weights)
    means = {
        name: Mean.of(jax.lax.stop_gradient(values), weights) for name, values in metrics.items()
    }
    return mean.value, Aux(mean.weight, means, updates)


def reward_loss(model: Any, *, train: bool = True) -> LossFn:
    """-log sigmoid(r(chosen) - r(rejected) - margin), a mean over pairs, in nats.

    Ouyang et al. 2022, arXiv:2203.02155, equation 1: all pairs of one prompt's K responses belong
    into one batch, with the ``weight`` 1 / (K choose 2) each. The batch's ``margin`` [B], where it
    has one, is by how much more the chosen one is to get (Touvron et al. 2023, arXiv:2307.09288,
    equation 2).

    Args:
        model: with the head ``sequence_classification`` and one label.
        train: whether dropout is on.

    Raises:
        ValueError: another head, or several labels.
    """
    if model.head != "sequence_classification" or len(model.config.id2label) != 1:
        labels = "" if model.head != "sequence_classification" else f", {model.config.id2label}"
        raise ValueError(
            f"the head is {model.head!r}{labels}; a reward model has the head "
            "'sequence_classification' with one label: fmjax.load(..., num_labels=1)"
        )
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        rows = pair_rows(batch, model.config.pad_token_id or 0)
        output, updates = apply(policy_of(variables), rows, rng, train=train)
        assert output.logits is not None
        chosen, rejected = _halves(output.logits[:, 0])
        losses = -jax.nn.log_sigmoid(chosen - rejected - jnp.asarray(batch.get("margin", 0.0)))
        return _found(losses, chosen, rejected, row_weights(batch), updates)

    return loss_fn


DpoKind = Literal["sigmoid", "ipo", "hinge"]


def dpo_losses(
    log_ratio: Array, *, beta: float, label_smoothing: float = 0.0, kind: DpoKind = "sigmoid"
) -> Array:
    """Losses [B] of how much more the policy than its reference prefers the chosen responses.

    Args:
        log_ratio: [B], log(pi(chosen) / pi(rejected)) less the same of the reference, in nats.
        beta, label_smoothing, kind: see `dpo_loss`.
    """
    if kind == "ipo":
        return jnp.square(log_ratio - 1 / (2 * beta))
    if kind == "hinge":
        return jax.nn.relu(1 - beta * log_ratio)
    right, wrong = jax.nn.log_sigmoid(beta * log_ratio), jax.nn.log_sigmoid(-beta * log_ratio)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def dpo_loss(
    model: Any,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: DpoKind = "sigmoid",
    train: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    The reference's log-probabilities are the batch's ``ref_chosen_logps`` and
    ``ref_rejected_logps`` [B] (see `reference_log_probs`); or they are computed with what
    `reference_of` finds. At the beginning the loss is log 2.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        beta: how much a nat of log-ratio is worth; the larger, the nearer to the reference.
        label_smoothing: e, the probability that a label is flipped: -(1 - e) log sigmoid(x)
            - e log sigmoid(-x) (conservative DPO, Mitchell 2023).
        kind: "sigmoid" as above; "ipo", (h - 1 / (2 beta))^2 of the log-ratio h of whole responses
            (Azar et al. 2023, arXiv:2310.12036, equation 17, where beta is tau); "hinge",
            max(0, 1 - beta h) (Zhao et al. 2023, arXiv:2305.10425, with the reference as in Liu et
            al. 2023, arXiv:2309.06657).
        train: whether dropout is on; the reference has none.
        chunk_size: see `sequence_log_probs`.

    Raises:
        ValueError: numbers out of range; when called, no reference, or two.
    """
    problems = []
    if not beta > 0:
        problems.append(f"beta={beta} must be positive")
    if not 0 <= label_smoothing < 0.5:
        problems.append(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): at half the labels say nothing"
        )
    if kind not in ("sigmoid", "ipo", "hinge"):
        problems.append(f"kind={kind!r} is not one of 'sigmoid', 'ipo', 'hinge'")
    elif label_smoothing and kind != "sigmoid":
        problems.append(f"label_smoothing is of kind='sigmoid', not of {kind!r}")
    if problems:
        raise ValueError("dpo_loss: " + "; ".join(problems))
    policy = sequence_log_probs(model, train=train, chunk_size=chunk_size)
    reference = reference_log_probs(model, chunk_size=chunk_size)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        before = reference(variables, batch)
        found = policy(policy_of(variables), pair_rows(batch), rng)
        chosen, rejected = _halves(found.log_probs)
        ratios = chosen - before["ref_chosen_logps"], rejected - before["ref_rejected_logps"]
        losses = dpo_losses(
            ratios[0] - ratios[1], beta=beta, label_smoothing=label_smoothing, kind=kind
        )
        nll = -_halves(found.mean)[0]
        scaled = beta * ratios[0], beta * ratios[1]
        return _found(losses, *scaled, row_weights(batch), found.updates, nll=nll)

    return loss_fn


def reference_log_probs(
    model: Any, *, chunk_size: int = CHUNK_SIZE, kinds: tuple[str, str] = KINDS
) -> Callable[[Variables, Batch], dict[str, Array]]:
    """``(variables, batch) -> {"ref_chosen_logps", "ref_rejected_logps"}``, [B] each, in nats.

    Those of the batch, where it has them; else computed, without a gradient. Computed once for a
    data set and kept as columns of it, they spare each step the reference.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        chunk_size: see `sequence_log_probs`.
        kinds: see `pair_rows`.

    Raises:
        ValueError: when called, no reference, or two.
    """
    names = tuple(f"ref_{kind}_logps" for kind in kinds)
    sequences = sequence_log_probs(model, chunk_size=chunk_size)

    def log_probs(variables: Variables, batch: Batch) -> dict[str, Array]:
        given = [name for name in names if name in batch]
        if given and (len(given) == 1 or REFERENCE in variables):
            raise ValueError(
                f"the batch has {given} and the variables {'a' if REFERENCE in variables else 'no'}"
                f" reference; give both of {list(names)} and no reference, or a reference alone"
            )
        if given:
            return {name: jnp.asarray(batch[name], jnp.float32) for name in names}
        reference = reference_of(variables)
        if reference is None:
            raise ValueError(
                "there is no reference to compare with: train with_reference(variables), or "
                f"adapters, or give {list(names)} in the batch"
            )
        rows = pair_rows(batch, kinds=kinds)
        found = sequences(jax.lax.stop_gradient(reference), rows, None)
        halves = _halves(jax.lax.stop_gradient(found.log_probs))
        return dict(zip(names, halves, strict=True))

    return log_probs


def log_odds(mean_log_prob: Array) -> Array:
    """log(p / (1 - p)) of log p, in nats (Hong et al. 2024, arXiv:2403.07691, equation 4).

    A p that float32 does not tell from 1 counts as just below it.
    """
    x = jnp.minimum(mean_log_prob, -1e-7)
    small = x < -0.5
    # log(1 - exp(x)) without cancellation on either side of the cut; each branch is given numbers
    # of its own side, so that the gradient of the other one is finite.
    far = jnp.log1p(-jnp.exp(jnp.where(small, x, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(small, -0.1, x)))
    return x - jnp.where(small, far, near)


def orpo_loss(
    model: Any,
    *,
    odds_weight: float = 0.1,
    train: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7).

    The chosen response's negative log-likelihood a token, plus `odds_weight` times
    -log sigmoid(log(odds(chosen) / odds(rejected))), where a response's probability is the
    geometric mean of its tokens'. It needs no reference. Both are means over pairs.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        odds_weight: lambda there.
        train: whether dropout is on.
        chunk_size: see `sequence_log_probs`.

    Raises:
        ValueError: a weight below 0, or another head.
    """
    if not odds_weight >= 0:
        raise ValueError(f"orpo_loss: odds_weight={odds_weight} must not be negative")
    policy = sequence_log_probs(model, train=train, chunk_size=chunk_size)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        found = policy(policy_of(variables), pair_rows(batch), rng)
        chosen, rejected = _halves(found.mean)
        log_odds_ratio = log_odds(chosen) - log_odds(rejected)
        odds = -jax.nn.log_sigmoid(log_odds_ratio)
        return _found(
            -chosen + odds_weight * odds,
            odds_weight * chosen,
            odds_weight * rejected,
            row_weights(batch),
            found.updates,
            nll=-chosen,
            odds=odds,
            log_odds_ratio=log_odds_ratio,
        )

    return loss_fn


def simpo_loss(
    model: Any,
    *,
    beta: float = 2.0,
    margin: float = 1.0,
    train: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6).

    -log sigmoid(beta * (mean log-probability a token of chosen less that of rejected) - margin);
    it needs no reference.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        beta: scale of the rewards.
        margin: gamma there, by how much more the chosen one is to get.
        train: whether dropout is on.
        chunk_size: see `sequence_log_probs`.

    Raises:
        ValueError: numbers out of range, or another head.
    """
    if not (beta > 0 and margin >= 0):
        raise ValueError(
            f"simpo_loss: beta={beta} must be positive and margin={margin} not negative"
        )
    policy = sequence_log_probs(model, train=train, chunk_size=chunk_size)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        found = policy(policy_of(variables), pair_rows(batch), rng)
        chosen, rejected = _halves(found.mean)
        losses = -jax.nn.log_sigmoid(beta * (chosen - rejected) - margin)
        scaled = beta * chosen, beta * rejected
        return _found(losses, *scaled, row_weights(batch), found.updates, nll=-chosen)

    return loss_fn
