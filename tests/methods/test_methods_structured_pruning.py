"""Heads and units: what they are worth, and models that are really smaller without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import made, texts

import fmjax
from fmjax.hub import abstract_variables
from fmjax.methods.quantization import quantize
from fmjax.methods.structured_pruning import (
    attentions,
    feed_forwards,
    filled_up,
    head_importance,
    least_important,
    remove_heads,
    remove_units,
    silence_heads,
    unit_importance,
)
from fmjax.models import family_of, llama, t5
from fmjax.tasks import sequence_classification
from fmjax.tree import count_parameters, flatten, stack_layers, unflatten


def filled(family, config, head):
    """A model and arrays of its variables' shapes: nothing is drawn leaf by leaf."""
    model = family_of(family).Model(config, head=head)
    draw = np.random.default_rng(0)
    made = lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype)  # noqa: E731
    return model, jax.tree.map(made, abstract_variables(model))


def scaled(variables, masks, name):
    """The variables with the rows of kernels multiplied, part by part."""
    flat = flatten(variables)
    for place, mask in masks.items():
        path = f"params/{place}/{name}/kernel"
        rows = jnp.repeat(mask, flat[path].shape[-2] // mask.shape[-1])
        flat[path] = flat[path] * rows[:, None]
    return unflatten(flat)


@pytest.mark.parametrize("name", ["out", pytest.param("down", marks=pytest.mark.slow)])
def test_importance_is_the_gradient_of_a_mask(name):
    """Against the gradient of each example alone, by factors of kernels and not of features."""
    model, variables = made("bert", "sequence_classification", layers=1)
    loss = sequence_classification.loss(model, train=False)
    batch = texts()
    batch["weight"] = np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)
    if name == "out":
        counts = attentions(model, variables)
        found = head_importance(model, loss, variables, [batch, batch])
        assert {place: x.shape for place, x in found.items()} == {"layers_0/attn": (2,)}
    else:
        counts = feed_forwards(variables)
        found = unit_importance(loss, variables, [batch])
        assert {place: x.shape for place, x in found.items()} == {"layers_0/mlp": (12,)}

    def of_one(example):
        def value(masks):
            changed = scaled(variables, masks, name)
            return loss(changed, jax.tree.map(lambda x: x[None], example), None)[0]

        return jax.grad(value)({place: jnp.ones(count) for place, count in counts.items()})

    examples = {name: jnp.asarray(leaf) for name, leaf in batch.items()}
    slopes = jax.jit(jax.vmap(of_one))(examples)
    for place, values in found.items():
        expected = np.abs(np.asarray(slopes[place])[batch["weight"] > 0]).mean(0)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)


def test_what_gives_nothing_may_go(tmp_path):
    """Heads and units behind zeros, other numbers in each layer: the same outputs of less."""
    model, variables = made("bert", "sequence_classification")
    silent = silence_heads(model, variables, {"layers_0/attn": [0]})
    kernel = flatten(silent)["params/layers_0/attn/out/kernel"]
    assert (kernel[:4] == 0).all()
    assert (kernel[4:] != 0).all()
    silent["params"]["layers_1"]["mlp"]["down"]["kernel"] *= (jnp.arange(12) % 3 > 0)[:, None]
    batch = texts()
    apply = jax.jit(lambda v: model.apply(v, batch["input_ids"], batch["attention_mask"]).logits)
    small_model, small = remove_heads(model, silent, {"layers_0/attn": [0]})
    small_model, small = remove_units(small_model, small, {"layers_1/mlp": [0, 3, 6, 9]})
    assert small_model.config == model.config  # one number cannot say what each layer has
    flat = flatten(small)
    assert flat["params/layers_0/attn/query/kernel"].shape == (8, 4)
    assert flat["params/layers_0/attn/out/kernel"].shape == (4, 8)
    assert flat["params/layers_1/attn/query/kernel"].shape == (8, 8)
    assert flat["params/layers_1/mlp/up/kernel"].shape == (8, 8)
    fewer = 3 * (8 * 4 + 4) + 4 * 8 + 4 * (8 + 1) + 4 * 8
    assert count_parameters(variables) - count_parameters(small) == fewer
    expected = apply(silent)
    np.testing.assert_allclose(apply(small), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(apply(variables), expected, atol=1e-3)
    # Files have what the config says: refused as it is, saved with zeros.
    with pytest.raises(ValueError, match="the model's is"):
        fmjax.save(tmp_path, model, small)
    full = filled_up(model, small)
    np.testing.assert_allclose(apply(full), expected, rtol=1e-5, atol=1e-5)
    fmjax.save(tmp_path, model, full)


def test_a_config_that_can_says_so():
    model, variables = made("bert", "sequence_classification")
    model, variables = model.clone(scan=True), stack_layers(variables)
    small, less = remove_units(model, variables, {"layers/mlp": [[0, 1], [10, 11]]})
    assert small.config == dataclasses.replace(model.config, intermediate_size=10)
    up, old = (flatten(v)["params/layers/mlp/up/kernel"] for v in (less, variables))
    np.testing.assert_array_equal(up, jnp.stack([old[0, :, 2:], old[1, :, :10]]))
    # Two queries share a key: they go together, and the config has a size of heads of its own.
    config = llama.Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    model, variables = filled("llama", config, "causal_lm")
    small, less = remove_heads(model, variables, {"layers_0/attn": [0]})
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    assert small.config == dataclasses.replace(config, **changes)
    shapes = jax.tree.map(lambda x: x.shape, (less, abstract_variables(small)))
    assert shapes[0] == shapes[1]
    query = flatten(variables)["params/layers_0/attn/query/kernel"]
    np.testing.assert_array_equal(flatten(less)["params/layers_0/attn/query/kernel"], query[:, 8:])


@pytest.mark.slow
def test_groups_of_queries_and_scanned_layers():
    """What was removed is what was silenced, also where queries share keys and layers are one."""
    ids = texts()["input_ids"]
    model, variables = made("llama", "causal_lm")
    config = dataclasses.replace(model.config, num_attention_heads=4, num_key_value_heads=2)
    model, variables = fmjax.create("llama", config, head="causal_lm", rng=jax.random.key(0))
    places = ("layers_0/attn", "layers_1/attn")
    small, less = remove_heads(model, variables, {place: [1] for place in places})
    silent = silence_heads(model, variables, {place: [2, 3] for place in places})
    np.testing.assert_allclose(
        small.apply(less, ids).logits, model.apply(silent, ids).logits, rtol=1e-5, atol=1e-5
    )
    model, variables = made("bert", "sequence_classification")
    apart = remove_heads(model, variables, {"layers_0/attn": [0], "layers_1/attn": [1]})[1]
    scanned = model.clone(scan=True)
    stacked = remove_heads(scanned, stack_layers(variables), {"layers/attn": [[0], [1]]})[1]
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), stacked)
    expected = model.apply(apart, ids).logits
    np.testing.assert_allclose(scanned.apply(stacked, ids).logits, expected, rtol=1e-5, atol=1e-5)
    importance = [
        head_importance(m, sequence_classification.loss(m, train=False), v, [texts()])
        for m, v in ((model, variables), (scanned, stack_layers(variables)))
    ]
    both = np.stack([*importance[0].values()])
    np.testing.assert_allclose(importance[1]["layers/attn"], both, rtol=1e-4, atol=1e-7)


