"""VQGAN's second half (Esser et al. 2021, arXiv:2012.09841, section 3.1): a patch discriminator
that tells rebuilt images from real ones, and an autoencoder that is to deceive it.

Two LossFns over the variables of both players, ``together(generator=..., discriminator=...)``, for
`fmjax.train.players.take_turns`; the authors begin with the autoencoder's loss alone
(`fmjax.tasks.discrete_autoencoding.vector_quantised`), and then play.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.adversarial_generation import DISCRIMINATOR, GENERATOR, Score, placed, scoring
from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.discrete_autoencoding import vector_quantised
from fmjax.tasks.pixels import to_floats
from fmjax.tree import flatten, override, part, unflatten
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

LAST = "params/decoder/conv_out/kernel"
"""The last layer, whose gradients the two losses are balanced by."""
LARGEST = 1e4


def quantised_game(
    autoencoder: Any,
    discriminator: Any,
    *,
    weight: float = 0.8,
    commitment: float = 0.25,
    perceptual: Callable[[Array], Array] | None = None,
    perceptual_weight: float = 1.0,
) -> dict[str, LossFn]:
    """Equation 6: the quantised losses and, adaptively weighed, the discriminator's opinion.

    The discriminator's is the authors' hinge loss (Lim & Ye 2017). Batches have ``pixel_values``
    [B, X, Y, C], bytes or floats from 0 to 1, and ``weight`` [B] or none.

    Args:
        autoencoder: a VQGAN with the head ``model``.
        discriminator: one with the head ``image_discrimination``.
        weight: of the adversarial loss, beside the adaptive one.
        commitment, perceptual, perceptual_weight: see `vector_quantised`.
    """
    quantised = vector_quantised(
        autoencoder, commitment=commitment, perceptual=perceptual,
        perceptual_weight=perceptual_weight,
    )  # fmt: skip
    apply = apply_fn(autoencoder)
    score: Score = scoring(discriminator)

    def rebuilt(own: Variables, batch: Batch) -> Array:
        pixels = 2 * to_floats(batch["pixel_values"]) - 1
        output, _ = apply(own, {"pixel_values": pixels}, None, train=True)
        assert output.images is not None
        return output.images

    def of_discriminator(variables: Variables, batch: Batch, rng: Array | None):
        made = jax.lax.stop_gradient(rebuilt(part(variables, GENERATOR), batch))
        real, updates = score(variables, 2 * to_floats(batch["pixel_values"]) - 1)
        fake, updates = score(override(variables, updates), made)
        weights = row_weights(batch)
        errors = (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)) / 2  # [B, N]
        found = Mean.of(jnp.mean(errors, axis=1), weights)
        metrics = {
            "real_as_real": Mean.of(jnp.mean(real > 0, axis=1), weights),
            "made_as_real": Mean.of(jnp.mean(fake > 0, axis=1), weights),
        }
        return found.value, Aux(found.weight, metrics, updates)

    def of_autoencoder(variables: Variables, batch: Batch, rng: Array | None):
        own = part(variables, GENERATOR)
        flat, weights = flatten(own), row_weights(batch)

        def terms(kernel: Array) -> tuple[tuple[Array, Array], tuple[Aux, Mean]]:
            with_kernel = unflatten({**flat, LAST: kernel})
            plain, aux = quantised(with_kernel, batch, rng)
            opinion, _ = score(variables, rebuilt(with_kernel, batch))
            deceived = Mean.of(-jnp.mean(opinion, axis=1), weights)
            return (plain, deceived.value), (aux, deceived)

        (plain, opposed), pull, (aux, deceived) = jax.vjp(terms, flat[LAST], has_aux=True)
        one, zero = jnp.ones_like(plain), jnp.zeros_like(plain)
        slopes = [jnp.linalg.norm(pull(pair)[0].ravel()) for pair in ((one, zero), (zero, one))]
        # Equation 7. The weight itself is not differentiated.
        balance = jnp.clip(slopes[0] / (slopes[1] + 1e-4), 0, LARGEST)
        balance = jax.lax.stop_gradient(balance)
        value = plain + weight * balance * opposed
        metrics = {**aux.metrics, "adversarial": deceived}
        metrics["balance"] = Mean(balance * aux.weight, aux.weight)
        return value, Aux(aux.weight, metrics, placed(aux.updates, GENERATOR))

    return {DISCRIMINATOR: of_discriminator, GENERATOR: of_autoencoder}
