"""The span loss against PyTorch, decoding against trying every span, learning to answer."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.data.batches import batches
from fmjax.data.records import Answer, Questions
from fmjax.data.windows import OUTSIDE, encode_questions
from fmjax.models.bert import Config
from fmjax.tasks import question_answering as task
from fmjax.train import gradient, init_state, jit_step, make_train_step

CONFIG = Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
WORDS = "film story actor plot scene music long short quiet loud red blue".split()


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("bert", CONFIG, head="question_answering", rng=jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return fmjax.load_tokenizer(tiny_bert)


def make_questions(count, seed=0, answered=lambda n: True):
    """What comes after the word that the question is?"""
    draw = np.random.default_rng(seed)
    questions, contexts, answers = [], [], []
    for n in range(count):
        words = list(draw.permutation(WORDS)[: draw.integers(8, 12)])
        at = int(draw.integers(len(words) - 1))
        start = len(" ".join(words[: at + 1])) + 1
        questions.append(words[at])
        contexts.append(" ".join(words))
        answers.append([Answer(words[at + 1], start)] if answered(n) else [])
    return Questions([str(n) for n in range(count)], questions, contexts, answers)


def make_batch():
    draw = np.random.default_rng(0)
    return {
        "input_ids": draw.integers(1, 40, (4, 12)).astype(np.int32),
        "attention_mask": np.ones((4, 12), np.int32),
        "start_positions": np.array([3, 0, 5, 2], np.int32),
        "end_positions": np.array([4, 0, 9, 2], np.int32),
        "weight": np.ones(4, np.float32),
    }


def test_loss_and_gradient_equal_pytorch(model_and_variables, tmp_path):
    from transformers import BertForQuestionAnswering

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    batch = make_batch()
    batch["start_positions"][3] = batch["end_positions"][3] = 12  # was cut off
    tensors = {name: torch.tensor(v).long() for name, v in batch.items() if name != "weight"}
    reference = twin(**tensors).loss
    reference.backward()
    differentiate = jax.jit(gradient(task.loss(model, train=False)))
    grads, loss, aux = differentiate(variables, {}, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    assert float(aux.weight) == 3
    np.testing.assert_allclose(
        grads["params"]["head"]["classifier"]["kernel"].T, twin.qa_outputs.weight.grad, atol=1e-5
    )
    batch = make_batch() | {"weight": np.array([1, 1, 1, 0], np.float32)}
    _, same, aux = differentiate(variables, {}, batch, None)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert float(aux.weight) == 3


def every_span(logits, windows, context, longest):
    """All spans of one question's windows as (score, text), by the rules alone."""
    shown = {}
    for number in range(len(windows)):
        offsets = windows.offsets_of(number)
        inside = np.flatnonzero(offsets[:, 0] != OUTSIDE)
        for place in inside:
            around = min(place - inside[0], inside[-1] - place) + 0.01 * len(inside)
            begin = int(offsets[place, 0])
            if begin not in shown or around > shown[begin][0]:
                shown[begin] = (around, number)
    spans = []
    for number, (start, end) in enumerate(logits):
        offsets = windows.offsets_of(number)
        for i in range(len(offsets)):
            for j in range(i, min(i + longest, len(offsets))):
                if OUTSIDE in (offsets[i, 0], offsets[j, 0]) or shown[offsets[i, 0]][1] != number:
                    continue
                text = context[offsets[i, 0] : offsets[j, 1]]
                spans.append((float(start[i]) + float(end[j]), text))
    return sorted(spans, reverse=True)


def test_decoding_equals_trying_every_span(tokenizer):
    draw = np.random.default_rng(0)
    for seed in range(5):
        questions = make_questions(1, seed)
        windows = encode_questions(
            tokenizer, questions, max_length=10, doc_stride=2, max_question_length=1
        )
        assert len(windows) > 1
        context = questions.contexts[0]
        padded = draw.normal(size=(len(windows), 2, 16)).astype(np.float32)
        (found,) = task.best_spans(
            padded, windows, [context], num_best=100, max_answer_length=3, no_answer_threshold=None
        )
        sizes = [len(windows.offsets_of(n)) for n in range(len(windows))]
        kept = [row[:, :size] for row, size in zip(padded, sizes, strict=True)]
        spans = every_span(kept, windows, context, 3)
        assert found.text == spans[0][1] == found.forced
        texts = list(dict.fromkeys(text for _, text in spans))
        assert [c.text for c in found.candidates] == texts
        assert found.candidates[0].score == pytest.approx(spans[0][0], rel=1e-6)
        assert sum(c.probability for c in found.candidates) == pytest.approx(1)
        for c in found.candidates:
            assert context[c.start : c.end] == c.text
        none = min(float(row[:, 0].sum()) for row in kept)
        assert found.no_answer == pytest.approx(none - spans[0][0], rel=1e-5)
        for threshold, text in ((found.no_answer - 0.1, ""), (found.no_answer + 0.1, found.text)):
            (again,) = task.best_spans(
                padded, windows, [context], max_answer_length=3, no_answer_threshold=threshold
            )
            assert again.text == text
            assert again.forced == found.text
            assert {c.text for c in again.candidates} > {"", found.text}


@pytest.mark.slow
def test_answers_are_learnt(tokenizer):
    """EM and F1 rise from little to nearly everything, with questions that have no answer."""
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer), hidden_size=32)
    config = dataclasses.replace(config, num_hidden_layers=2, intermediate_size=64)
    model, variables = fmjax.create(
        "bert", config, head="question_answering", rng=jax.random.key(0)
    )
    questions = make_questions(16, answered=lambda n: n % 4 != 3)
    windows = encode_questions(
        tokenizer, questions, max_length=16, doc_stride=2, max_question_length=1
    )
    assert not windows.lost

    def epoch(**settings):
        return batches(windows.columns, batch_size=16, seed=0, buckets=[16], epochs=1, **settings)

    before = task.evaluate(model, variables, epoch(shuffle=False), windows, questions)
    tx = optax.adam(1e-2)
    state = init_state(variables, tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))
    rows = list(epoch(shuffle=False))
    for _ in range(60):
        for batch in rows:
            state, _ = step(state, batch)
    after = task.evaluate(model, state.trainable, epoch(shuffle=False), windows, questions)
    assert before.metrics["exact_match"] < 50
    assert after.metrics["exact_match"] > 90
    assert after.metrics["f1"] >= after.metrics["exact_match"]
    assert after.metrics["no_answer_total"] == 4
    assert after.metrics["best_exact_match"] >= after.metrics["exact_match"]


def test_bad_input_is_named(tokenizer, model_and_variables):
    questions = make_questions(2)
    windows = encode_questions(
        tokenizer, questions, max_length=16, doc_stride=2, max_question_length=1
    )
    with pytest.raises(ValueError, match=r"logits of 0 windows for 2.*num_best is 0"):
        task.best_spans([], windows, questions.contexts, num_best=0)
    with pytest.raises(ValueError, match="more than 1 contexts"):
        task.best_spans([np.zeros((2, 16))] * 2, windows, questions.contexts[:1])
    unknown = dataclasses.replace(questions, answers=None)
    with pytest.raises(ValueError, match=r"use answer\(\)"):
        task.evaluate(*model_and_variables, [], windows, unknown)
