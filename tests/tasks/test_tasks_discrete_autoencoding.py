"""Autoencoders with codebooks: densities, straight-through gradients, schedules, and learning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmjax
from fmjax.models import dvae, vqgan
from fmjax.tasks import discrete_autoencoding as task
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.tree import flatten
from fmjax.types import Output

WEIGHTS = np.float32([1, 1, 0])


def pixels_of(side=4, channels=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, side, side, channels)).astype(np.uint8)


def test_the_logit_laplace_density_is_one():
    model = dvae.Model(dvae.VARIANTS["tiny"])
    mapped = np.linspace(1e-6, 1 - 1e-6, 400_001)
    pixels = (mapped - 0.1) / 0.8
    out = Output(image_location=jnp.array(0.7), image_log_scale=jnp.array(-0.5))
    with jax.enable_x64(True):
        density = np.exp(np.asarray(model.log_density(out, jnp.asarray(pixels)), np.float64))
    assert np.trapezoid(density, mapped) == pytest.approx(1.0, abs=1e-3)
    # Half of it lies below the median.
    middle = 1 / (1 + np.exp(-0.7))
    below = mapped <= middle
    assert np.trapezoid(density[below], mapped[below]) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_the_relaxed_loss_follows_its_schedules():
    model, variables = fmjax.create("dvae", "tiny", rng=jax.random.key(0))
    loss = task.relaxed(
        model,
        temperature=lambda steps: 1.0 / (1 + steps),
        divergence=lambda steps: 2.0 * steps,
    )
    batch = {"pixel_values": pixels_of(), "weight": WEIGHTS}
    tx = optax.sgd(0.0)
    state = init_state(task.with_steps(variables), tx, jax.random.key(1))
    step, run = jax.jit(make_train_step(gradient(loss), tx)), jax.jit(model.apply)
    for number in range(2):
        # By hand, of the weights, which a rate of 0 leaves: the same key, noise and schedules.
        key = jax.random.fold_in(state.rng, state.step)
        gumbel = jax.random.gumbel(key, (3, 2, 2, 7))
        pixels = jnp.asarray(batch["pixel_values"]) / 255
        out = run(variables, pixels, gumbel, 1.0 / (1 + number))
        q = jax.nn.softmax(out.logits)
        apart = (q * jnp.log(q * 7)).sum(axis=(1, 2, 3))
        seen = model.log_density(out, pixels).sum(axis=(1, 2, 3))
        expected = float(((2.0 * number * apart - seen) / 32)[:2].mean())
        state, metrics = step(state, batch)
        assert float(metrics["loss"].value) == pytest.approx(expected, rel=1e-4)
        assert float(metrics["divergence"].value) == pytest.approx(
            float(apart[:2].mean() / 32), 1e-4
        )
    assert int(state.non_trainable[task.STEPS]["steps"]) == 2
    own = task.without_steps({**state.trainable, **state.non_trainable})
    assert flatten(own).keys() == flatten(variables).keys()
    with pytest.raises(ValueError, match="give a key"):
        loss(task.with_steps(variables), batch, None)


@pytest.mark.slow
def test_the_quantised_losses_pull_apart_what_they_should():
    """The codebook moves by its own term alone; the encoder by the image's and the commitment."""
    model, variables = fmjax.create("vqgan", "tiny", rng=jax.random.key(0))
    batch = {"pixel_values": pixels_of(8), "weight": WEIGHTS}

    @jax.jit
    def grads_of(variables):
        def loss(params, commitment):
            return task.vector_quantised(model, commitment=commitment)(
                {"params": params}, batch, None
            )

        return [
            jax.value_and_grad(loss, has_aux=True)(variables["params"], beta) for beta in (0.0, 1.0)
        ]

    ((free, aux), plain), ((kept, _), committed) = grads_of(variables)
    commitment = float(aux.metrics["commitment"].value)
    assert float(kept - free) == pytest.approx(commitment, rel=1e-4)
    codebook = [np.asarray(g["codebook"]["embedding"]) for g in (plain, committed)]
    np.testing.assert_allclose(codebook[0], codebook[1], atol=1e-7)
    # 2 (e - z) over the numbers of two images' 16 vectors each, by the code they chose.
    encode = jax.jit(lambda v, x: model.apply(v, x, method="encode"))
    out = encode(variables, 2 * (jnp.asarray(batch["pixel_values"]) / 255) - 1)
    difference = 2 * np.asarray(out.quantised - out.latents)[:2] / (2 * 16 * 5)
    expected = np.zeros((7, 5))
    np.add.at(expected, np.asarray(out.codes)[:2].ravel(), difference.reshape(-1, 5))
    np.testing.assert_allclose(codebook[0], expected, atol=1e-6)
    moved = [np.abs(np.asarray(g["quant_conv"]["kernel"])).max() for g in (plain, committed)]
    assert moved[0] > 0
    assert not np.allclose(plain["quant_conv"]["kernel"], committed["quant_conv"]["kernel"])


