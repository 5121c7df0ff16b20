"""In what a student follows its teacher: terms of `fmjax.methods.distillation.distilled`.

Soft labels (Hinton et al. 2015, arXiv:1503.02531), logits (Ba and Caruana 2014, arXiv:1312.6184),
hidden states, through a learned projection where widths differ (FitNets: Romero et al. 2014,
arXiv:1412.6550; TinyBERT: Jiao et al. 2019, arXiv:1909.10351), their directions (DistilBERT: Sanh
et al. 2019, arXiv:1910.01108), attention (TinyBERT), and attention with the values' relations
(MiniLM: Wang et al. 2020, arXiv:2002.10957). All means are over rows or tokens that count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import fmjax.hub as hub
from fmjax.tasks.apply import row_weights
from fmjax.tasks.causal_lm import next_tokens
from fmjax.tasks.feature_extraction import states_mask
from fmjax.tasks.masking import weigh
from fmjax.tasks.sequence_classification import SINGLE, problem_type_of
from fmjax.tasks.vocabulary_loss import Unembed, over_vocabulary
from fmjax.tree import flatten
from fmjax.types import Batch, Mean, Output

ATTACHES = ("loss",)


class Both(NamedTuple):
    """What both models gave for one batch; nothing of the teacher has a gradient.

    Args:
        batch: as the loss was given it.
        head: the student's.
        student, teacher: their outputs; where the head of a vocabulary was left out, with
            ``last_hidden_state``, whose logits `unembed_student` and `unembed_teacher` make.
        student_values, teacher_values: of each layer with values of its own, by the layer's path,
            [B, T, D]; empty unless a term asks for them.
        projections: kernels [D, D of the teacher], by name.
    """

    batch: Batch
    head: str
    student: Output
    teacher: Output
    unembed_student: Unembed
    unembed_teacher: Unembed
    student_values: Mapping[str, Array]
    teacher_values: Mapping[str, Array]
    projections: Mapping[str, Array]


Weights = Callable[[Batch], Array]
"""batch -> how much each row [B], or each token [B, T], counts."""


class Term(NamedTuple):
    """One thing in which a student follows its teacher.

    Args:
        name: of its metric.
        loss: the mean over what the batch's weights count.
        asks: options of both models' calls, such as ``output_hidden_states``.
        values: whether it reads the values of attention.
        problems: (student, teacher) -> what makes it impossible.
    """

    name: str
    loss: Callable[[Both], Mean]
    asks: tuple[str, ...] = ()
    values: bool = False
    problems: Callable[[Any, Any], list[str]] = lambda student, teacher: []


def soft_labels(temperature: float = 2.0, *, weights: Weights | None = None) -> Term:
    """``T^2 KL(teacher || student)`` of softmax(logits / T), nats (Hinton et al. 2015, section 2).

    The factor T^2 keeps gradients of one size whatever the temperature is. Over classes, over each
    token's classes or words (those that the task predicts: labels other than -100; without labels,
    tokens that are no padding), over the positions of both ends of an answer. Logits over a
    vocabulary exist for one chunk of tokens at a time.

    Args:
        temperature: T.
        weights: what counts, where it is not what the task counts.
    """

    def divergence(student: Array, teacher: Array) -> Array:  # [..., C] twice -> [...]
        ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
        return temperature**2 * optax.losses.kl_divergence_with_log_targets(ours, theirs)

    def problems(student: Any, teacher: Any) -> list[str]:
        found = _other_heads(student, teacher)
        if not 0 < temperature < math.inf:
            found.append(f"temperature is {temperature}; it must be above 0")
        if (
            student.head in ("sequence_classification", "image_classification")
            and (kind := problem_type_of(student)) != SINGLE
        ):
            found.append(f"soft labels are of classes, and problem_type is {kind}: use same_logits")
        return found

    return Term("soft", _over_logits(divergence, weights), problems=problems)


def same_logits(*, weights: Weights | None = None) -> Term:
    """Mean squared difference of logits (Ba and Caruana 2014, arXiv:1312.6184, equation 1).

    Half of it is what soft labels become at high temperatures, where the logits of each example
    have mean zero (Hinton et al. 2015, section 2.1). Of regressions and several labels too.
    """

    def distance(student: Array, teacher: Array) -> Array:
        return jnp.square(student - teacher).mean(axis=-1)

    return Term("logits", _over_logits(distance, weights), problems=_other_heads)


def same_probabilities(*, weights: Weights | None = None) -> Term:
    """Mean squared difference of softmax(logits): mean teacher's consistency cost (Tarvainen and
    Valpola 2017, section 2 and appendix B). Rows without labels take part where ``weights`` says
    so and the batch's ``weight`` is 0.
    """

    def distance(student: Array, teacher: Array) -> Array:
        return jnp.square(jax.nn.softmax(student) - jax.nn.softmax(teacher)).mean(axis=-1)

    return Term("consistency", _over_logits(distance, weights), problems=_other_heads)


def same_hidden_states(
    layers: Mapping[int, int], *, projected: bool = False, weights: Weights | None = None
) -> Term:
    """Mean squared difference of hidden states (Jiao et al. 2019, equations 8 and 9), a mean over
    the layers of the map; with learned projections of the student's, as FitNets' hints have them
    (Romero et al. 2014, equation 3).

    Args:
        layers: which of the student's follows which of the teacher's; 0 is the embeddings, m is
            layer m's output. See `evenly`.
        projected: whether the collection "projections" has a kernel for each (`with_projections`);
            needed where widths differ.
        weights: what counts; by default tokens that are no padding.
    """

    def loss(both: Both) -> Mean:
        means = []
        for ours, theirs in layers.items():
            state = _layer(both.student.hidden_states, ours, "student")
            target = _layer(both.teacher.hidden_states, theirs, "teacher")
            if projected:
                if (name := f"hidden_{ours}/kernel") not in both.projections:
                    raise ValueError(f"the variables have no projection {name}; with_projections")
                state = state @ both.projections[name].astype(state.dtype)
            if state.shape != target.shape:
                raise ValueError(
                    f"the student's hidden state {ours} has shape {state.shape}, the teacher's "
                    f"{theirs} has {target.shape}; give projected=True and with_projections"
                )
            apart = jnp.square(state.astype(jnp.float32) - target.astype(jnp.float32))
            means.append(_counted(both, apart.mean(axis=-1), weights))
        return _average(means)

    return Term(
        "hidden",
        loss,
        asks=("output_hidden_states",),
        problems=lambda student, teacher: _layer_problems(layers, 0),
    )


def last_directions(*, weights: Weights | None = None) -> Term:
    """``1 - cos`` of the last hidden states (Sanh et al. 2019, section 3), over tokens that are no
    padding."""

    def loss(both: Both) -> Mean:
        student = _layer(both.student.hidden_states, -1, "student")
        teacher = _layer(both.teacher.hidden_states, -1, "teacher")
        if student.shape != teacher.shape:
            raise ValueError(
                f"last hidden states have shapes {student.shape} (student) and {teacher.shape} "
                "(teacher); directions are compared at one width"
            )
        cosine = optax.losses.cosine_similarity(
            student.astype(jnp.float32), teacher.astype(jnp.float32), epsilon=1e-12
        )
        return _counted(both, 1 - cosine, weights)

    return Term("direction", loss, asks=("output_hidden_states",))


def same_attention(layers: Mapping[int, int], *, weights: Weights | None = None) -> Term:
    """Mean squared difference of attention (Jiao et al. 2019, equation 7), a mean over layers,
    heads and keys.

    Of probabilities; the paper found that scores before the softmax, which models here do not
    give, are learnt faster.

    Args:
        layers: student layer -> teacher layer, from 1 on.
        weights: which queries count; by default those that are no padding.
    """

    def loss(both: Both) -> Mean:
        means = []
        for ours, theirs in layers.items():
            student, teacher = _attention(both, ours - 1, theirs - 1)
            apart = jnp.square(student - teacher)  # [B, H, T, S]
            means.append(_counted(both, apart.mean(axis=(1, 3)), weights))
        return _average(means)

    return Term(
        "attention",
        loss,
        asks=("output_attentions",),
        problems=lambda student, teacher: _layer_problems(layers, 1),
    )


def last_relations(*, weights: Weights | None = None) -> Term:
    """MiniLM: KL of the last layer's attention and of its values' relations, nats (Wang et al.
    2020, equations 6 to 8).

    A relation is softmax(V V^T / sqrt(K)) of each head; widths may differ, numbers of heads not.
    For models with the parameters ``attn/value`` of their own in layers that are not scanned.
    """

    def loss(both: Both) -> Mean:
        student, teacher = _attention(both, -1, -1)
        heads = student.shape[1]
        mask = states_mask(both.student, both.batch)
        keep = None
        if mask is not None and mask.ndim == 2:
            keep = jnp.asarray(mask)[:, None, None, :] != 0
        total = _divergence(student, teacher)  # [B, H, T]
        total += _divergence(
            _relations(both.student_values, heads, keep),
            _relations(both.teacher_values, heads, keep),
        )
        return _counted(both, total.mean(axis=1), weights)

    def problems(student: Any, teacher: Any) -> list[str]:
        found = []
        for who, model in (("student", student), ("teacher", teacher)):
            if model.scan:
                found.append(f"the {who} scans its layers, whose values cannot be read: scan=False")
                continue
            paths = [p.partition("/")[2] for p in flatten(hub.abstract_variables(model))]
            if not any(map(_VALUE.match, paths)):
                found.append(f"the {who}'s layers have no attn/value of their own")
        return found

    return Term("relations", loss, asks=("output_attentions",), values=True, problems=problems)


def evenly(student_layers: int, teacher_layers: int, *, embeddings: bool = False) -> dict[int, int]:
    """The uniform map of layers: m -> m * teacher's / student's (Jiao et al. 2019, section 4.1).

    >>> evenly(3, 6, embeddings=True)
    {0: 0, 1: 2, 2: 4, 3: 6}

    Raises:
        ValueError: the teacher's layers are no multiple of the student's.
    """
    if student_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            f"{teacher_layers} layers of the teacher are no multiple of the student's "
            f"{student_layers}; write the map yourself"
        )
    step = teacher_layers // student_layers
    return {m: m * step for m in range(0 if embeddings else 1, student_layers + 1)}


def _other_heads(student: Any, teacher: Any) -> list[str]:
    """What keeps logits from being compared."""
    if student.head != teacher.head:
        return [
            f"the student's head is {student.head!r}, the teacher's {teacher.head!r}; logits are "
            "compared between the same heads"
        ]
    return ["the head 'model' has no logits"] if student.head == "model" else []


def _average(means: list[Mean]) -> Mean:
    """The mean of means over the same weights."""
    return Mean(jnp.mean(jnp.stack([mean.total for mean in means])), means[0].weight)


def _layer_problems(layers: Mapping[int, int], least: int) -> list[str]:
    if layers and min(*layers.keys(), *layers.values()) >= least:
        return []
    return [f"layers={dict(layers)} must map layers to layers, numbered from {least} on"]


def _layer(states: Sequence[Array] | None, number: int, who: str) -> Array:
    """One of the hidden states or attentions that a model was asked for."""
    if states is None:
        raise ValueError(f"the {who} gives no states of its layers")
    if number >= len(states):
        raise ValueError(f"the {who} has no layer {number} in {len(states)} states; see `evenly`")
    return states[number]


def _attention(both: Both, ours: int, theirs: int) -> tuple[Array, Array]:
    """Both models' probabilities [B, H, T, S], float32, by places in ``attentions``."""
    student = _layer(both.student.attentions, ours, "student")
    teacher = _layer(both.teacher.attentions, theirs, "teacher")
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention has shapes {student.shape} (student) and {teacher.shape} (teacher); heads "
            "are compared one by one, so there must be as many"
        )
    return student.astype(jnp.float32), teacher.astype(jnp.float32)


