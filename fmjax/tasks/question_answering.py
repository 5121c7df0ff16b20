"""Extractive question answering: the span of a context that answers a question, or none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.data.records import Questions
from fmjax.data.windows import OUTSIDE, QuestionWindows
from fmjax.metrics.spans import best_threshold, squad_metrics
from fmjax.tasks.apply import apply_fn, collect_ragged, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def loss(model: Any, *, train: bool = True) -> LossFn:
    """Cross-entropy (nats) of the first and of the last token of the answer, the mean of both.

    Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3. A batch has ``start_positions`` and
    ``end_positions`` int [B]; both are the class token's where there is no answer. A row with one
    outside of 0 ... T - 1 does not count. ``weight`` [B].

    Args:
        model: with the head ``question_answering``.
        train: whether dropout is on.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        ends = (output.start_logits, output.end_logits)  # [B, T] each
        places = [jnp.asarray(batch[f"{name}_positions"]) for name in ("start", "end")]  # [B]
        weights = row_weights(batch, len(places[0]))
        losses, right = jnp.zeros(weights.shape), jnp.ones(weights.shape, bool)
        for logits, place in zip(ends, places, strict=True):
            assert logits is not None
            length = logits.shape[1]
            inside = (place >= 0) & (place < length)
            weights = jnp.where(inside, weights, 0.0)
            losses += 0.5 * optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.clip(place, 0, length - 1)
            )
            right &= jnp.argmax(logits, axis=-1) == place
        mean = Mean.of(losses, weights)
        accuracy = Mean.of(right, weights)  # both ends
        return mean.value, Aux(mean.weight, {"accuracy": accuracy}, updates)

    return loss_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, 2, T]``: logits of each token as the answer's first and last."""
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        output = apply(variables, batch, None, train=False)[0]
        assert output.start_logits is not None
        assert output.end_logits is not None
        return jnp.stack([output.start_logits, output.end_logits], axis=1)

    return predict_fn


class Candidate(NamedTuple):
    """A possible answer.

    Args:
        text: "" says that there is none.
        score: sum of both ends' logits.
        probability: softmax of the scores over all candidates of the question.
        start, end: its characters in the context, from and up to; 0 and 0 for none.
    """

    text: str
    score: float
    probability: float
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one question.

    Args:
        text: the answer, "" for none.
        no_answer: score of no answer minus that of the best answer, in units of logits.
        candidates: possible answers, best first.
    """

    text: str
    no_answer: float
    candidates: tuple[Candidate, ...]

    @property
    def forced(self) -> str:
        """The best answer, if there must be one."""
        return next((c.text for c in self.candidates if c.text), "")


def best_spans(
    logits: Sequence[np.ndarray],
    windows: QuestionWindows,
    contexts: Sequence[str],
    *,
    num_best: int = 20,
    max_answer_length: int = 30,
    no_answer_threshold: float | None = 0.0,
) -> list[Prediction]:
    """Answers from the logits of overlapping windows, as BERT's run_squad.py decodes them.

    In each window the `num_best` best first and last tokens of the context are combined to spans
    of at most `max_answer_length` tokens. A token that several windows have starts a span only in
    that one which shows most of what is around it. The score of no answer is the least that the
    class token has in any window.

    Args:
        logits: W arrays [2, T], see `predict`; padding behind a window's tokens is ignored.
        windows: of N questions.
        contexts: N texts.
        num_best: B, how many candidates there are.
        max_answer_length: in tokens.
        no_answer_threshold: "" is the answer where `Prediction.no_answer` is above it; None
            answers every question.

    Returns:
        N predictions.

    Raises:
        ValueError: numbers that do not belong together or are out of range.
    """
    problems = []
    if len(logits) != len(windows):
        problems.append(f"logits of {len(logits)} windows for {len(windows)}")
    for name, value in (("num_best", num_best), ("max_answer_length", max_answer_length)):
        if value < 1:
            problems.append(f"{name} is {value}; it must be at least 1")
    if len(windows) and int(windows.question.max()) >= len(contexts):
        problems.append(f"the windows are of more than {len(contexts)} contexts")
    if problems:
        raise ValueError("cannot decode answers: " + "; ".join(problems))
    bounds = np.searchsorted(windows.question, np.arange(len(contexts) + 1))
    return [
        _best_of(
            logits, windows, range(first, last), contexts[n],
            num_best, max_answer_length, no_answer_threshold,
        )
        for n, (first, last) in enumerate(itertools.pairwise(bounds.tolist()))
    ]  # fmt: skip


def _best_of(
    logits: Sequence[np.ndarray],
    windows: QuestionWindows,
    numbers: range,
    context: str,
    num_best: int,
    max_answer_length: int,
    threshold: float | None,
) -> Prediction:
    """The answer to the question of the windows with these numbers."""
    none = np.inf
    scores, spans = [], []
    for number, may_start in zip(
        numbers, _widest([windows.offsets_of(w) for w in numbers]), strict=True
    ):
        offsets = windows.offsets_of(number)
        start, end = np.asarray(logits[number], np.float64)[:, : len(offsets)]  # [T] each
        cls = windows.cls[number]
        none = min(none, float(start[cls] + end[cls]))
        inside = offsets[:, 0] != OUTSIDE
        firsts = _best(np.where(inside & may_start, start, -np.inf), num_best)
        lasts = _best(np.where(inside, end, -np.inf), num_best)
        both = start[firsts][:, None] + end[lasts][None, :]
        length = lasts[None, :] - firsts[:, None] + 1
        rows, columns = np.nonzero((length >= 1) & (length <= max_answer_length))
        scores.append(both[rows, columns])
        spans.append(np.stack([offsets[firsts[rows], 0], offsets[lasts[columns], 1]], axis=1))
    score = np.concatenate([np.zeros(0), *scores])
    span = np.concatenate([np.zeros((0, 2), np.int64), *spans])
    found: dict[str, tuple[float, int, int]] = {}
    for at in np.argsort(-score, kind="stable"):
        begin, end = int(span[at, 0]), int(span[at, 1])
        found.setdefault(context[begin:end], (float(score[at]), begin, end))
        if len(found) == num_best:
            break
    best = max((value[0] for value in found.values()), default=-np.inf)
    no_answer = none - best
    if threshold is not None or not found:
        found[""] = (none, 0, 0)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    values = np.array([value[0] for _, value in ranked])
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    candidates = tuple(
        Candidate(text, value[0], float(share), *value[1:])
        for (text, value), share in zip(ranked, shares, strict=True)
    )
    say_none = best == -np.inf or (threshold is not None and no_answer > threshold)
    found_text = next((c.text for c in candidates if c.text), "")
    return Prediction("" if say_none else found_text, no_answer, candidates)


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest finite values, largest first."""
    order = np.argsort(-values, kind="stable")[:count]
    return order[values[order] > -np.inf]


