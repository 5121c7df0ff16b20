"""What holds for every family and head, from its tiny variant: the files of fmjax/models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from fmjax import hub
from fmjax.models import families, family_of
from fmjax.nn.convnet import ConvNet
from fmjax.nn.dropout import dropout, random_bits
from fmjax.tree import flatten, stack_layers, unflatten, unstack_layers
from fmjax.types import Output

CASES = [(name, head) for name in families() for head in family_of(name).HEADS]


# Families whose blocks are another's but for a detail that their own tests see.
ALIKE = {
    "whisper",  # mBART's, without a bias of keys
}


def inherits(name):
    """Whether a family is another one's model with the other's blocks, as XLM-RoBERTa is."""
    if name in ALIKE:
        return True
    _, *parents = (
        cls for cls in family_of(name).Model.__mro__ if cls.__module__.startswith("fmjax.models.")
    )
    own = family_of(name).Model
    return bool(parents) and all(
        getattr(own, part, None) is getattr(parents[0], part, None)
        for part in ("block", "encoder_stack")
    )


# What makes images: layers that are not scanned, or a decoder's blocks.
MAKERS = ("dalle", "dcgan", "dvae", "vae", "vqgan", "wgan_gp")
# A pair is its two towers, and SigLIP's have CLIP's blocks.
TOWERS = {"clip", "siglip", "siglip_text_model", "siglip_vision_model", "vision_text_dual_encoder"}


def seen_elsewhere(name):
    """Whether a family is made of others' blocks alone."""
    return name in TOWERS or inherits(name)


def less_to_see(name):
    """Whether a family has no blocks of its own, or blocks that are not scanned, as ResNet's."""
    return (
        seen_elsewhere(name)
        or name == "deepspeech2"
        or name in MAKERS
        or (name != "resnet" and issubclass(family_of(name).Model, ConvNet))
    )


def slow_where(seen, cases):
    """The cases, each begun by a family, those of families seen elsewhere for `make test-all`."""
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * bool(seen(case[0]))) for case in parts]


def small(family):
    """The tiny variant with a vocabulary that takes no time."""
    config = family.VARIANTS["tiny"]
    large = hasattr(config, "vocab_size") and config.vocab_size >= 200
    return dataclasses.replace(config, vocab_size=99) if large else config


def draw_inputs(family, config, head, *, length=7):
    """The family's smallest inputs, two rows of them, with random ids and their masks."""
    rng = np.random.default_rng(0)
    result = {}
    for name, value in family.inputs(config, head).items():
        shape = (2, *value.shape[1:])
        if name.endswith("input_ids"):
            shape = (*shape[:-1], length)
            size = config.vocab_size if hasattr(config, "vocab_size") else 60  # of one of its parts
            result[name] = rng.integers(3, size, shape)
            mask = np.ones(shape, np.int32)
            mask[1, ..., length - 2 :] = 0
            result[name.replace("input_ids", "attention_mask")] = mask
        else:
            result[name] = rng.normal(size=shape).astype(np.float32)
    return result


def random_variables(model, seed=0):
    """Variables drawn by numpy: what initialisation would give takes a compilation."""
    rng = np.random.default_rng(seed)
    flat = flatten(hub.abstract_variables(model))

    def draw(path, leaf):
        around = 1.0 if path.endswith(("scale", "variance")) else 0.0
        return (around + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return unflatten({path: jnp.asarray(draw(path, leaf)) for path, leaf in flat.items()})


def leaves_of(out: Output):
    """The outputs that are set, as a dict; those of an output inside it by their own names."""
    fields = {
        field.name: value
        for field in dataclasses.fields(out)
        if (value := getattr(out, field.name)) is not None
    }
    inner = {name: fields.pop(name) for name in list(fields) if isinstance(fields[name], Output)}
    return fields | {
        f"{name}.{field}": value
        for name, out in inner.items()
        for field, value in leaves_of(out).items()
    }


def total(out):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", slow_where(less_to_see, families()))
def test_ways_to_run_agree(name):
    """scan == loop; bfloat16 is near float32."""
    family = family_of(name)
    config = small(family)
    model = family.Model(config)
    variables = random_variables(model)
    inputs = draw_inputs(family, config, "model")
    forward = jax.jit(lambda model, v: leaves_of(model.apply(v, **inputs)), static_argnums=0)
    out = forward(model, variables)
    assert out
    scanned = forward(model.clone(scan=True), stack_layers(variables))
    assert_trees_all_close(scanned, out, atol=1e-5, rtol=1e-5)
    if hasattr(config, "num_local_experts"):
        # Rounding may change which experts are chosen, and the output jumps: let all of them be.
        config = dataclasses.replace(config, num_experts_per_tok=config.num_local_experts)
        model = family.Model(config)
        out = forward(model, variables)
    low = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, variables
    )
    for field, value in forward(model, low).items():
        scale = float(jnp.abs(out[field]).max())
        # 8 bits of mantissa through two layers: the worst error measured is 0.03 of the largest.
        np.testing.assert_allclose(
            np.asarray(value, np.float32), out[field], atol=0.06 * scale + 0.01
        )