def test_least_important():
    importance = {"a": np.array([3.0, 1.0, 2.0]), "b": np.array([30.0, 50.0, 40.0])}
    each = least_important(importance, 1)
    assert {place: rows.tolist() for place, rows in each.items()} == {"a": [1], "b": [0]}
    # Over all, lengths of 3.7 and 71: 0.27, 0.53 and 0.42, 0.57; the best of each stays.
    together = least_important(importance, 3, scope="global")
    assert {place: rows.tolist() for place, rows in together.items()} == {"a": [1, 2], "b": [0]}
    stacked = {"layers": np.array([[1.0, 2.0], [2.0, 1.0]])}
    assert least_important(stacked, 1)["layers"].tolist() == [[0], [1]]
    for count, scope in ((3, "layer"), (5, "global"), (1, "all")):
        with pytest.raises(ValueError, match="must"):
            least_important(importance, count, scope=scope)


def test_refusals():
    model, variables = made("bert", "sequence_classification")
    for heads, said in (
        ({"layers_9/attn": [0]}, "'layers_9/attn' is none of"),
        ({"layers_0/attn": [2]}, r"different numbers of 0\.\.1"),
        ({"layers_0/attn": [0, 1]}, "one must stay"),
        ({"layers_0/attn": [[0]]}, "one list a layer"),
    ):
        with pytest.raises(ValueError, match=said):
            remove_heads(model, variables, heads)
    with pytest.raises(ValueError, match="quantise"):
        remove_units(
            model,
            quantize(variables, bits=8, targets=("params/layers_0/mlp/up/kernel",)),
            {"layers_0/mlp": [0]},
        )
    cnn, its = made("mlp", "classification")
    with pytest.raises(ValueError, match="no attention"):
        head_importance(cnn, sequence_classification.loss(cnn), its, [])
    with pytest.raises(ValueError, match="no batches"):
        unit_importance(sequence_classification.loss(model), variables, [])
    with pytest.raises(ValueError, match="no feed-forward"):
        feed_forwards(its)


def test_families_that_count_heads_elsewhere():
    """T5's biases are of all heads; a cache has as many as the config says."""
    config = t5.Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    model, variables = filled("t5", config, "encoder")
    (place,) = attentions(model, variables)
    with pytest.raises(ValueError, match="silence_heads"):
        remove_heads(model, variables, {place: [0]})
    assert silence_heads(model, variables, {place: [0]}).keys() == variables.keys()
    model, variables = made("gpt2", "causal_lm")
    small, less = remove_heads(model, variables, {"layers_0/attn": [0]})
    cache = small.init_cache(1, 4)
    with pytest.raises(ValueError, match="the cache has 2 heads"):
        jax.eval_shape(lambda: small.apply(less, jnp.ones((1, 2), int), cache=cache))
