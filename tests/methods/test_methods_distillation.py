"""Distillation's terms against torch, its limits, and what it trains with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from composition import check_trains
from torch.nn import functional as F

import fmjax
from fmjax.methods.distillation import (
    distilled,
    is_student,
    student_only,
    unlabelled,
    with_projections,
    with_teacher,
)
from fmjax.methods.distillation_terms import (
    Both,
    evenly,
    last_directions,
    last_relations,
    same_attention,
    same_hidden_states,
    same_logits,
    same_probabilities,
    soft_labels,
)
from fmjax.models import bert, cnn, gpt2, vgg
from fmjax.tasks import causal_lm, masked_lm, sentence_embedding
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.masking import Masking
from fmjax.train import accumulate, gradient
from fmjax.types import Output

CONFIG = bert.Config(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=16, initializer_range=0.3, id2label=("a", "b", "c"),
)  # fmt: skip
B, T = 4, 9


def make(seed, head="sequence_classification", **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return fmjax.create("bert", config, head=head, rng=jax.random.key(seed))


@pytest.fixture(scope="module")
def pair():
    """A model, and the weights of two."""
    model, student = make(0)
    return model, student, make(1)[1]


@pytest.fixture(scope="module")
def batch():
    """Two rows with padding, one of which does not count."""
    rng = np.random.default_rng(0)
    lengths = np.array([9, 5, 7, 9])
    return {
        "input_ids": rng.integers(1, 40, (B, T)).astype(np.int32),
        "attention_mask": (np.arange(T) < lengths[:, None]).astype(np.int32),
        "labels": np.array([0, 2, 1, 2], np.int32),
        "weight": np.array([1, 1, 0, 2], np.float32),
    }


TERMS = (
    (0.5, soft_labels(3.0)),
    (0.1, same_logits()),
    (0.2, same_probabilities()),
    (0.3, same_hidden_states({0: 0, 1: 2})),
    (0.4, last_directions()),
    (0.6, same_attention({1: 2, 2: 1})),
    (0.7, last_relations()),
)
quiet = functools.partial(task.loss, train=False)


@pytest.fixture(scope="module")
def everything(pair):
    """The gradient of all terms, compiled."""
    model = pair[0]
    return jax.jit(gradient(distilled(quiet, model, model, *TERMS, hard=0.25)))


def test_terms_equal_torch(pair, batch, everything):
    model, student, teacher = pair
    _, loss, aux = everything(student, {"teacher": teacher}, batch, None)

    @jax.jit
    def states(variables):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model.apply(variables, **inputs, output_hidden_states=True, output_attentions=True)

    def tensors(variables):
        out = states(variables)
        kept = {"logits": out.logits, "hidden": out.hidden_states, "attention": out.attentions}
        value = variables["params"]["layers_1"]["attn"]["value"]
        kept["values"] = out.hidden_states[1] @ value["kernel"] + value["bias"]
        return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), kept)

    s, t = tensors(student), tensors(teacher)
    rows = torch.tensor(batch["weight"])
    mask = torch.tensor(batch["attention_mask"])
    tokens = rows[:, None] * mask

    def mean(values, weights):
        return ((values * weights).sum() / weights.sum()).item()

    def kl(ours, theirs):  # of probabilities, over the last axis
        return F.kl_div(ours.clamp_min(1e-37).log(), theirs, reduction="none").sum(-1)

    def relations(values):
        v = values.reshape(B, T, 2, 8).transpose(1, 2)
        scores = v @ v.transpose(-1, -2) / 8**0.5
        return scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)

    soft = F.kl_div(
        F.log_softmax(s["logits"] / 3, -1), F.softmax(t["logits"] / 3, -1), reduction="none"
    )
    apart = [(s["hidden"][i] - t["hidden"][j]).square().mean(-1) for i, j in ((0, 0), (1, 2))]
    attention = [
        (s["attention"][i] - t["attention"][j]).square().mean((1, 3)) for i, j in ((0, 1), (1, 0))
    ]
    related = kl(s["attention"][1], t["attention"][1]) + kl(
        relations(s["values"]), relations(t["values"])
    )
    expected = {
        "soft": mean(9 * soft.sum(-1), rows),
        "logits": mean((s["logits"] - t["logits"]).square().mean(-1), rows),
        "consistency": mean(
            (s["logits"].softmax(-1) - t["logits"].softmax(-1)).square().mean(-1), rows
        ),
        "hidden": mean(sum(apart) / 2, tokens),
        "direction": mean(1 - F.cosine_similarity(s["hidden"][2], t["hidden"][2], dim=-1), tokens),
        "attention": mean(sum(attention) / 2, tokens),
        "relations": mean(related.mean(1), tokens),
        "hard": mean(
            F.cross_entropy(
                s["logits"], torch.tensor(batch["labels"]).long(), reduction="none"
            ),
            rows,
        ),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(aux.metrics[name].value, value, rtol=2e-5, err_msg=name)
    total = sum(c * expected[term.name] for c, term in TERMS) + 0.25 * expected["hard"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert float(aux.weight) == 4
    assert "accuracy" in aux.metrics


def test_from_itself_nothing_is_to_be_learnt(pair, batch, everything):
    _, student, _ = pair
    grads, loss, aux = everything(student, {"teacher": student}, batch, None)
    for _, term in TERMS:
        if term.name in ("hidden", "attention"):  # other layers on purpose
            assert float(aux.metrics[term.name].value) > 0
        else:
            assert abs(float(aux.metrics[term.name].value)) < 1e-5, term.name
    model = pair[0]
    alone = jax.jit(gradient(distilled(quiet, model, model, (1.0, soft_labels(3.0)), hard=0.0)))
    grads, loss, _ = alone(student, {"teacher": student}, batch, None)
    assert abs(float(loss)) < 1e-6
    assert float(optax.tree.norm(grads)) < 1e-5
    grads, loss, _ = alone(student, {"teacher": pair[2]}, batch, None)
    assert float(loss) > 1e-3
    assert float(optax.tree.norm(grads)) > 1e-2


def test_without_terms_weight_it_is_the_task(pair, batch):
    """Under dropout too; and the student runs once."""
    model, student, teacher = pair
    variables, rng = with_teacher(student, teacher), jax.random.key(3)
    both = distilled(task.loss, model, model, (0.0, soft_labels()))
    grads, loss, aux = jax.jit(gradient(both))(student, {"teacher": teacher}, batch, rng)
    expected, plain, _ = jax.jit(gradient(task.loss(model)))(student, {}, batch, rng)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    assert float(aux.metrics["soft"].value) > 0

    def products(loss_fn, variables):
        return str(jax.make_jaxpr(loss_fn)(variables, batch, rng)).count("dot_general")

    one = products(task.loss(model), student)
    assert products(both, variables) == one + products(quiet(model), teacher)


def test_hot_soft_labels_are_logits():
    """Hinton et al. 2015, equations 2 to 4: the gradient of logits with mean zero."""
    draw = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    ours, theirs = jnp.asarray(draw - draw.mean(-1, keepdims=True))

    def slope(term):
        def loss(logits):
            output, teacher = Output(logits=logits), Output(logits=theirs)
            names = Both._fields[2:]
            rest = dict.fromkeys(names) | {"student": output, "teacher": teacher}
            return term.loss(Both({"weight": np.ones(5)}, "image_classification", **rest)).value

        return jax.grad(loss)(ours)

    np.testing.assert_allclose(slope(soft_labels(300.0)), 0.5 * slope(same_logits()), rtol=0.03)
    assert not np.allclose(slope(soft_labels(1.0)), 0.5 * slope(same_logits()), rtol=0.03)


def test_over_a_vocabulary(batch):
    """Next words: chunked, over those that the task predicts."""
    config = gpt2.Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    (model, student), (_, teacher) = (
        fmjax.create("gpt2", config, head="causal_lm", rng=jax.random.key(i)) for i in range(2)
    )
    student, teacher = (jax.tree.map(lambda x: 5 * x, tree) for tree in (student, teacher))
    words = {name: batch[name] for name in ("input_ids", "attention_mask", "weight")}
    prompt = np.where(np.arange(T) < 3, -100, batch["input_ids"])
    words["labels"] = np.where(batch["attention_mask"] == 1, prompt, -100).astype(np.int32)
    make_loss = functools.partial(causal_lm.loss, train=False, chunk_size=8)
    loss_fn = jax.jit(distilled(make_loss, model, model, (1.0, soft_labels(2.0)), hard=0.0))
    loss, aux = loss_fn(with_teacher(student, teacher), words, None)
    logits = [
        jax.jit(model.apply)(v, words["input_ids"], words["attention_mask"]).logits
        for v in (student, teacher)
    ]
    ours, theirs = (torch.tensor(np.asarray(x)[:, :-1] / 2) for x in logits)
    kl = 4 * F.kl_div(F.log_softmax(ours, -1), F.softmax(theirs, -1), reduction="none").sum(-1)
    weights = torch.tensor((words["labels"][:, 1:] != -100) * words["weight"][:, None])
    np.testing.assert_allclose(loss, ((kl * weights).sum() / weights.sum()).item(), rtol=1e-5)
    assert float(aux.weight) == weights.sum().item()
    by = T - batch["attention_mask"].sum(axis=1)[:, None]
    places = (np.arange(T) - by) % T
    before = {n: np.take_along_axis(x, places, axis=1) for n, x in words.items() if x.ndim == 2}
    same, _ = loss_fn(with_teacher(student, teacher), words | before, None)
    np.testing.assert_allclose(same, loss, rtol=1e-6)  # padded in front


def test_masked_words_from_itself(batch):
    """The teacher sees the words masked as the student's are."""
    model, variables = make(0, "masked_lm", num_hidden_layers=1)
    words = {name: batch[name] for name in ("input_ids", "attention_mask", "weight")}
    make_loss = functools.partial(
        masked_lm.loss, masking=Masking(mask_token_id=1, vocab_size=40), train=False
    )
    loss_fn = distilled(make_loss, model, model, (1.0, soft_labels()), hard=0.0)
    loss, aux = jax.jit(loss_fn)(with_teacher(variables, variables), words, jax.random.key(0))
    assert abs(float(loss)) < 1e-5
    assert float(aux.metrics["masked_nll"].value) > 1


