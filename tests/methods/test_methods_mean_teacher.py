"""The teacher as the student's average: once a step, statistics too, and its two limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmjax
from fmjax.methods.distillation import distilled, is_student, student_only, with_teacher
from fmjax.methods.distillation_terms import same_probabilities
from fmjax.methods.mean_teacher import mean_teacher
from fmjax.models import vgg
from fmjax.tasks import sequence_classification as task
from fmjax.train import accumulate, gradient, init_state, jit_step, make_train_step
from fmjax.tree import flatten
from fmjax.types import Aux

CONFIG = vgg.Config(
    num_channels=1, image_size=8, hidden_sizes=(4,), depths=(1,), pooled_size=2, dense_sizes=(6,),
    batch_norm=True, dropout=0.1, id2label=("a", "b", "c"),
)  # fmt: skip


def every_row(batch):
    return jnp.ones(batch["labels"].shape)


@pytest.fixture(scope="module")
def setting():
    """A model with batch norm, its variables, and rows of which half have labels."""
    model, variables = fmjax.create(
        "vgg", CONFIG, head="image_classification", rng=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(8, 8, 8, 1)).astype(np.float32),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
        "weight": np.array([1, 0] * 4, np.float32),
    }
    loss = distilled(task.loss, model, model, (1.0, same_probabilities(weights=every_row)))
    return model, variables, batch, loss


@pytest.mark.slow
def test_follows_once_a_step(setting):
    _, variables, batch, loss = setting
    grad_fn = mean_teacher(accumulate(gradient(loss), 2), decay=0.75)
    tx = optax.sgd(0.5)
    copies = jax.tree.map(jnp.copy, (variables, variables))
    state = init_state(with_teacher(*copies), tx, jax.random.key(1), is_student)
    step = jit_step(make_train_step(grad_fn, tx))
    expected = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    for _ in range(3):
        before = {path: np.asarray(x) for path, x in flatten(state.trainable).items()}
        state, metrics = step(state, batch)
        after = {path: np.asarray(x) for path, x in flatten(state.non_trainable).items()}
        for path, old in expected.items():
            # Parameters are those that the gradient is of, statistics what its pass made of them.
            new = before[path] if path in before else after[path]
            expected[path] = 0.75 * old + 0.25 * new
        for path, value in expected.items():
            np.testing.assert_allclose(after[f"teacher/{path}"], value, rtol=1e-5, atol=1e-6)
    assert float(metrics["consistency"].value) > 0
    assert float(metrics["consistency"].weight) == 8
    assert float(metrics["hard"].weight) == 4
    assert student_only(state.trainable | state.non_trainable).keys() == {"params", "batch_stats"}


@pytest.mark.slow
def test_limits(setting):
    _, variables, batch, loss = setting
    student = {"params": variables["params"]}
    other = jax.tree.map(lambda x: 2 * x, variables)
    rest = {"batch_stats": variables["batch_stats"], "teacher": other}
    for decay in (0.0, 1.0):
        grad_fn = jax.jit(mean_teacher(gradient(loss), decay))
        _, _, aux = grad_fn(student, rest, batch, jax.random.key(0))
        updates = aux.updates["teacher"]["params"]
        expected = (student if decay == 0 else other)["params"]
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_the_average_of_bfloat16_moves():
    """It is float32, and the loss reads it in the student's dtype."""

    def loss(variables, batch, rng):
        read = variables["teacher"]["params"]["x"]
        assert read.dtype == jnp.bfloat16
        return (0 * variables["params"]["x"] * read).sum(), Aux(jnp.ones(()), {}, {})

    grad_fn = mean_teacher(gradient(loss), decay=0.999)
    student = {"params": {"x": jnp.full(1, 2.0, jnp.bfloat16)}}
    rest = {"teacher": {"params": {"x": jnp.ones(1)}}}

    def step(rest, _):
        return grad_fn(student, rest, {}, jax.random.key(0))[2].updates, None

    rest, _ = jax.lax.scan(step, rest, None, length=2000)
    np.testing.assert_allclose(rest["teacher"]["params"]["x"], 2 - 0.999**2000, rtol=1e-4)
    with pytest.raises(ValueError, match=r"bfloat16.*average stands still"):
        grad_fn(student, {"teacher": student}, {}, jax.random.key(0))


def test_refusals(setting):
    _, variables, batch, loss = setting
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        mean_teacher(gradient(loss), 1.5)
    grad_fn = mean_teacher(gradient(task.loss(setting[0])))
    rest = {"batch_stats": variables["batch_stats"]}
    with pytest.raises(ValueError, match="student's own form"):
        jax.eval_shape(grad_fn, {"params": variables["params"]}, rest, batch, jax.random.key(0))
