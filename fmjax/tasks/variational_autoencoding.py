"""Variational autoencoding: the evidence lower bound of images (Kingma & Welling 2014,
arXiv:1312.6114), and their log likelihood by importance sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.tasks.pixels import to_floats
from fmjax.types import Aux, Batch, LossFn, Mean, Output, Variables


def divergence(output: Output) -> Array:
    """KL(q(z | x) || N(0, 1)) in nats, float32 [B] (appendix B)."""
    mean, log_variance = output.latent_mean, output.latent_log_variance
    assert mean is not None
    assert log_variance is not None
    terms = jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance
    return jnp.sum(terms, axis=-1) / 2


def log_likelihood(output: Output, pixels: Array) -> Array:
    """log p(x | z) of pixels [B, X, Y, C] from 0 to 1, in nats, float32 [B] (appendix C)."""
    location, log_scale = output.image_location, output.image_log_scale
    assert location is not None
    pixels = pixels.astype(jnp.float32)
    if log_scale is None:  # of Bernoullis, whose logits these are
        terms = pixels * location - jax.nn.softplus(location)
    else:
        scaled = (pixels - location) * jnp.exp(-log_scale)
        terms = -0.5 * jnp.square(scaled) - log_scale - 0.5 * math.log(2 * math.pi)
    return jnp.sum(terms, axis=(1, 2, 3))


def loss(model: Any, *, train: bool = True, beta: float = 1.0) -> LossFn:
    """The negative evidence lower bound in nats an image, with one draw of the latents.

    Batches have ``pixel_values`` [B, X, Y, C], bytes or floats from 0 to 1, ``weight`` [B] or none,
    and perhaps ``noise`` [B, Z]; without it the call's key draws it.

    Args:
        model: a variational autoencoder.
        train: passed on to the model.
        beta: weight of the divergence (Higgins et al. 2017); with any but 1 it is no bound.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        pixels = to_floats(batch["pixel_values"])
        batch = {**batch, "pixel_values": pixels}
        if "noise" not in batch:
            if rng is None:
                raise ValueError("the latents are drawn: give a key, or noise")
            shape = (len(pixels), model.config.latent_size)
            batch = {**batch, "noise": jax.random.normal(rng, shape)}
        output, updates = apply(variables, batch, rng, train=train)
        apart, seen = divergence(output), log_likelihood(output, pixels)
        weights = row_weights(batch)
        found = Mean.of(beta * apart - seen, weights)
        metrics = {
            "divergence": Mean.of(apart, weights),
            "reconstruction": Mean.of(-seen, weights),
        }
        return found.value, Aux(found.weight, metrics, updates)

    return loss_fn


def draw(model: Any) -> Callable[[Variables, Array], Array]:
    """``(variables, latents [B, Z]) -> images [B, X, Y, C]`` from 0 to 1, their means."""

    def images(variables: Variables, latents: Array) -> Array:
        return model.apply(variables, latents, method="decode").images

    return images


def importance_weighted(model: Any, samples: int) -> Callable[[Variables, Batch, Array], Array]:
    """``(variables, batch, key) -> log p(x)`` in nats, [B], from below: tight for many samples.

    The bound of Burda et al. 2016, arXiv:1509.00519, equation 8.

    Args:
        model: a variational autoencoder.
        samples: of the latents, of each image.

    Raises:
        ValueError: no samples.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    apply = apply_fn(model)

    def estimate(variables: Variables, batch: Batch, rng: Array) -> Array:
        pixels = to_floats(batch["pixel_values"])

        def one(key: Array) -> Array:
            noise = jax.random.normal(key, (len(pixels), model.config.latent_size))
            inputs = {"pixel_values": pixels, "noise": noise}
            output, _ = apply(variables, inputs, None, train=False)
            assert output.latent_mean is not None
            assert output.latent_log_variance is not None
            latents = output.latent_mean + jnp.exp(output.latent_log_variance / 2) * noise
            # log N(z; 0, 1) - log q(z | x): the constants are the same.
            prior = -0.5 * jnp.sum(jnp.square(latents), axis=-1)
            drawn = -0.5 * jnp.sum(jnp.square(noise) + output.latent_log_variance, axis=-1)
            return log_likelihood(output, pixels) + prior - drawn

        terms = jax.lax.map(one, jax.random.split(rng, samples))  # [S, B]
        return jax.nn.logsumexp(terms, axis=0) - math.log(samples)

    return estimate


def evaluate(
    model: Any, variables: Variables, batches: Iterable[Batch], seed: int = 0
) -> dict[str, float]:
    """The loss and its parts over a whole set, by the same noise in every evaluation.

    Args:
        model: a variational autoencoder.
        variables: its variables.
        batches: one epoch, with ``pixel_values`` and ``weight``.
        seed: of the noise.
    """

    def noisy() -> Iterable[Batch]:
        for number, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), number)
            shape = (len(batch["pixel_values"]), model.config.latent_size)
            yield {**batch, "noise": jax.random.normal(key, shape)}

    totals = means(once(loss, model, train=False), variables, noisy())
    return {name: total.value for name, total in totals.items()}