def _divergence(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) over the last axis of probabilities, nats."""
    tiny = jnp.finfo(jnp.float32).tiny
    apart = jnp.log(jnp.maximum(teacher, tiny)) - jnp.log(jnp.maximum(student, tiny))
    return jnp.sum(teacher * apart, axis=-1)


_VALUE = re.compile(r"layers_(\d+)/attn/value/")


def _relations(values: Mapping[str, Array], heads: int, keep: Array | None) -> Array:
    """softmax(V V^T / sqrt(K)) of the last layer, float32 [B, H, T, T]."""
    layers = {
        int(found[1]): value for path, value in values.items() if (found := _VALUE.match(path))
    }
    value = layers[max(layers)].astype(jnp.float32)  # [B, T, D]
    value = value.reshape(*value.shape[:2], heads, -1)  # [B, T, H, K]
    scores = jnp.einsum("BTHK,BSHK->BHTS", value, value) / math.sqrt(value.shape[-1])
    if keep is not None:
        scores += jnp.where(keep, 0.0, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores)


def _over_logits(
    fn: Callable[[Array, Array], Array], weights: Weights | None
) -> Callable[[Both], Mean]:
    """The mean of ``fn(student's logits, teacher's logits)``, [..., C] twice -> [...]."""

    def compared(student: Array, teacher: Array) -> Array:
        if student.shape != teacher.shape:
            raise ValueError(
                f"logits have shapes {student.shape} (student) and {teacher.shape} (teacher)"
            )
        return fn(student.astype(jnp.float32), teacher.astype(jnp.float32))

    def loss(both: Both) -> Mean:
        student, teacher = both.student, both.teacher
        found = [
            compared(ours, theirs)
            for ours, theirs in (
                (student.logits, teacher.logits),
                (student.start_logits, teacher.start_logits),
                (student.end_logits, teacher.end_logits),
            )
            if ours is not None and theirs is not None
        ]
        if found:
            losses = jnp.mean(jnp.stack(found), axis=0)
        else:
            hidden, states = student.last_hidden_state, teacher.last_hidden_state
            assert hidden is not None
            assert states is not None
            losses = over_vocabulary(
                both.unembed_student,
                lambda logits, states: compared(logits, both.unembed_teacher(states)),
                hidden,
                states,
            )
        return _counted(both, losses, weights, predicted=True)

    return loss


def _counted(
    both: Both, values: Array, weights: Weights | None, *, predicted: bool = False
) -> Mean:
    """The mean of values [B, ...], over what counts: rows or tokens.

    Args:
        predicted: whether the values are of predictions, which labels say to count or not.
    """
    if weights is not None:
        counts = jnp.asarray(weights(both.batch), jnp.float32)
    else:
        counts = _default_weights(both, values.shape, predicted)
    if values.shape[: counts.ndim] != counts.shape:
        raise ValueError(f"weights have shape {counts.shape}, and what they weigh {values.shape}")
    return Mean.of(values.reshape(*counts.shape, -1).mean(axis=-1), counts)


def _default_weights(both: Both, shape: tuple[int, ...], predicted: bool) -> Array:
    """[B, T] where the batch tells tokens apart, else [B]."""
    batch = both.batch
    counts = row_weights(batch, shape[0])
    if predicted and both.head == "causal_lm":
        return weigh(batch, next_tokens(batch))
    labels, kept = batch.get("labels"), both.student.state_mask
    decoded = both.student.encoder_last_hidden_state is not None
    if (predicted or decoded) and labels is not None and labels.shape == shape:
        return weigh(batch, jnp.asarray(labels))
    if not decoded and kept is not None and kept.shape == shape:
        return kept * counts[:, None]
    for name in ("attention_mask", "segment_ids"):
        if not decoded and name in batch and batch[name].shape == shape:
            return (jnp.asarray(batch[name]) != 0) * counts[:, None]
    return counts
