"""Two players: a generator makes images, and a discriminator, or critic, tells them from real ones.

Each game is two LossFns over the variables of both, ``together(generator=..., discriminator=...)``,
to be played by `fmjax.train.players.take_turns`. A player's loss moves only its own batch
statistics; the other's model runs as in training too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tree import override, part
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
Score = Callable[[Variables, Array], tuple[Array, Variables]]
"""(variables of both, images [B, X, Y, C]) -> (scores [B, N], new statistics of the discriminator);
N is 1 but for a discriminator of patches."""


def draw(generator: Any) -> Callable[[Variables, Array], Array]:
    """``(variables of both, latents [B, Z]) -> images [B, X, Y, C]``, as after training.

    Args:
        generator: a model with the head ``image_generation``.
    """
    apply = apply_fn(generator)

    def images(variables: Variables, latents: Array) -> Array:
        own = part(variables, GENERATOR)
        output, _ = apply(own, {"latents": latents}, None, train=False)
        assert output.images is not None
        return output.images

    return images


def non_saturating(generator: Any, discriminator: Any) -> dict[str, LossFn]:
    """The game of Goodfellow et al. 2014 (arXiv:1406.2661), equation 1 with the generator's loss of
    section 3: it makes its images likelier to be called real.

    Batches have ``pixel_values`` [B, X, Y, C] in the generator's range, of which its loss needs the
    number only, and ``weight`` [B], or none. Metrics are the shares of real and of made images that
    the discriminator calls real.

    Args:
        generator: a model with the head ``image_generation``.
        discriminator: one whose logits [B, 1] are those of being real.

    Returns:
        A LossFn (nats) for each player.
    """
    make, score = _making(generator), _whole(discriminator)

    def of_discriminator(variables: Variables, batch: Batch, rng: Array | None):
        made, _ = make(variables, batch, rng)
        real, updates = score(variables, jnp.asarray(batch["pixel_values"]))
        fake, updates = score(override(variables, updates), jax.lax.stop_gradient(made))
        weights = row_weights(batch)
        # -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s).
        found = Mean.of(jax.nn.softplus(-real) + jax.nn.softplus(fake), weights)
        metrics = {
            "real_as_real": Mean.of(real > 0, weights),
            "made_as_real": Mean.of(fake > 0, weights),
        }
        return found.value, Aux(found.weight, metrics, updates)

    def of_generator(variables: Variables, batch: Batch, rng: Array | None):
        made, updates = make(variables, batch, rng)
        fake, _ = score(variables, made)
        found = Mean.of(jax.nn.softplus(-fake), row_weights(batch))
        return found.value, Aux(found.weight, {}, updates)

    return {DISCRIMINATOR: of_discriminator, GENERATOR: of_generator}


def wasserstein(generator: Any, critic: Any, *, penalty: float = 10.0) -> dict[str, LossFn]:
    """The game of Gulrajani et al. 2017 (arXiv:1704.00028), equation 3 and algorithm 1.

    The critic's scores of real and made images are as far apart as they can be while the norm of
    their gradient stays near 1, on lines between the two. Five rounds of the critic for one of the
    generator, by Adam with b1 = 0 and b2 = 0.9.

    Batches are as those of `non_saturating`. Metrics of the critic are ``distance``, its estimate
    of the Wasserstein distance, and ``gradient_norm``.

    Args:
        generator: a model with the head ``image_generation``.
        critic: one with logits [B, 1] and no batch normalisation, through which examples would
            depend on each other (section 4).
        penalty: lambda, weight of the gradient's distance from norm 1.
    """
    make, score = _making(generator), _whole(critic)

    def of_critic(variables: Variables, batch: Batch, rng: Array | None):
        if rng is None:
            raise ValueError("the gradient's penalty is at random places: give a key")
        rng, key = jax.random.split(rng)
        made, _ = make(variables, batch, rng)
        made = jax.lax.stop_gradient(made)
        pixels = jnp.asarray(batch["pixel_values"], made.dtype)
        share = jax.random.uniform(key, (len(made), 1, 1, 1), made.dtype)
        between = share * pixels + (1 - share) * made
        real, updates = score(variables, pixels)
        fake, _ = score(variables, made)
        # Of a sum, because no example's score depends on another's image.
        slopes = jax.grad(lambda x: jnp.sum(score(variables, x)[0]))(between)
        norms = _norms(slopes)
        weights = row_weights(batch)
        found = Mean.of(fake - real + penalty * jnp.square(norms - 1), weights)
        metrics = {
            "distance": Mean.of(real - fake, weights),
            "gradient_norm": Mean.of(norms, weights),
        }
        return found.value, Aux(found.weight, metrics, updates)

    def of_generator(variables: Variables, batch: Batch, rng: Array | None):
        made, updates = make(variables, batch, rng)
        fake, _ = score(variables, made)
        found = Mean.of(-fake, row_weights(batch))
        return found.value, Aux(found.weight, {}, updates)

    return {DISCRIMINATOR: of_critic, GENERATOR: of_generator}


def _norms(x: Array) -> Array:
    """Each example's l2 norm, [B], with a derivative at 0 too."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))
    return jnp.sqrt(square + 1e-12)


def _making(generator: Any) -> Callable[..., tuple[Array, Variables]]:
    """(variables, batch, rng) -> (as many images as the batch has, new statistics)."""
    apply, size = apply_fn(generator), generator.config.latent_size

    def make(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Variables]:
        if rng is None:
            raise ValueError("a generator's images are made of random numbers: give a key")
        latents = jax.random.normal(rng, (len(batch["pixel_values"]), size))
        own = part(variables, GENERATOR)
        output, updates = apply(own, {"latents": latents}, None, train=True)
        assert output.images is not None
        return output.images, placed(updates, GENERATOR)

    return make


def _whole(discriminator: Any) -> Score:
    """The scores [B] of a discriminator of whole images."""
    scores = scoring(discriminator)

    def score(variables: Variables, images: Array) -> tuple[Array, Variables]:
        found, updates = scores(variables, images)
        if found.shape[1] != 1:
            raise ValueError(
                f"the discriminator has {found.shape[1]} scores an image; this game has one"
            )
        return found[:, 0], updates

    return score


def scoring(discriminator: Any) -> Score:
    """A discriminator as the games call it: as in training, its scores flat."""
    apply = apply_fn(discriminator)

    def score(variables: Variables, images: Array) -> tuple[Array, Variables]:
        own = part(variables, DISCRIMINATOR)
        output, updates = apply(own, {"pixel_values": images}, None, train=True)
        assert output.logits is not None
        scores = output.logits.reshape(len(images), -1)
        return scores, placed(updates, DISCRIMINATOR)

    return score


def placed(updates: Variables, name: str) -> Variables:
    """One player's new statistics, where they lie in the variables of both."""
    return {collection: {name: tree} for collection, tree in updates.items()}
