"""What trains, how fast and from when: predicates, rates by depth, unfreezing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.hub import abstract_variables
from fmjax.methods.optimizers import muon
from fmjax.methods.selection import (
    bitfit,
    depths,
    from_layer,
    gradual_unfreezing,
    layerwise_decay,
    matching,
)
from fmjax.models import families, family_of
from fmjax.tasks import seq2seq, sequence_classification
from fmjax.train import adamw, ema_of, is_param, track_ema, warmup_linear
from fmjax.tree import flatten, stack_layers, unflatten, unstack_layers


@functools.cache
def abstract(model_type, head="model", scan=False):
    """A tiny model's variables without values."""
    family = family_of(model_type)
    return abstract_variables(family.Model(family.VARIANTS["tiny"], head, scan=scan))


def chosen(predicate, variables):
    return {path for path in flatten(variables) if predicate(path)}


def test_patterns():
    bert = abstract("bert", "sequence_classification")
    is_trainable = matching(["params/*/attn/*", "params/head/*", "!*/bias"], bert)
    expected = {
        path
        for path in flatten(bert)
        if ("/attn/" in path or path.startswith("params/head/")) and not path.endswith("/bias")
    }
    assert chosen(is_trainable, bert) == expected
    stacked = abstract("bert", "sequence_classification", scan=True)
    assert chosen(matching(["params/layers/*"], stacked), stacked) == {
        path for path in flatten(stacked) if path.startswith("params/layers/")
    }
    with pytest.raises(ValueError, match="not a leaf"):
        is_trainable("params/layers/attn/query/kernel")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["params/head/*", "params/layers_7/*"], r"layers_7/\*' matches no leaf; near are \["),
        (["params/hed/kernel"], "near are .*'params/head/"),
        (["params/head/*", "!params/nothing/*"], "nothing/.*matches no leaf"),
        (["!params/head/*"], "without '!'"),
        (["params/head/*", "!params/*"], "leave nothing"),
        (["params/*"], "give no is_trainable"),
        ("params/*", "patterns: one text was given where a list"),
        (["*"], "give no is_trainable"),
    ],
)
def test_patterns_that_are_mistakes(patterns, message):
    with pytest.raises(ValueError, match=message):
        matching(patterns, abstract("bert", "sequence_classification"))


def test_single_layers_of_a_stack_are_refused():
    stacked = abstract("bert", scan=True)
    with pytest.raises(ValueError, match=r"stacked.*scan=False.*gradual_unfreezing"):
        matching(["params/layers_1/*"], stacked)
    with pytest.raises(ValueError, match=r"cannot freeze 1 of 2 layers.*scan=False"):
        from_layer(1, stacked)
    assert chosen(from_layer(0, stacked), stacked) == {
        path for path in flatten(stacked) if not path.startswith("params/embed/")
    }


def test_running_statistics_do_not_train():
    with pytest.raises(ValueError, match="running statistics"):
        matching(["*/norm/*"], abstract("resnet"))


def test_bitfit():
    bert = abstract("bert", "sequence_classification")
    found = chosen(bitfit(bert), bert)
    assert found == {path for path in flatten(bert) if path.endswith("/bias") or "/head/" in path}
    assert "params/layers_0/norm_1/bias" in found
    few = chosen(bitfit(bert, of=("query", "up"), head=()), bert)
    assert few == {
        f"params/layers_{i}/{name}/bias" for i in range(2) for name in ("attn/query", "mlp/up")
    }
    with pytest.raises(ValueError, match="has no biases"):
        bitfit(abstract("t5"), head=())
    with pytest.raises(ValueError, match=r"\['gate'\] has a bias"):
        bitfit(bert, of=("query", "gate"))
    with pytest.raises(ValueError, match="head="):
        bitfit(abstract("bert"))


def test_depths():
    def some(model_type, *paths, **options):
        found, blocks = depths(abstract(model_type, **options))
        return blocks, [found[f"params/{path}"].tolist() for path in paths]

    assert some(
        "bert", "embed/word/embedding", "layers_0/attn/key/bias", "layers_1/norm_2/scale",
        "head/classifier/kernel", "pooler/kernel", head="sequence_classification",
    ) == (2, [0, 1, 2, 3, 3])  # fmt: skip
    assert some("bert", "embed/norm/scale", "layers/attn/key/bias", scan=True) == (2, [0, [1, 2]])
    assert some(
        "t5", "embed/word/embedding", "encoder/layers_0/mlp/up/kernel",
        "encoder/layers_1/mlp/up/kernel", "encoder/final_norm/scale",
        "decoder/layers_0/mlp/up/kernel", "decoder/layers_1/mlp/up/kernel",
        "decoder/final_norm/scale",
    ) == (4, [0, 1, 2, 2, 3, 4, 5])  # fmt: skip
    assert some("bart", "decoder/embed/position/embedding", "decoder/layers_0/norm_1/scale") == (
        4,
        [2, 3],
    )
    assert some("longt5", "encoder/layers_1/norm_1/scale", "encoder/final_norm/scale",
                head="encoder") == (2, [2, 3])  # fmt: skip
    blocks, found = some(
        "convnext", "embed/kernel", "stages_0/blocks_0/norm/scale", "stages_1/merge/kernel",
        "stages_1/blocks_0/norm/scale", "head/kernel", head="image_classification",
    )  # fmt: skip
    assert found[:2] == [0, 1]
    assert found[2] == found[3] > 1
    assert found[4] == blocks + 1