# The families that the frames were written for, and one without a frame's blocks.
PARENTS = ("bert", "llama", "mixtral", "t5", "vit")


@pytest.mark.parametrize("name", slow_where(lambda name: name not in PARENTS, families()))
def test_gradients_of_ways_to_run_agree(name):
    """Scanned and recomputed layers have the gradients of the loop."""
    family = family_of(name)
    config = small(family)
    model = family.Model(config)
    variables = random_variables(model)
    inputs = draw_inputs(family, config, "model")

    def gradients(model, variables):
        def loss(params):
            return total(leaves_of(model.apply(variables | {"params": params}, **inputs)))

        return flatten(jax.jit(jax.grad(loss))(variables["params"]))

    grads = gradients(model, variables)
    scanned = gradients(model.clone(scan=True, remat="block"), stack_layers(variables))
    assert_trees_all_close(flatten(unstack_layers(unflatten(scanned))), grads, atol=2e-4, rtol=1e-4)


# Heads for labels stand on stacks that another head has too.
STACKS = [
    (name, head)
    for name, head in CASES
    if not head.endswith(("classification", "answering", "choice", "prediction", "xvector"))
]


@pytest.mark.parametrize(("name", "head"), STACKS)
def test_abstract_variables_are_those_of_the_loop(name, head):
    family = family_of(name)
    model = family.Model(small(family), head=head)
    inputs = family.inputs(model.config, head)
    loop = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    assert flatten(hub.abstract_variables(model)) == flatten(loop)
    stacked = hub.abstract_variables(model.clone(scan=True))
    assert flatten(stacked) == flatten(stack_layers(loop))


VOCABULARY = [
    (name, head)
    for name, head in CASES
    if head in ("masked_lm", "causal_lm", "pretraining", "seq2seq_lm")
    and not hasattr(family_of(name).Config, "image_size")
    and not hasattr(family_of(name).Config, "conv_dim")  # wav2vec 2.0's is contrastive
]


@pytest.mark.parametrize(("name", "head"), slow_where(seen_elsewhere, VOCABULARY))
def test_logits_come_from_the_hidden_states(name, head):
    """output_logits=False and unembed give the logits: what chunked losses build on."""
    family = family_of(name)
    config = small(family)
    model = family.Model(config, head=head)
    inputs = draw_inputs(family, config, head)

    @jax.jit
    def both(variables):
        out = model.apply(variables, **inputs)
        bare = model.apply(variables, **inputs, output_logits=False)
        assert bare.logits is None
        assert bare.prediction_logits is None
        logits = out.prediction_logits if out.logits is None else out.logits
        return logits, model.apply(variables, bare.last_hidden_state, method="unembed")

    logits, again = both(random_variables(model))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, again, atol=1e-5 * float(jnp.abs(logits).max()))


TEXT = [
    name
    for name in families()
    if hasattr(family_of(name).Config, "vocab_size")
    and not hasattr(family_of(name).Config, "image_size")  # BEiT's is of visual tokens
    and not hasattr(family_of(name).Config, "conv_dim")  # wav2vec 2.0's is of what it hears
    and not hasattr(family_of(name).Config, "num_features")  # and Deep Speech 2's
    and not hasattr(family_of(name).Config, "conv_channels")
]