def _widest(offsets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each window, bool [T]: whether no other shows more of what is around the token.

    What is around is the lesser of the tokens of the context to its left and to its right; of
    equal ones the longer window wins, and then the first.
    """
    best: dict[int, tuple[float, int]] = {}
    places = [np.flatnonzero(window[:, 0] != OUTSIDE) for window in offsets]
    for number, (window, inside) in enumerate(zip(offsets, places, strict=True)):
        count = len(inside)
        around = np.minimum(np.arange(count), np.arange(count)[::-1]) + 0.01 * count
        for begin, value in zip(window[inside, 0].tolist(), around.tolist(), strict=True):
            if begin not in best or value > best[begin][0]:
                best[begin] = (value, number)
    masks = []
    for number, (window, inside) in enumerate(zip(offsets, places, strict=True)):
        mask = np.zeros(len(window), bool)
        mask[inside] = [best[begin][1] == number for begin in window[inside, 0].tolist()]
        masks.append(mask)
    return masks


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to a whole set, in its order, and what they are worth.

    Args:
        predictions: N.
        metrics: plain numbers, ready for JSON.
    """

    predictions: list[Prediction]
    metrics: dict[str, float]


def answer(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    windows: QuestionWindows,
    contexts: Sequence[str],
    **settings: Any,
) -> list[Prediction]:
    """Answers N questions.

    Args:
        model: with the head ``question_answering``.
        variables: its variables.
        batches: one epoch of the windows' columns.
        windows: of the questions.
        contexts: N texts.
        settings: of `best_spans`.
    """
    predict_fn = jax.jit(once(predict, model))

    def rows(variables: Variables, batch: Batch) -> np.ndarray:
        return np.asarray(predict_fn(variables, batch))

    logits = collect_ragged(rows, variables, batches, size=len(windows))
    return best_spans(logits, windows, contexts, **settings)


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    windows: QuestionWindows,
    questions: Questions,
    *,
    num_best: int = 20,
    max_answer_length: int = 30,
    no_answer_threshold: float = 0.0,
) -> Evaluation:
    """Answers a whole set and scores it as SQuAD does.

    Args:
        model, variables, batches, windows: see `answer`.
        questions: with their answers. Where each has one, "no answer" is never said.
        num_best, max_answer_length, no_answer_threshold: see `best_spans`.

    Returns:
        Metrics are those of `squad_metrics` and, where questions have no answer, those of
        `best_threshold`.

    Raises:
        ValueError: the questions' answers are not known.
    """
    if questions.answers is None:
        raise ValueError("these questions have no answers to compare with; use answer()")
    true = [[text for text, _ in several] for several in questions.answers]
    all_answered = all(true)
    predictions = answer(
        model,
        variables,
        batches,
        windows,
        questions.contexts,
        num_best=num_best,
        max_answer_length=max_answer_length,
        no_answer_threshold=None if all_answered else no_answer_threshold,
    )
    metrics = squad_metrics([prediction.text for prediction in predictions], true)
    if not all_answered:
        metrics |= best_threshold(
            [prediction.forced for prediction in predictions],
            true,
            [prediction.no_answer for prediction in predictions],
        )
    return Evaluation(predictions, metrics)
