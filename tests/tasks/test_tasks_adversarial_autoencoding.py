"""VQGAN's game: the adaptive weight and both losses against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.models import vqgan
from fmjax.tasks import adversarial_autoencoding as task
from fmjax.tasks.discrete_autoencoding import vector_quantised
from fmjax.tree import flatten, together, unflatten

CONFIG = vqgan.Config(
    image_size=16, num_channels=1, base_channels=4, channel_multipliers=(1, 1), blocks_per_level=1,
    attention_sizes=(), latent_channels=3, embedding_size=3, num_embeddings=5, norm_groups=2,
    discriminator_channels=3, discriminator_layers=1,
)  # fmt: skip


@pytest.mark.slow
def test_the_game_is_the_papers():
    auto, of_auto = fmjax.create("vqgan", CONFIG, rng=jax.random.key(0))
    judge, of_judge = fmjax.create(
        "vqgan", CONFIG, head="image_discrimination", rng=jax.random.key(1)
    )
    of_judge = {**of_judge, "params": jax.tree.map(lambda x: 20 * x, of_judge["params"])}
    variables = together(generator=of_auto, discriminator=of_judge)
    pixels = np.random.default_rng(0).uniform(size=(3, 16, 16, 1)).astype(np.float32)
    batch = {"pixel_values": pixels, "weight": np.float32([1, 1, 0])}
    losses = task.quantised_game(auto, judge, weight=0.5)

    def opinion(images):
        out, _ = judge.apply(of_judge, images, train=True, mutable=["batch_stats"])
        return out.logits.reshape(3, -1)[:2]

    @jax.jit
    def by_hand(own):
        plain = vector_quantised(auto)(own, batch, None)[0]
        made = auto.apply(own, 2 * pixels - 1).images
        return plain, -opinion(made).mean(), opinion(2 * pixels - 1), opinion(made)

    plain, adversarial, real, fake = by_hand(of_auto)
    value, aux = jax.jit(losses["discriminator"])(variables, batch, None)
    expected = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    assert float(aux.weight) == 2
    assert list(aux.updates["batch_stats"]) == ["discriminator"]

    def at(kernel):
        return by_hand(unflatten({**flatten(of_auto), task.LAST: kernel}))

    kernel = flatten(of_auto)[task.LAST]
    slopes = [
        float(jnp.linalg.norm(jax.grad(lambda k, i=i: at(k)[i])(kernel).ravel())) for i in (0, 1)
    ]
    balance = slopes[0] / (slopes[1] + 1e-4)
    value, aux = jax.jit(losses["generator"])(variables, batch, None)
    assert float(aux.metrics["balance"].value) == pytest.approx(balance, rel=1e-3)
    expected = float(plain) + 0.5 * balance * float(adversarial)
    assert float(value) == pytest.approx(expected, rel=1e-3)