@pytest.mark.parametrize("name", slow_where(seen_elsewhere, TEXT))
def test_padding_changes_nothing(name):
    """Whatever stands in the padding leaves the other positions alone."""
    family = family_of(name)
    config = small(family)
    model = family.Model(config)
    variables = random_variables(model)
    inputs = draw_inputs(family, config, "model", length=11)
    masks = [key for key in inputs if key.endswith("attention_mask")]
    for key in masks:
        inputs[key][:, 7:] = 0
    run = jax.jit(lambda v, **kw: model.apply(v, **kw).last_hidden_state)
    outputs = []
    for filler in (5, 55):
        filled = {
            key: np.where(inputs[key.replace("input_ids", "attention_mask")] == 1, value, filler)
            if key.endswith("input_ids")
            else value
            for key, value in inputs.items()
        }
        outputs.append(run(variables, **filled))
    keep = inputs[masks[-1]].astype(bool)  # of an encoder-decoder, the decoder's
    first, second = (out[:, : keep.shape[1]] for out in outputs)  # what follows is no text
    np.testing.assert_allclose(first[keep], second[keep], atol=1e-5)


@pytest.mark.parametrize("name", slow_where(seen_elsewhere, families()))
def test_dropout_depends_on_the_key_alone(name):
    """Traced, not run: the same key gives the same draws, and with no dropout there are none."""
    family = family_of(name)
    config = small(family)
    model = family.Model(config)
    inputs = draw_inputs(family, config, "model")
    variables = hub.abstract_variables(model)

    def jaxpr(train):
        def run(variables, key):
            return model.apply(variables, **inputs, train=train, rngs={"dropout": key})

        return str(jax.make_jaxpr(run)(variables, jax.random.key(1)))

    rates = [
        value
        for name, value in flatten(dataclasses.asdict(config)).items()  # and of its parts
        if isinstance(value, float) and ("drop" in name)
    ]
    assert "random_bits" not in jaxpr(False)
    assert ("random_bits" in jaxpr(True)) == any(rates)


def test_dropout_in_a_model_follows_the_key():
    family = family_of("bert")
    config = small(family)
    model, variables = hub.create("bert", config, rng=jax.random.key(0))
    inputs = draw_inputs(family, config, "model")
    run = jax.jit(
        lambda key: (
            model.apply(variables, **inputs, train=True, rngs={"dropout": key}).last_hidden_state
        )
    )
    first = run(jax.random.key(1))
    np.testing.assert_array_equal(first, run(jax.random.key(1)))
    assert not np.array_equal(first, run(jax.random.key(2)))
    plain = model.apply(variables, **inputs).last_hidden_state
    assert not np.allclose(first, plain, atol=1e-2)


def test_dropout_keeps_the_expectation_and_the_rate():
    x = jnp.ones((512, 1024))
    for rate in (0.1, 0.5, 0.9):
        y = np.asarray(dropout(jax.random.key(0), x, rate))
        values = np.unique(y)
        np.testing.assert_allclose(values, [0.0, 1.0 / (1.0 - rate)], rtol=1e-6)
        # Five standard deviations of a binomial share.
        margin = 5 * np.sqrt(rate * (1 - rate) / y.size)
        assert abs((y == 0).mean() - rate) < margin


def test_random_bits_are_uniform_and_uncorrelated():
    """Each bit, neighbours in every direction, and streams of neighbouring keys."""
    shape = (256, 1024)
    margin = 5 / np.sqrt(shape[0] * shape[1])
    streams = []
    for seed in (0, 1):
        bits = np.asarray(random_bits(jax.random.key(seed), shape))
        signs = ((bits[None] >> np.arange(32, dtype=np.uint32)[:, None, None]) & 1) * 2.0 - 1.0
        assert np.abs(signs.mean(axis=(1, 2))).max() < margin
        for step in (1, 2, 3, 64):
            along = (signs[:, :, step:] * signs[:, :, :-step]).mean(axis=(1, 2))
            down = (signs[:, step:] * signs[:, :-step]).mean(axis=(1, 2))
            assert np.abs(along).max() < 1.5 * margin
            assert np.abs(down).max() < 1.5 * margin
        streams.append(signs)
    assert np.abs((streams[0] * streams[1]).mean(axis=(1, 2))).max() < margin
    chi = np.bincount(bits.ravel() >> 24, minlength=256)
    expected = bits.size / 256
    assert ((chi - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)


def test_dropout_masks_of_layers_differ():
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(8)]
    masks = np.stack([np.asarray(dropout(key, jnp.ones(4096), 0.5) > 0) for key in keys])
    correlation = np.corrcoef(masks)
    assert np.abs(correlation - np.eye(8)).max() < 5 / np.sqrt(4096)