@pytest.mark.slow
def test_every_family_has_an_order_or_is_refused():
    refused = set()
    for name in families():
        try:
            found, blocks = depths(abstract(name))
        except ValueError:
            refused.add(name)
            continue
        numbers = np.concatenate([np.ravel(depth) for depth in found.values()])
        assert {*range(1, blocks + 1)} <= {*numbers.tolist()}, name
        assert numbers.min() >= 0
        ends = any(path.startswith("params/final_norm") for path in found)
        assert numbers.max() == blocks + 1 or not ends, name
    towers = {"clip", "siglip", "vision_text_dual_encoder"}
    made_pictures = {"dcgan", "dvae", "vae", "vqgan", "wgan_gp"}
    older = {"alexnet", "densenet", "googlenet", "inception_v3", "vgg", "deepspeech2"}
    assert refused == towers | made_pictures | older | {"cnn", "mlp"}


LEAVES = {
    "params": {
        "embed": {"word": {"embedding": jnp.ones((3, 2))}},
        "layers_0": {"mlp": {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}},
        "layers_1": {"mlp": {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}},
        "final_norm": {"scale": jnp.ones(2)},
        "head": {"kernel": jnp.ones((2, 2))},
    },
    "adapters": {"layers_0": {"mlp": {"up": {"lora_a": jnp.ones((2, 1))}}}},
}
"""A model of two blocks."""


def gradients(tree, seed=0):
    """Random ones, the same for a layer whether it is stacked or not."""
    flat = dict(sorted(flatten(unstack_layers(tree)).items()))  # as compiled steps order it
    keys = jax.random.split(jax.random.key(seed), len(flat))
    pairs = zip(keys, flat.items(), strict=True)
    drawn = unflatten({path: jax.random.normal(key, leaf.shape) for key, (path, leaf) in pairs})
    return stack_layers(drawn) if "layers" in tree["params"] else drawn


def descend(tx, tree, steps):
    """The leaves after every step."""
    state, seen = tx.init(tree), []

    @jax.jit
    def step(tree, state, grads):
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    for seed in range(steps):
        tree, state = step(tree, state, gradients(tree, seed))
        seen.append(tree)
    return seen, state


def test_rates_fall_with_depth():
    ones = jax.tree.map(jnp.ones_like, LEAVES)
    tx = layerwise_decay(0.5, LEAVES)
    updates, _ = tx.update(ones, tx.init(ones))
    expected = {"embed": 0.125, "layers_0": 0.25, "layers_1": 0.5, "final_norm": 1, "head": 1}
    for path, leaf in flatten(updates).items():
        collection, name, *_ = path.split("/")
        factor = expected[name] if collection == "params" else 1
        np.testing.assert_array_equal(leaf, factor, err_msg=path)
    stacked = stack_layers(ones)
    tx = layerwise_decay(0.5, jax.eval_shape(lambda: stacked))
    scaled, _ = tx.update(stacked, tx.init(stacked))
    chex.assert_trees_all_equal(unstack_layers(scaled), updates)


def test_no_decay_is_the_optimizer_itself():
    plain, _ = descend(adamw(0.1), LEAVES, 2)
    scaled, _ = descend(optax.chain(adamw(0.1), layerwise_decay(1.0, LEAVES)), LEAVES, 2)
    chex.assert_trees_all_equal(scaled, plain)
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0"):
            layerwise_decay(decay, LEAVES)
    with pytest.raises(ValueError, match="no layers_"):
        layerwise_decay(0.5, {"params": {"kernel": jnp.ones(2)}})


