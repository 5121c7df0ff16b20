"""Autoencoders of images whose latents are numbers of a codebook: the relaxed ones of DALL-E, and
vector quantisation. What is learnt makes an image a sentence of tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.pixels import to_floats
from fmjax.tree import override
from fmjax.types import Aux, Batch, LossFn, Mean, Output, StepFn, TrainState, Variables

Schedule = Callable[[Array], Any]
"""Steps done -> a number, such as Optax's schedules."""
STEPS = "annealing"
"""The collection of the count of steps, which the relaxed loss's schedules read."""


def with_steps(variables: Variables) -> Variables:
    """The variables of a dVAE with a count of training steps beside them, which `relaxed` moves."""
    return {**variables, STEPS: {"steps": jnp.zeros((), jnp.int32)}}


def without_steps(variables: Variables) -> Variables:
    """The inverse of `with_steps`: the model's own."""
    return {name: tree for name, tree in variables.items() if name != STEPS}


def relaxed(
    model: Any, *, temperature: Schedule, divergence: Schedule, train: bool = True
) -> LossFn:
    """The evidence lower bound with tokens drawn by the Gumbel-softmax relaxation (appendix A.2).

    Nats a number of the image: the log likelihood of pixels and, weighed, the divergence of the
    tokens' distribution from the uniform one, over rows * columns * channels. Not training, the
    likeliest tokens are taken, the divergence counts once, and nothing is drawn.

    Batches have ``pixel_values`` [B, X, Y, C], bytes or floats from 0 to 1, and ``weight`` [B] or
    none. The steps that the schedules read are counted in the variables: see `with_steps`.

    Args:
        model: a dVAE.
        temperature: of the relaxation; the paper's falls from 1 to 1/16.
        divergence: the weight beta; the paper's rises from 0 to 6.6.
        train: whether tokens are drawn.
    """
    apply = apply_fn(model)
    uniform = math.log(model.num_codes)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        pixels = to_floats(batch["pixel_values"])
        inputs: dict[str, Any] = {"pixel_values": pixels}
        beta: Any = 1.0
        updates: Variables = {}
        if train:
            if rng is None:
                raise ValueError("tokens are drawn: give a key")
            steps = variables[STEPS]["steps"]
            grid = (side // model.config.reduction for side in pixels.shape[1:3])
            shape = (len(pixels), *grid, model.num_codes)
            inputs["gumbel"] = jax.random.gumbel(rng, shape)
            inputs["temperature"] = temperature(steps)
            beta, updates = divergence(steps), {STEPS: {"steps": steps + 1}}
        output, _ = apply(without_steps(variables), inputs, None, train=train)
        assert output.logits is not None
        log_q = jax.nn.log_softmax(output.logits)
        apart = jnp.sum(jnp.exp(log_q) * (log_q + uniform), axis=(1, 2, 3))  # [B]
        seen = jnp.sum(model.log_density(output, pixels), axis=(1, 2, 3))
        assert output.images is not None
        weights, size = row_weights(batch), pixels[0].size
        found = Mean.of((beta * apart - seen) / size, weights)
        metrics = {
            "reconstruction": Mean.of(-seen / size, weights),
            "divergence": Mean.of(apart / size, weights),
            "squared_error": _squared_error(output.images, pixels, weights),
            "perplexity": _perplexity(output, model.num_codes, weights),
        }
        return found.value, Aux(found.weight, metrics, updates)

    return loss_fn


def vector_quantised(
    model: Any,
    *,
    commitment: float = 0.25,
    perceptual: Callable[[Array], Array] | None = None,
    perceptual_weight: float = 1.0,
    train: bool = True,
) -> LossFn:
    """Absolute errors of pixels, and what pulls codes to latents and latents to codes.

    ``|x - x'| + |sg(z) - e|^2 + beta |z - sg(e)|^2``, means over numbers (van den Oord et al. 2017,
    arXiv:1711.00937, equation 3; Esser et al. 2021, arXiv:2012.09841, section 3.1).

    Batches are as those of `relaxed`. Pixels are mapped to -1 to 1 here.

    Args:
        model: a VQGAN.
        commitment: beta.
        perceptual: images [B, X, Y, C] from 0 to 1 -> features [B, ...], whose squared differences
            count besides: of a net at hand, in the place of the paper's VGG.
        perceptual_weight: of them.
        train: passed on to the model.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        pixels = to_floats(batch["pixel_values"])
        inputs = {"pixel_values": 2 * pixels - 1}
        output, updates = apply(variables, inputs, rng, train=train)
        latents, codes, images = output.latents, output.quantised, output.images
        assert latents is not None
        assert codes is not None
        assert images is not None
        latents, codes = latents.astype(jnp.float32), codes.astype(jnp.float32)
        images = (images.astype(jnp.float32) + 1) / 2
        axes = (1, 2, 3)
        errors = jnp.mean(jnp.abs(2 * (images - pixels)), axes)
        codebook = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - codes), axes)
        kept = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)), axes)
        total = errors + codebook + commitment * kept
        weights = row_weights(batch)
        metrics = {
            "reconstruction": Mean.of(errors, weights),
            "commitment": Mean.of(kept, weights),
            "squared_error": _squared_error(images, pixels, weights),
            "perplexity": _perplexity(output, model.num_codes, weights),
        }
        if perceptual is not None:
            seen = jnp.square(perceptual(images) - jax.lax.stop_gradient(perceptual(pixels)))
            seen = jnp.mean(seen.reshape(len(seen), -1), axis=-1)
            total = total + perceptual_weight * seen
            metrics["perceptual"] = Mean.of(seen, weights)
        found = Mean.of(total, weights)
        return found.value, Aux(found.weight, metrics, updates)

    return loss_fn


def restarted(model: Any) -> Callable[[Variables, Batch, Array], Variables]:
    """``(variables, batch, rng) -> variables`` of a VQGAN whose codes that no latent of the batch
    is nearest to are latents of the batch.

    Codes that nothing is near get no gradient and stay unused (Dhariwal et al. 2020,
    arXiv:2005.00341, section 3.1, "random restarts"). Latents are drawn without replacement, in
    proportion to their squared distances from the codes that they have, as centres are by k-means++
    (Arthur & Vassilvitskii 2007): what is told well already is mostly left out.

    Args:
        model: a VQGAN. Batches are as those of `relaxed`.
    """
    low, high = model.pixel_range

    def of_batch(variables: Variables, batch: Batch, rng: Array) -> Variables:
        pixels = low + (high - low) * to_floats(batch["pixel_values"])
        output = model.apply(variables, pixels, method="encode")
        latents, codes = output.latents, output.codes.reshape(-1)  # [B, x, y, D], [N]
        far = jnp.square((latents - output.quantised).astype(jnp.float32)).sum(axis=-1)
        counted = jnp.broadcast_to(row_weights(batch)[:, None, None] > 0, far.shape).reshape(-1)
        table = variables["params"]["codebook"]["embedding"]  # [V, D]
        used = jnp.zeros(len(table), bool).at[codes].max(counted)
        # The largest of logarithms with Gumbel noise are draws without replacement.
        noisy = jnp.log(far.reshape(-1) + 1e-30) + jax.random.gumbel(rng, codes.shape)
        order = jnp.argsort(jnp.where(counted, -noisy, jnp.inf))  # [N]
        place = jnp.cumsum(~used) - 1  # [V], of the unused ones
        there = ~used & (place < jnp.sum(counted))
        drawn = latents.reshape(-1, table.shape[1])[order[jnp.minimum(place, len(order) - 1)]]
        new = jnp.where(there[:, None], drawn.astype(table.dtype), table)
        return override(variables, {"params": {"codebook": {"embedding": new}}})

    return of_batch


def restarting(step: StepFn, model: Any, *, every: int, steps: int) -> StepFn:
    """A training step of `vector_quantised` with `restarted` codes behind each `every`-th of the
    first `steps`, which leave the rest to settle.

    Optimizer moments stay. Draws follow from the state's key and step, so resuming is exact.

    Args:
        step: the step, not yet compiled.
        model: a VQGAN, all of whose parameters train.
        every, steps: in steps.

    Raises:
        ValueError: `every` is not positive.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    restart = restarted(model)

    def stepped(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        state, metrics = step(state, batch)
        # The next step's own key is this one's, unsplit.
        rng = jax.random.split(jax.random.fold_in(state.rng, state.step))[1]
        trainable = jax.lax.cond(
            (state.step % every == 0) & (state.step <= steps),
            lambda trainable: restart(trainable, batch, rng),
            lambda trainable: trainable,
            state.trainable,
        )
        return dataclasses.replace(state, trainable=trainable), metrics

    return stepped


def encode(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch with pixel_values) -> codes`` int [B, x, y], of a dVAE or a VQGAN."""
    low, high = model.pixel_range

    def codes(variables: Variables, batch: Batch) -> Array:
        pixels = low + (high - low) * to_floats(batch["pixel_values"])
        return model.apply(without_steps(variables), pixels, method="encode").codes

    return codes


def decode(model: Any) -> Callable[[Variables, Array], Array]:
    """``(variables, codes [B, x, y]) -> images`` [B, X, Y, C] from 0 to 1, of either."""
    low, high = model.pixel_range

    def images(variables: Variables, codes: Array) -> Array:
        made = model.apply(without_steps(variables), codes, method="decode_codes")
        return jnp.clip((made.astype(jnp.float32) - low) / (high - low), 0.0, 1.0)

    return images


def _squared_error(images: Array, pixels: Array, weights: Array) -> Mean:
    """Of pixels from 0 to 1, a mean over numbers."""
    return Mean.of(jnp.mean(jnp.square(images - pixels), axis=(1, 2, 3)), weights)


def _perplexity(output: Output, count: int, weights: Array) -> Mean:
    """How many codes the batch uses, as if it used them evenly; counted once a batch."""
    assert output.codes is not None
    codes = output.codes.reshape(len(weights), -1)
    shares = jnp.zeros(count).at[codes].add(weights[:, None])
    shares = shares / jnp.maximum(jnp.sum(shares), 1e-9)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0))
    total = jnp.sum(weights)
    return Mean(jnp.exp(entropy) * total, total)