@pytest.mark.slow
def test_projections_train_and_stay_home(batch, tmp_path):
    """A narrow student, a wide teacher in bfloat16; pieces; resuming; export of the student."""
    student, variables = make(0, num_hidden_layers=1)
    wide = dataclasses.replace(CONFIG, hidden_size=24, num_attention_heads=3)
    teacher, taught = fmjax.create(
        "bert", wide, head="sequence_classification", rng=jax.random.key(1), dtype=jnp.bfloat16
    )
    layers = evenly(1, 2, embeddings=True)
    assert layers == {0: 0, 1: 2}
    variables = with_projections(variables, layers, widths=(16, 24), rng=jax.random.key(2))
    loss = distilled(
        quiet, student, teacher, (1.0, same_hidden_states(layers, projected=True)),
        (0.5, soft_labels()), hard=0.5,
    )  # fmt: skip
    state, _ = check_trains(
        with_teacher(variables, taught), loss, optax.adam(1e-2), batch,
        is_trainable=is_student, differentiate=lambda loss: accumulate(gradient(loss), 2),
        folder=tmp_path / "checkpoints",
    )  # fmt: skip
    moved = state.trainable["projections"]["hidden_1"]["kernel"]
    assert not np.allclose(moved, variables["projections"]["hidden_1"]["kernel"])
    assert (
        state.non_trainable["teacher"]["params"]["head"]["classifier"]["bias"].dtype == "bfloat16"
    )
    left = student_only(state.trainable | state.non_trainable)
    fmjax.save(tmp_path / "export", student, left)
    _, again = fmjax.load(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, again, left)


