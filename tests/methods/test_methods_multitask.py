"""One trunk and several heads: the sum of gradients, one program a task, uncertainty, conflicts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.data import Columns
from fmjax.data.batches import batches
from fmjax.data.mixture import Mixture
from fmjax.methods.multitask import (
    by_uncertainty,
    join,
    mix,
    mix_gradients,
    view,
    with_uncertainty,
    without_conflicts,
)
from fmjax.models import bert
from fmjax.tasks import sequence_classification, token_classification
from fmjax.train import accumulate, adamw, gradient, init_state, jit_step, make_train_step
from fmjax.train.checkpoint import Checkpoints
from fmjax.train.loop import Memory, fit
from fmjax.tree import flatten
from fmjax.types import Aux

CONFIG = bert.Config(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=8, initializer_range=0.3, hidden_dropout_prob=0.1,
)  # fmt: skip
N, T = 24, 6


@pytest.fixture(scope="module")
def models():
    """A classifier of texts and a tagger, their losses, and their variables."""
    mood, its = fmjax.create("bert", CONFIG, head="sequence_classification", rng=jax.random.key(0))
    config = dataclasses.replace(CONFIG, id2label=("x", "y", "z"))
    tagger, own = fmjax.create("bert", config, head="token_classification", rng=jax.random.key(0))
    losses = {
        "mood": sequence_classification.loss(mood),
        "tags": token_classification.loss(tagger),
    }
    return {"mood": mood, "tags": tagger}, losses, {"mood": its, "tags": own}


def data():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, (N, T)).astype(np.int32)
    return {
        "mood": {"input_ids": ids, "labels": (ids[:, 0] > 15).astype(np.int32)},
        "tags": {"input_ids": ids, "labels": (ids % 3).astype(np.int32)},
    }


def rows(start, stop, *names):
    """A batch of some tasks."""
    return {
        f"{name}/{key}": value[start:stop]
        for name in names or ("mood", "tags")
        for key, value in (data()[name] | {"weight": np.ones(N, np.float32)}).items()
    }


def test_each_task_is_its_model(models, tmp_path):
    heads, _, variables = models
    joined = join(variables)
    flat = flatten(joined)
    assert "params/layers_0/attn/query/kernel" in flat
    assert "params/heads/mood/pooler/kernel" in flat  # which the tagger has not
    assert "params/heads/tags/head/classifier/kernel" in flat
    for task, model in heads.items():
        own = view(joined, task)
        jax.tree.map(np.testing.assert_array_equal, own, variables[task])
        fmjax.save(tmp_path / task, model, own)
        again, loaded = fmjax.load(tmp_path / task)
        assert again.head == model.head
        jax.tree.map(np.testing.assert_array_equal, loaded, own)


def test_one_task_is_plain_training(models):
    """Bitwise: the trunk, the head, dropout."""
    _, losses, variables = models
    tx = adamw(1e-2)
    plain = init_state(jax.tree.map(jnp.copy, variables["tags"]), tx, jax.random.key(1))
    mixed = init_state(
        jax.tree.map(jnp.copy, join({"tags": variables["tags"]})), tx, jax.random.key(1)
    )
    plain_step = jit_step(make_train_step(gradient(losses["tags"]), tx))
    step = jit_step(make_train_step(gradient(mix({"tags": losses["tags"]})), tx))
    for start in (0, 8, 16):
        batch = rows(start, start + 8, "tags")
        mixed, metrics = step(mixed, batch)
        plain, expected = plain_step(plain, {k.split("/")[1]: v for k, v in batch.items()})
        assert float(metrics["loss"].value) == float(expected["loss"].value)
        assert metrics.keys() == {"loss", "grad_norm", "tags/loss", "tags/accuracy"}
    own = view(mixed.trainable, "tags")
    jax.tree.map(np.testing.assert_array_equal, own, dict(plain.trainable))


def test_gradient_of_the_sum(models):
    """Both ways to mix, and pieces of one."""
    heads, _, variables = models
    joined, batch = join(variables), rows(0, 8)
    scales = {"mood": 0.5, "tags": 2.0}
    quiet = {
        "mood": sequence_classification.loss(heads["mood"], train=False),
        "tags": token_classification.loss(heads["tags"], train=False),
    }
    pieces = mix_gradients(quiet, scales, differentiate=lambda loss: accumulate(gradient(loss), 4))

    @jax.jit
    def all_ways(joined):
        by_hand = {}
        for task, loss_fn in quiet.items():
            own = {name.removeprefix(f"{task}/"): x for name, x in batch.items() if task in name}
            by_hand[task] = gradient(loss_fn)(view(joined, task), {}, own, None)[:2]
        return (
            gradient(mix(quiet, scales))(joined, {}, batch, None)[:2],
            mix_gradients(quiet, scales)(joined, {}, batch, None)[:2],
            pieces(joined, {}, batch, None)[:2],
            by_hand,
        )

    *ways, by_hand = all_ways(joined)
    total = sum(scales[task] * loss for task, (_, loss) in by_hand.items())
    for grads, loss in ways:
        np.testing.assert_allclose(loss, total, rtol=1e-5)
        for path, leaf in flatten(grads).items():
            parts = []
            for task, (own, _) in by_hand.items():
                there = flatten(own)
                name = path.replace(f"heads/{task}/", "")
                if name in there and "heads/" not in name:
                    parts.append(scales[task] * there[name])
            assert len(parts) == (1 if "heads/" in path else 2)
            np.testing.assert_allclose(leaf, sum(parts), rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_drawn_tasks_resume_bitwise(models, tmp_path):
    """One program a task; half way saved, data order included."""
    _, losses, variables = models
    tx = adamw(1e-2)

    def stream():
        parts = {
            task: batches(Columns((), columns), batch_size=8, seed=2)
            for task, columns in data().items()
        }
        return Mixture(parts, {"mood": 0.4, "tags": 0.6}, seed=1)

    def fresh():
        return init_state(jax.tree.map(jnp.copy, join(variables)), tx, jax.random.key(1))

    traced = chex.assert_max_traces(make_train_step(gradient(mix(losses)), tx), 2)
    step = jit_step(traced)
    whole = fit(fresh(), step, stream(), steps=10)
    part = stream()
    assert {name for number in range(10) for name in part.drawn(number)} == {"mood", "tags"}
    half = fit(fresh(), step, part, steps=4)
    with Checkpoints(tmp_path, settings={}) as checkpoints:
        checkpoints.save(half, part.get_state(), Memory())
        restored = checkpoints.restore_last(jax.eval_shape(lambda: half))
    assert restored is not None
    rest = stream()
    rest.set_state(restored.data)
    again = fit(restored.state, step, rest, steps=10)
    chex.assert_trees_all_equal(again.trainable, whole.trainable)
    chex.assert_trees_all_equal(again.opt_state, whole.opt_state)


def test_uncertainty():
    """Kendall et al. 2018: least at a variance of twice a cross-entropy, or a squared error."""

    def constant(variables, batch, rng):
        return variables["params"]["x"], Aux(jnp.ones(()), {}, {})

    for regression, factor in ((False, 2.0), (True, 1.0)):
        loss_fn = by_uncertainty(constant, regression=regression)
        variables = with_uncertainty({"params": {"x": jnp.float32(0.7)}})
        scale = 0.5 if regression else 1.0
        np.testing.assert_allclose(loss_fn(variables, {}, None)[0], scale * 0.7, rtol=1e-6)
        variables["params"]["uncertainty"] = jnp.log(factor * 0.7)
        grads, _, aux = gradient(loss_fn)(variables, {}, {}, None)
        np.testing.assert_allclose(grads["params"]["uncertainty"], 0, atol=1e-6)
        np.testing.assert_allclose(grads["params"]["x"], scale / (factor * 0.7), rtol=1e-5)
        np.testing.assert_allclose(aux.metrics["deviation"].value, (factor * 0.7) ** 0.5, rtol=1e-5)
        np.testing.assert_allclose(aux.metrics["unweighed"].value, 0.7, rtol=1e-6)
    with pytest.raises(ValueError, match="with_uncertainty"):
        by_uncertainty(constant)({"params": {"x": jnp.ones(())}}, {}, None)


def test_conflicts():
    """Against algorithm 1 in numpy; tasks that agree are summed, opposite ones cancel nothing."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3, 5)).astype(np.float32)
    none = np.zeros(2, np.float32)

    def heads(task):
        return {str(j): {"k": jnp.asarray(draws[j][:2] if j == task else none)} for j in range(3)}

    grads = [
        {"params": {"w": jnp.asarray(g[:4]), "b": jnp.asarray(g[4:]), "heads": heads(task)}}
        for task, g in enumerate(draws)
    ]
    expected = np.zeros(5)
    for i in range(3):
        kept = draws[i].astype(np.float64)
        for j in range(3):
            if j != i and (dot := kept @ draws[j]) < 0:
                kept = kept - dot / (draws[j] @ draws[j]) * draws[j]
        expected += kept
    found = without_conflicts(grads, None)["params"]
    np.testing.assert_allclose(np.append(found["w"], found["b"]), expected, rtol=1e-4)
    assert not np.allclose(expected, draws.sum(0))
    for j in range(3):
        np.testing.assert_allclose(found["heads"][str(j)]["k"], draws[j][:2])
    alike = [{"params": {"w": jnp.array([1.0, 2.0])}}, {"params": {"w": jnp.array([2.0, 0.1])}}]
    kept = without_conflicts(alike, jax.random.key(0))["params"]["w"]
    np.testing.assert_allclose(kept, [3.0, 2.1], rtol=1e-6)


