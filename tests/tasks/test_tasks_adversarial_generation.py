"""Games of two players: losses by hand and PyTorch's double backward, and a game that is learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from chex import assert_trees_all_close

import fmjax
from fmjax.models import dcgan
from fmjax.tasks import adversarial_generation as task
from fmjax.tasks.apply import apply_fn
from fmjax.train import Turn, gradient, init_players, jit_step, take_turns
from fmjax.tree import flatten, part, together

CONFIG = dcgan.Config(num_channels=1, latent_size=3, hidden_sizes=(4,), kernel_size=4)


@pytest.fixture(scope="module")
def game():
    """Generator and discriminator with the variables of both, and a batch."""
    models, parts = {}, {}
    for number, (name, head) in enumerate(
        (("generator", "image_generation"), ("discriminator", "image_discrimination"))
    ):
        models[name], parts[name] = fmjax.create(
            "dcgan", CONFIG, head=head, rng=jax.random.key(number)
        )
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    batch = {"pixel_values": pixels, "weight": np.float32([1, 1, 1, 0])}
    wide = jax.tree.map(lambda leaf: 20 * leaf, parts["discriminator"])  # scores that differ
    return models, together(generator=parts["generator"], discriminator=wide), batch


def scores(models, variables, batch, key):
    """By the models alone: scores of real and of made images in training, and the images."""
    latents = jax.random.normal(key, (4, 3))
    made, moved = apply_fn(models["generator"])(
        part(variables, "generator"), {"latents": latents}, None, train=True
    )
    of = apply_fn(models["discriminator"])
    own = part(variables, "discriminator")
    return (
        *(of(own, {"pixel_values": x}, None, train=True)[0].logits[:, 0]
          for x in (jnp.asarray(batch["pixel_values"]), made.images)),
        made.images,
        moved,
    )  # fmt: skip


def test_the_non_saturating_game(game):
    models, variables, batch = game
    losses, key = task.non_saturating(*models.values()), jax.random.key(5)
    real, fake, _, moved = scores(models, variables, batch, key)
    cross = torch.nn.functional.binary_cross_entropy_with_logits
    real, fake = (torch.tensor(np.asarray(x)[:3]) for x in (real, fake))
    loss, aux = losses["discriminator"](variables, batch, key)
    expected = cross(real, torch.ones(3)) + cross(fake, torch.zeros(3))
    assert float(loss) == pytest.approx(float(expected), 1e-5)
    assert float(aux.weight) == 3
    assert float(aux.metrics["real_as_real"].value) == pytest.approx(float((real > 0).sum() / 3))
    loss, aux = losses["generator"](variables, batch, key)
    assert float(loss) == pytest.approx(float(cross(fake, torch.ones(3))), 1e-5)
    # Each turn moves its own statistics alone.
    assert_trees_all_close(aux.updates["batch_stats"]["generator"], moved["batch_stats"])
    assert list(aux.updates["batch_stats"]) == ["generator"]
    with pytest.raises(ValueError, match="give a key"):
        losses["generator"](variables, batch, None)


def test_the_critics_gradient_penalty():
    """Its gradient is a second derivative: against PyTorch's, through the same critic."""
    config = dcgan.Config(
        num_channels=1, latent_size=3, hidden_sizes=(4, 5), kernel_size=4,
        discriminator_norm="layer_norm",
    )  # fmt: skip
    generator, of_generator = fmjax.create(
        "dcgan", config, head="image_generation", rng=jax.random.key(0)
    )
    critic, of_critic = fmjax.create(
        "dcgan", config, head="image_discrimination", rng=jax.random.key(1)
    )
    variables = together(
        generator=of_generator, discriminator=jax.tree.map(lambda x: 5 * x, of_critic)
    )
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (3, 16, 16, 1)).astype(np.float32)
    batch = {"pixel_values": pixels, "weight": np.float32([1, 1, 2])}
    losses, key = task.wasserstein(generator, critic, penalty=10.0), jax.random.key(5)
    grads, loss, aux = jax.jit(
        lambda v: gradient(losses["discriminator"])(
            {"params": {"discriminator": v["params"]["discriminator"]}},
            {**v, "params": {"generator": v["params"]["generator"]}}, batch, key,
        )
    )(variables)  # fmt: skip
    # The same numbers by PyTorch.
    drawn, places = jax.random.split(key)
    latents = jax.random.normal(drawn, (3, config.latent_size))
    made = apply_fn(generator)(of_generator, {"latents": latents}, None, train=True)[0].images
    share = torch.tensor(np.asarray(jax.random.uniform(places, (3, 1, 1, 1))))
    weights = {
        name: torch.tensor(np.asarray(leaf), requires_grad=True)
        for name, leaf in flatten(variables["params"]["discriminator"]).items()
    }

    def score(x):
        for number in range(2):
            x = torch.nn.functional.conv2d(
                x, weights[f"conv_{number}/kernel"].permute(3, 2, 0, 1), stride=2, padding=1
            )
            if number:
                scale, bias = weights["norm_1/scale"], weights["norm_1/bias"]
                x = torch.nn.functional.group_norm(x, 1, scale, bias)
            x = torch.nn.functional.leaky_relu(x, 0.2)
        return torch.nn.functional.conv2d(x, weights["head/kernel"].permute(3, 2, 0, 1)).flatten()

    real, fake = (torch.tensor(np.moveaxis(np.asarray(x), -1, 1)) for x in (pixels, made))
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slopes,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
    norms = slopes.flatten(1).norm(dim=1)
    row = torch.tensor([1.0, 1.0, 2.0]) / 4
    expected = (row * (score(fake) - score(real) + 10 * (norms - 1) ** 2)).sum()
    assert float(loss) == pytest.approx(expected.item(), 1e-4)
    found = float(aux.metrics["gradient_norm"].value)
    assert found == pytest.approx((row * norms).sum().item(), 1e-4)
    expected.backward()
    for name, grad in flatten(grads["params"]["discriminator"]).items():
        theirs = weights[name].grad.numpy()
        np.testing.assert_allclose(grad, theirs, atol=2e-4 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.slow
def test_a_generator_learns_the_images(game):
    """Images that are gray on the left and black on the right: what is made comes to be so too."""
    config = dataclasses.replace(CONFIG, hidden_sizes=(16,))
    models, parts = {}, {}
    for number, (name, model) in enumerate(game[0].items()):
        models[name], parts[name] = fmjax.create(
            "dcgan", config, head=model.head, rng=jax.random.key(number)
        )
    losses = task.non_saturating(*models.values())
    turns = [
        Turn(name, gradient(losses[name]), optax.adam(1e-3, b1=0.5))
        for name in ("discriminator", "generator")
    ]
    state = init_players(together(**parts), turns, jax.random.key(0))
    step, rng = jit_step(take_turns(turns)), np.random.default_rng(0)
    for _ in range(400):
        halves = np.repeat([0.5, -0.9], 4)[:, None] + rng.normal(0, 0.05, (32, 8, 8, 1))
        state, _ = step(state, {"pixel_values": halves.astype(np.float32)})
    images = np.asarray(
        task.draw(models["generator"])(
            {**state.trainable, **state.non_trainable},
            jax.random.normal(jax.random.key(1), (64, 3)),
        )
    )
    left, right = images[:, :, :4], images[:, :, 4:]
    assert abs(left.mean() - 0.5) < 0.2
    assert abs(right.mean() + 0.9) < 0.2
    differ = left.mean(axis=(1, 2, 3)) > right.mean(axis=(1, 2, 3)) + 0.8
    assert differ.mean() > 0.8