@pytest.mark.slow  # the frame is what texts have
def test_pictures_of_another_family(rng):
    """A CNN follows a VGG with batch norm, on rows without labels."""
    student, variables = fmjax.create("cnn", "tiny", head="image_classification", rng=rng)
    config = vgg.Config(
        num_channels=1, image_size=8, hidden_sizes=(4,), depths=(1,), pooled_size=2,
        dense_sizes=(6,), batch_norm=True, id2label=cnn.VARIANTS["tiny"].id2label,
    )  # fmt: skip
    teacher, taught = fmjax.create("vgg", config, head="image_classification", rng=rng)
    taught = jax.tree.map(lambda x: 3 * x, taught)
    loss = distilled(unlabelled, student, teacher, (1.0, soft_labels(1.0)))
    pixels = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    check_trains(
        with_teacher(variables, taught), loss, optax.adam(1e-2), {"pixel_values": pixels}, steps=12
    )


def test_refusals(pair, batch):
    model, student, teacher = pair
    other, _ = make(0, vocab_size=41)
    with pytest.raises(ValueError, match=r"40 words, the teacher's 41"):
        distilled(task.loss, model, other, (1.0, soft_labels()))
    other, _ = make(0, id2label=("a", "c", "b"))
    with pytest.raises(ValueError, match=r"no terms|classes are \('a', 'b', 'c'\)"):
        distilled(task.loss, model, other)
    tagger, _ = make(0, "token_classification")
    with pytest.raises(ValueError, match="head is 'sequence_classification'") as caught:
        distilled(task.loss, model, tagger, (-1.0, soft_labels(0.0)), (1.0, soft_labels()))
    for part in ("different names", "coefficient of soft is", "temperature is 0.0"):
        assert part in str(caught.value)
    regression, _ = make(0, problem_type="regression", id2label=("x",))
    with pytest.raises(ValueError, match="use same_logits"):
        distilled(task.loss, regression, regression, (1.0, soft_labels()))
    with pytest.raises(ValueError, match="must map layers"):
        distilled(task.loss, model, model, (1.0, same_attention({0: 1})))
    with pytest.raises(ValueError, match="scan=False"):
        distilled(task.loss, model.clone(scan=True), model, (1.0, last_relations()))
    with pytest.raises(ValueError, match="no multiple"):
        evenly(4, 6)

    def refused(match, model, variables, inputs, *terms, task_loss=task.loss):
        loss_fn = distilled(task_loss, model, model, *terms)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(loss_fn, variables, inputs, jax.random.key(0))

    variables = with_teacher(student, teacher)
    refused("with_teacher", model, student, batch, (1.0, soft_labels()))
    refused("no layer 5", model, variables, batch, (1.0, same_hidden_states({1: 5})))
    hidden = same_hidden_states({1: 1}, projected=True)
    refused("no projection hidden_1", model, variables, batch, (1.0, hidden))
    encoder, plain = make(0, "model")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pairs = {f"{side}_{name}": x for name, x in inputs.items() for side in ("query", "passage")}
    refused(
        "ran the model 2 times", encoder, with_teacher(plain, plain), pairs,
        (1.0, last_directions()), task_loss=sentence_embedding.loss,
    )  # fmt: skip