@pytest.fixture(scope="module")
def unused():
    """A VQGAN all of whose latents have one code: (model, variables, batch, its codes)."""
    model, variables = fmjax.create("vqgan", "tiny", rng=jax.random.key(0))
    table = variables["params"]["codebook"]["embedding"]
    variables["params"]["codebook"]["embedding"] = table.at[1:].add(100)
    batch = {"pixel_values": pixels_of(side=8), "weight": WEIGHTS}
    encode = jax.jit(
        lambda v: model.apply(v, batch["pixel_values"] / np.float32(127.5) - 1, method="encode")
    )
    return model, variables, batch, encode


def test_codes_that_nothing_is_near_begin_anew(unused):
    """As latents of counted rows, drawn where they are far; the others stay."""
    model, variables, batch, encode = unused
    table = np.asarray(variables["params"]["codebook"]["embedding"])
    out = encode(variables)
    assert np.unique(out.codes).tolist() == [0]
    latents = np.asarray(out.latents)[:2].reshape(-1, 5)
    restart = jax.jit(task.restarted(model))
    new = restart(variables, batch, jax.random.key(1))
    fresh = np.asarray(new["params"]["codebook"]["embedding"])
    np.testing.assert_array_equal(fresh[0], table[0])
    which = [int(np.abs(latents - row).sum(axis=1).argmin()) for row in fresh[1:]]
    np.testing.assert_allclose(fresh[1:], latents[which], atol=1e-6)
    assert len(set(which)) == 6  # without replacement
    assert len(np.unique(encode(new).codes)) == 7
    other = restart(variables, batch, jax.random.key(2))["params"]["codebook"]["embedding"]
    assert np.abs(fresh - other).max() > 0
    apart = {name: leaf for name, leaf in flatten(new).items() if "codebook" not in name}
    chex.assert_trees_all_equal(apart, {name: flatten(variables)[name] for name in apart})


@pytest.mark.slow
def test_codes_are_looked_after_on_time(unused):
    model, variables, batch, encode = unused
    tx = optax.sgd(0.0)
    step = make_train_step(gradient(task.vector_quantised(model)), tx)
    step = jit_step(task.restarting(step, model, every=2, steps=3))
    state = init_state(variables, tx, jax.random.key(0))
    counts = []
    for _ in range(3):
        state, _ = step(state, batch)
        counts.append(len(np.unique(encode(state.trainable).codes)))
    assert counts == [1, 7, 7]
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        task.restarting(step, model, every=0, steps=3)


def test_perplexity_counts_the_codes_in_use():
    codes = jnp.array([[[0, 0], [1, 1]], [[2, 2], [3, 3]], [[4, 4], [4, 4]]])
    found = task._perplexity(Output(codes=codes), 7, jnp.asarray(WEIGHTS))
    assert float(found.value) == pytest.approx(4.0, rel=1e-5)
    assert float(found.weight) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "dvae"])
def test_codes_learn_to_say_what_is_in_a_picture(kind):
    """Quarters of a picture, each of one of four colours: codes of a quarter are enough."""
    rng = np.random.default_rng(0)
    colours = np.uint8([[250, 20], [20, 250], [240, 240], [10, 10]])
    if kind == "vqgan":
        config = vqgan.Config(
            image_size=8, num_channels=2, base_channels=16, channel_multipliers=(1, 1, 1),
            blocks_per_level=1, attention_sizes=(), latent_channels=8, embedding_size=4,
            num_embeddings=16, norm_groups=4,
        )  # fmt: skip
        loss = lambda model: task.vector_quantised(model)  # noqa: E731
    else:
        config = dvae.Config(
            num_channels=2, hidden_size=16, initial_size=8, multipliers=(1, 1, 1),
            blocks_per_group=1, codebook_size=8,
        )  # fmt: skip
        loss = lambda model: task.relaxed(  # noqa: E731
            model, temperature=optax.linear_schedule(1.0, 0.3, 400), divergence=lambda step: 1.0
        )
    model, variables = fmjax.create(kind, config, rng=jax.random.key(0))
    tx = optax.adam(3e-3)
    state = init_state(task.with_steps(variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(loss(model)), tx))

    def draw():
        return colours[rng.integers(0, 4, (16, 2, 2))].repeat(4, axis=1).repeat(4, axis=2)

    for _ in range(600):
        state, _ = step(state, {"pixel_values": draw()})
    pixels, own = draw(), {**state.trainable, **state.non_trainable}
    codes = task.encode(model)(own, {"pixel_values": pixels})
    made = task.decode(model)(own, codes)
    assert codes.shape == (16, 2, 2)
    assert float(jnp.square(made - pixels / 255).mean()) < 0.06  # of one gray 0.17 or more
