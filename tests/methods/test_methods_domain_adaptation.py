"""Gradients that turn round, domains told apart, covariances: against equations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_up import B, T, halves, made, texts

from fmjax.methods.domain_adaptation import (
    annealed,
    coral,
    coral_distance,
    covariance,
    dann,
    is_adapted,
    model_only,
    reverse_gradient,
    with_domain_classifier,
)
from fmjax.methods.partly_labelled import LOGITS, counting, pooled, with_progress
from fmjax.tasks import sequence_classification as task
from fmjax.train import accumulate, gradient, init_state, make_train_step
from fmjax.tree import flatten
from fmjax.types import Aux


def rows(count=6, **changes):
    """Labelled and unlabelled rows of the perceptron."""
    draw = np.random.default_rng(1)
    batch = {
        "labelled/features": draw.normal(size=(count, 3)).astype(np.float32),
        "labelled/labels": np.arange(count) % 2,
        "unlabelled/features": 2 * draw.normal(size=(count + 1, 3)).astype(np.float32),
    }
    return {name: leaf for name, leaf in (batch | changes).items() if leaf is not None}


def test_gradient_turns_round():
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def energy(x):
        return jnp.sum(jnp.sin(x) * x**2)

    value, turned = jax.value_and_grad(lambda x: energy(reverse_gradient(x, jnp.float32(0.7))))(x)
    np.testing.assert_array_equal(value, energy(x))
    np.testing.assert_allclose(turned, -0.7 * jax.grad(energy)(x), rtol=1e-6)
    low = x.astype(jnp.bfloat16)
    grad = jax.grad(lambda x: reverse_gradient(x, jnp.float32(0.7)).sum().astype(jnp.float32))(low)
    assert grad.dtype == jnp.bfloat16
    assert jax.grad(lambda s: energy(reverse_gradient(x, s)))(0.7) == 0


def test_schedule():
    done = np.array([0, 30, 100, 200])
    p = np.minimum(done / 100, 1)
    np.testing.assert_allclose(
        jax.vmap(annealed(100))(done), 2 / (1 + np.exp(-10 * p)) - 1, atol=1e-6
    )


@pytest.mark.parametrize("family", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_dann_is_its_equations(family):
    """The task's gradient less lambda times the domains' for the features, theirs for their
    classifier."""
    if family == "mlp":
        model, variables = made("mlp", "classification")
        batch, width, features = rows(4), 2, LOGITS
        batch["unlabelled/features"] = batch["unlabelled/features"][:4]
    else:
        model, variables = made("bert", "sequence_classification", layers=1)
        batch, width, features = halves(texts()), 8, pooled("cls")
    variables = with_domain_classifier(variables, jax.random.key(1), width=width, hidden=(5,))
    last = variables["domain"]["dense_1"]
    assert not last["kernel"].any()  # undecided, so nothing turns round yet
    last["kernel"] = jax.random.normal(jax.random.key(2), last["kernel"].shape)
    variables = with_progress(variables)
    variables["progress"]["step"] = jnp.int32(3)
    strength = 2 / (1 + np.exp(-10 * 0.3)) - 1
    batch["unlabelled/labels"] = np.full(4, 99)  # never read
    batch["unlabelled/weight"] = np.array([1, 1, 1, 0], np.float32)
    batch["labelled/weight"] = np.array([1, 0, 1, 1], np.float32)
    quiet = lambda model: task.loss(model, train=False)  # noqa: E731
    loss = dann(quiet, model, strength=annealed(10), features=features)

    def of_task(params):
        rows = {name.split("/")[1]: x for name, x in batch.items() if name.startswith("labelled")}
        return quiet(model)({"params": params}, rows, None)[0]

    def of_domains(params, domain):
        total = 0.0
        for name, sign in (("labelled", 1.0), ("unlabelled", -1.0)):
            if family == "mlp":
                x = model.apply({"params": params}, batch[f"{name}/features"]).logits
            else:
                ids = batch[f"{name}/input_ids"]
                out = model.apply({"params": params}, input_ids=ids, output_hidden_states=True)
                x = out.hidden_states[-1][:, 0]
            for layer, act in (("dense_0", jax.nn.relu), ("dense_1", lambda x: x)):
                x = act(x @ domain[layer]["kernel"] + domain[layer]["bias"])
            weight = batch[f"{name}/weight"]
            total += jnp.sum(weight * jnp.log1p(jnp.exp(sign * x[:, 0]))) / weight.sum()
        return total

    @jax.jit
    def all_of(variables):
        trainable = {name: variables[name] for name in ("params", "domain")}
        rest = {"progress": variables["progress"]}
        return (
            gradient(loss)(trainable, rest, batch, None),
            jax.value_and_grad(of_task)(variables["params"]),
            jax.value_and_grad(of_domains, argnums=(0, 1))(
                variables["params"], variables["domain"]
            ),
        )

    (grads, value, aux), (first, ours), (second, (theirs, own)) = all_of(variables)
    np.testing.assert_allclose(value, first + second, rtol=1e-5)
    expected = jax.tree.map(lambda a, b: a - strength * b, ours, theirs)
    for path, leaf in flatten({"params": expected, "domain": own}).items():
        np.testing.assert_allclose(flatten(grads)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    assert aux.weight == 3
    assert aux.metrics["domain"].weight == 6
    np.testing.assert_allclose(aux.metrics["strength"].value, strength, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["task"].value, first, rtol=1e-5)
    assert model_only(variables).keys() == {"params"}


def test_steps_are_counted_once():
    def loss(variables, batch, rng):
        return jnp.mean(variables["params"]["x"] * batch["y"]), Aux(jnp.float32(2), {}, {})

    tx = optax.sgd(0.1)
    state = init_state(with_progress({"params": {"x": jnp.ones(())}}), tx, jax.random.key(0))
    step = make_train_step(counting(accumulate(gradient(loss), 2)), tx)
    for number in range(3):
        assert state.non_trainable["progress"]["step"] == number
        state, _ = step(state, {"y": jnp.ones(4)})
    with pytest.raises(ValueError, match="with_progress"):
        counting(gradient(loss))(state.trainable, {}, {"y": jnp.ones(4)}, None)


def test_coral_is_numpys():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(7, 5)), 3 * rng.normal(size=(9, 5)) + 1
    padded = np.concatenate([source, np.full((2, 5), np.nan)])
    weight = np.array([1] * 7 + [0] * 2, np.float32)

    @jax.jit
    def all_of(source, target, padded):
        return (
            jax.value_and_grad(coral_distance)(padded, target, weight, np.ones(9)),
            coral_distance(source, source[::-1] + 2.0, np.ones(7), np.ones(7)),
            covariance(source, np.array([2] + [1] * 6)),
            covariance(source, np.array([1] + [0] * 6)),
        )

    (value, grad), same, heavy, single = all_of(source, target, padded)
    apart = np.cov(source, rowvar=False) - np.cov(target, rowvar=False)
    np.testing.assert_allclose(value, np.sum(apart**2) / (4 * 5**2), rtol=1e-5)
    assert same < 1e-10
    # Twice the weight is the row twice; one row has no covariance.
    twice = np.concatenate([source, source[:1]])
    np.testing.assert_allclose(heavy, np.cov(twice, rowvar=False), rtol=1e-5)
    assert not single.any()
    assert np.isfinite(grad).all()
    assert not grad[7:].any()


def test_coral_of_logits():
    model, variables = made("mlp", "classification")
    batch = rows()
    loss = coral(task.loss, model, strength=0.5, features=LOGITS)

    @jax.jit
    def all_of(variables):
        every = np.concatenate([batch[f"{name}/features"] for name in ("labelled", "unlabelled")])
        return loss(variables, batch, None), model.apply(variables, every).logits

    (value, aux), logits = all_of(variables)
    source, target = np.split(np.asarray(logits), [6])
    chances = np.exp(source) / np.exp(source).sum(axis=1, keepdims=True)
    right = np.log(chances[np.arange(6), batch["labelled/labels"]])
    apart = np.cov(source, rowvar=False) - np.cov(target, rowvar=False)
    np.testing.assert_allclose(value, -right.mean() + 0.5 * np.sum(apart**2) / 16, rtol=1e-5)
    assert aux.weight == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unlabelled/features": None}, "nothing called unlabelled"),
        ({"labelled/features": None, "labelled/labels": None}, "nothing called labelled"),
        ({"unlabelled/features": np.zeros((0, 3), np.float32)}, "no unlabelled rows"),
        ({"unlabelled/features": np.zeros((2, 4), np.float32)}, "one bucket"),
        ({"unlabelled/more": np.zeros(7)}, "different inputs"),
        ({"target/features": np.zeros((2, 3))}, "target"),
        ({"labelled/labels": None}, "no labels"),
    ],
)
def test_batches_that_are_refused(changes, said):
    model, variables = made("mlp", "classification")
    loss = coral(task.loss, model, features=LOGITS)
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(loss, variables, rows(**changes), None)


def test_refusals():
    model, variables = made("mlp", "classification")
    for method in (dann, coral):
        with pytest.raises(ValueError, match=r"strength=-0\.1 must be at least 0"):
            method(task.loss, model, strength=-0.1)
    with pytest.raises(ValueError, match="steps=0"):
        annealed(0)
    with pytest.raises(ValueError, match="pooling"):
        pooled("pooler")
    loss = dann(task.loss, model, features=LOGITS)
    with pytest.raises(ValueError, match="with_domain_classifier"):
        jax.eval_shape(loss, variables, rows(), None)
    wide = with_domain_classifier(variables, jax.random.key(0), width=8)
    with pytest.raises(ValueError, match="width=2"):
        jax.eval_shape(loss, wide, rows(), None)
    with pytest.raises(ValueError, match=r"width=0.*already"):
        with_domain_classifier(wide, jax.random.key(0), width=0)
    fitting = with_domain_classifier(variables, jax.random.key(0), width=2)
    loss = dann(task.loss, model, features=LOGITS, strength=annealed(3))
    with pytest.raises(ValueError, match="with_progress"):
        jax.eval_shape(loss, fitting, rows(), None)
    assert is_adapted("domain/dense_0/kernel")
    assert not is_adapted("progress/step")
    long = {"unlabelled/input_ids": np.ones((B, T + 1), np.int32)}
    bert, its = made("bert", "sequence_classification", layers=1)
    with pytest.raises(ValueError, match="one bucket"):
        jax.eval_shape(coral(task.loss, bert), its, halves(texts()) | long, None)