OPTIMIZERS = {
    "adamw": lambda: adamw(warmup_linear(0.1, steps=20, warmup=2), weight_decay=0.5),
    "muon": lambda: muon(0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_from_the_start_is_the_optimizer_itself(name):
    make = OPTIMIZERS[name]
    plain, _ = descend(make(), LEAVES, 3)
    same, _ = descend(gradual_unfreezing(make(), LEAVES, starts=[0]), LEAVES, 3)
    chex.assert_trees_all_equal(same, plain)


def test_blocks_stand_still_until_they_start():
    starts = [0, 2, 3, 5]  # head, layers_1, layers_0, embeddings
    begins = {"head": 0, "final_norm": 0, "layers_1": 2, "layers_0": 3, "embed": 5}
    tx = gradual_unfreezing(OPTIMIZERS["adamw"](), LEAVES, starts=starts)
    seen, _ = descend(tx, LEAVES, 7)
    first = flatten(LEAVES)
    for number, tree in enumerate([LEAVES, *seen[:-1]]):
        after = flatten(seen[number])
        for path, leaf in flatten(tree).items():
            collection, name, *_ = path.split("/")
            if number < (begins[name] if collection == "params" else 0):
                np.testing.assert_array_equal(after[path], first[path], err_msg=path)
            elif number:  # the schedule begins at 0
                assert (np.asarray(after[path]) != np.asarray(leaf)).all(), (number, path)
    stacked, _ = descend(
        gradual_unfreezing(OPTIMIZERS["adamw"](), stack_layers(LEAVES), starts=starts),
        stack_layers(LEAVES),
        7,
    )
    chex.assert_trees_all_close(unstack_layers(stacked[-1]), seen[-1], rtol=1e-6)


def test_a_late_block_starts_as_if_new():
    """Its moments and Adam's count are those of a first step, and gradients before do not count."""
    late = gradual_unfreezing(optax.adam(0.1), LEAVES, starts=[0, 3])
    seen, state = descend(late, LEAVES, 4)
    new, fresh = optax.adam(0.1), gradients(LEAVES, 3)
    updates, _ = new.update(fresh, new.init(LEAVES), LEAVES)
    expected = optax.apply_updates(LEAVES, updates)
    chex.assert_trees_all_close(
        seen[-1]["params"]["layers_0"], expected["params"]["layers_0"], rtol=1e-6
    )
    np.testing.assert_array_equal(state.inner[0].count, [4, 1])
    clipped = gradual_unfreezing(optax.clip_by_global_norm(1.0), LEAVES, starts=[0, 9])
    huge = jax.tree.map(jnp.array, gradients(LEAVES))
    huge["params"]["embed"]["word"]["embedding"] *= 1e9
    small, _ = clipped.update(huge, clipped.init(LEAVES), LEAVES)
    rest = {k: v for k, v in flatten(gradients(LEAVES)).items() if "head" in k or "norm" in k}
    rest |= {k: v for k, v in flatten(gradients(LEAVES)).items() if k.startswith("adapters")}
    norm = optax.global_norm(rest)
    np.testing.assert_allclose(
        small["params"]["head"]["kernel"],
        gradients(LEAVES)["params"]["head"]["kernel"] / jnp.maximum(norm, 1.0),
        rtol=1e-5,
    )


@pytest.mark.parametrize("starts", [[], [-1], [3, 2], [0, 1, 2, 3, 4]])
def test_starts_that_are_mistakes(starts):
    with pytest.raises(ValueError, match="starts="):
        gradual_unfreezing(optax.sgd(0.1), LEAVES, starts=starts)


@pytest.mark.slow
def test_rates_unfreezing_and_averages_train_a_stacked_model(tmp_path):
    family = family_of("t5")
    model, variables = fmjax.create(
        "t5", family.VARIANTS["tiny"], head="seq2seq_lm", scan=True, rng=jax.random.key(0)
    )
    ids = jax.random.randint(jax.random.key(1), (4, 5), 3, 99)
    batch = {"input_ids": ids, "labels": ids[:, :4], "weight": jnp.ones(4)}
    tx = optax.chain(
        gradual_unfreezing(adamw(1e-2), variables, starts=[0, 2, 4]),
        layerwise_decay(0.8, variables),
        track_ema(0.5),
    )
    state, _ = check_trains(
        variables, seq2seq.loss(model, train=False), tx, batch, steps=8, folder=tmp_path
    )
    average = ema_of(state.opt_state)
    chex.assert_trees_all_equal_shapes(average, state.trainable)
    assert float(optax.global_norm(optax.tree.sub(average, state.trainable))) > 0


@pytest.mark.slow
def test_bitfit_trains_a_vision_transformer():
    family = family_of("vit")
    config = dataclasses.replace(family.VARIANTS["tiny"], initializer_range=0.3)
    model, variables = fmjax.create(
        "vit", config, head="image_classification", rng=jax.random.key(0)
    )
    shape = (4, config.image_size, config.image_size, config.num_channels)
    batch = {
        "pixel_values": jax.random.normal(jax.random.key(1), shape),
        "labels": jnp.arange(4) % 2,
        "weight": jnp.ones(4),
    }
    check_trains(
        variables,
        sequence_classification.loss(model, train=False),
        optax.adam(3e-2),
        batch,
        is_trainable=bitfit(variables),
    )


def test_plain_parameters_are_what_trains_by_default():
    """`from_layer` freezes embeddings and blocks below; the default nothing."""
    bert = abstract("bert", "sequence_classification")
    upper = chosen(from_layer(1, bert), bert)
    assert {path.split("/")[1] for path in upper} == {"layers_1", "pooler", "head"}
    assert upper < chosen(is_param, bert)
    with pytest.raises(ValueError, match="2 blocks"):
        from_layer(3, bert)
