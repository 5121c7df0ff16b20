"""What every recipe's training does beside its loop."""

import shutil

import jax
import numpy as np
import pytest

import fmjax
import fmjax.recipes.training as recipe
from fmjax.data.batches import batches
from fmjax.data.images import ImageExamples
from fmjax.models import cnn
from fmjax.recipes.training import Training, train
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.pixels import normalised
from fmjax.train import adamw
from fmjax.tree import flatten


@pytest.fixture
def run(tmp_path):
    """A run of three steps: the weights at each evaluation, and those that it returns."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    examples = ImageExamples(images, (np.arange(12) % 3).astype(np.int32), ("a", "b", "c"))

    def run(ema, mesh=None, dtype="float32", **settings):
        config = cnn.Config(
            image_size=4, hidden_sizes=(2,), depths=(1,), pooled_size=2, dense_sizes=(),
            id2label=("a", "b", "c"),
        )  # fmt: skip
        model, variables = fmjax.create(
            "cnn", config, head="image_classification", rng=jax.random.key(0)
        )
        variables = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == np.float32 else x, variables
        )
        seen = [jax.device_get(flatten(variables["params"]))]

        def evaluate(state):
            seen.append(jax.device_get(flatten(state.trainable["params"])))
            return {"loss": float(len(seen))}  # the first is the best

        settings = {"epochs": 1, "evaluations": 3, "learning_rate": 0.1, "warmup": 0.0} | settings
        settings = Training(
            output=tmp_path / str(ema), batch_size=4, ema=ema, mesh=mesh, **settings
        )
        state = train(
            settings,
            model,
            variables,
            normalised(task.loss(model), (0.5,), (0.5,)),
            batches(examples.columns(), batch_size=4),
            evaluate=evaluate,
            metric="loss",
            mode="min",
            about={"source": "new", "data": {"source": "noise", "splits": {"train": 12}}},
        )
        return seen, jax.device_get(flatten(state.trainable["params"]))

    return run


def test_averages_are_evaluated_and_returned(run):
    seen, left = run(None)
    averaged, left_average = run(0.75)
    assert len(seen) == len(averaged) == 4
    by_hand = seen[0]
    for step in (1, 2, 3):
        by_hand = {name: 0.75 * by_hand[name] + 0.25 * seen[step][name] for name in by_hand}
        for name, value in by_hand.items():
            np.testing.assert_allclose(averaged[step][name], value, atol=1e-6)
            assert np.abs(value - seen[step][name]).max() > 1e-4
    for name in by_hand:  # of the best evaluation
        np.testing.assert_array_equal(left[name], seen[1][name])
        np.testing.assert_array_equal(left_average[name], averaged[1][name])


def test_a_run_goes_on_on_another_mesh(run, tmp_path):
    seen, left = run(None, "data=2,fsdp=2")
    (tmp_path / "None").rename(tmp_path / "meshed")
    plain, _ = run(None)
    for meshed, alone in zip(seen, plain, strict=True):
        for name, value in alone.items():
            np.testing.assert_allclose(meshed[name], value, rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "None")
    (tmp_path / "meshed").rename(tmp_path / "None")
    again, same = run(None, "data=4")  # it is done: nothing is left to train
    assert len(again) == 1
    for name, value in left.items():
        np.testing.assert_array_equal(same[name], value)
    with pytest.raises(ValueError, match="'model' is no axis"):
        run(None, "model=2")


def test_lengths_of_no_run_are_refused(run):
    wrong = {
        "epochs": -1.0, "max_steps": 0, "microbatches": 0, "learning_rate": -1.0, "warmup": 10.0,
        "weight_decay": -1.0, "ema": 1.5, "evaluations": -3, "patience": 0,
    }  # fmt: skip
    problems = "(?s)" + "".join(f".*{name}={value} must be " for name, value in wrong.items())
    with pytest.raises(ValueError, match=problems):
        run(**wrong)
    with pytest.raises(ValueError, match=r"warmup=-0\.1 must be a share"):
        run(None, warmup=-0.1)
    with pytest.raises(ValueError, match=r"profile='2:4' ends after .* 3 steps"):
        run(None, profile="2:4")


def test_evaluated_less_often_than_once_an_epoch(run):
    seen, _ = run(None, epochs=3, evaluations=0.5, schedule="inverse_sqrt")
    assert len(seen) == 1 + 2, "after 6 of 9 steps, and at the end"


def test_precisions_reach_the_step(run, monkeypatch):
    asked = []

    def products(loss, dtype):
        asked.append(dtype)
        return loss

    def optimizer(*args, moments, **kwargs):
        asked.append(moments)
        return adamw(*args, moments=moments, **kwargs)

    monkeypatch.setattr(recipe, "quantized_products", products)
    monkeypatch.setitem(recipe.OPTIMIZERS, "adamw", optimizer)
    run(None, moments="bfloat16", matmuls="int8")
    assert asked == ["bfloat16", "int8"]


def test_weights_that_train_are_float32(run):
    """A checkpoint in bfloat16 would not feel updates below a hundredth of its weights."""
    seen, left = run(None, dtype="bfloat16", learning_rate=1e-5)
    for name, value in left.items():
        assert value.dtype == np.float32
        assert (value != np.asarray(seen[0][name], np.float32)).any()