def test_orders_have_keys_of_their_own():
    """None is a task's."""
    keys = []

    def loss(variables, batch, rng):
        keys.append(rng)
        return jnp.sum(variables["params"]["x"]), Aux(jnp.ones(()), {}, {})

    def combine(grads, rng):
        keys.extend(jax.random.fold_in(rng, index) for index in range(len(grads)))
        return grads[0]

    grad_fn = mix_gradients({"a": loss, "b": loss}, combine=combine)
    batch = {"a/x": np.ones(2), "b/x": np.ones(2)}
    grad_fn({"params": {"x": jnp.ones(1)}}, {}, batch, jax.random.key(0))
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4


@pytest.mark.slow
def test_all_of_it_trains(models):
    """Joint batches, uncertainties, no conflicts."""
    _, losses, variables = models
    joined = join({task: with_uncertainty(tree) for task, tree in variables.items()})
    losses = {task: by_uncertainty(loss) for task, loss in losses.items()}
    grad_fn = mix_gradients(losses, combine=without_conflicts)
    state, _ = check_trains(
        joined, None, optax.adam(1e-2), rows(0, 24), differentiate=lambda _: grad_fn
    )
    assert float(state.trainable["params"]["heads"]["mood"]["uncertainty"]) != 0
    left = view(state.trainable, "mood")
    assert flatten(left).keys() == flatten(variables["mood"]).keys()


def test_refusals(models):
    _, losses, variables = models
    with pytest.raises(ValueError, match=r"coefficients are of \['mood'\].*'mood': -1"):
        mix(losses, {"mood": -1})
    with pytest.raises(ValueError, match="none of the tasks"):
        mix(losses)(join(variables), {"input_ids": np.ones((2, 3), np.int32)}, None)
    with pytest.raises(ValueError, match="no leaf is of task 'names'"):
        view(join(variables), "names")
    wide = dataclasses.replace(CONFIG, hidden_size=8)
    _, other = fmjax.create("bert", wide, head="sequence_classification", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"name it in own.*a/b.*without '/'|a/b.*name it in own"):
        join({"a/b": variables["mood"], "b": other})
