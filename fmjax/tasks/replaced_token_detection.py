"""Replaced-token detection (ELECTRA, Clark et al. 2020, arXiv:2003.10555): a small generator fills
in masked tokens, a discriminator finds where it was wrong, and both learn at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.tasks.masked_lm import gather
from fmjax.tasks.masking import Masked, Masking, mask_tokens, row_keys
from fmjax.tasks.vocabulary_loss import (
    CHUNK_SIZE,
    IGNORED,
    Unembed,
    over_vocabulary,
    unembed_fn,
    vocabulary_loss,
)
from fmjax.tree import flatten, unflatten
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def join(
    generator: Variables, discriminator: Variables, *, shared: Sequence[str] = ()
) -> Variables:
    """Both models' variables as one tree: ``{"params": {"generator": ..., "discriminator": ...}}``.

    Args:
        generator, discriminator: as `fmjax.create` or `fmjax.load` gives them.
        shared: prefixes of parameters, such as "embed/word/", of which there is only the
            discriminator's, for both: the paper shares token and position embeddings.

    Raises:
        ValueError: shared parameters that one of them lacks or whose shapes differ.
    """
    mine, theirs = flatten(generator["params"]), flatten(discriminator["params"])
    problems = []
    for prefix in shared:
        paths = [path for path in mine if path.startswith(prefix)]
        if not paths:
            problems.append(f"the generator has no parameter {prefix!r}")
        for path in paths:
            if path not in theirs or theirs[path].shape != mine[path].shape:
                there = theirs[path].shape if path in theirs else "none"
                problems.append(
                    f"{path} is {mine[path].shape} in the generator and {there} in the "
                    "discriminator; what is shared must have one shape"
                )
    if problems:
        raise ValueError("cannot share parameters: " + "; ".join(problems))
    kept = {path: leaf for path, leaf in mine.items() if not path.startswith(tuple(shared))}
    own = {**generator, "params": unflatten(kept)}
    names = {**own, **discriminator}
    return {
        name: {
            side: tree[name]
            for side, tree in ((GENERATOR, own), (DISCRIMINATOR, discriminator))
            if name in tree
        }
        for name in names
    }


def part(variables: Variables, side: str, *, shared: Sequence[str] = ()) -> Variables:
    """One model's variables out of the joined tree, shared parameters included.

    Args:
        variables: from `join`, perhaps trained.
        side: "generator" or "discriminator".
        shared: as given to `join`.
    """
    own = {name: tree[side] for name, tree in variables.items() if side in tree}
    if side == GENERATOR and shared:
        theirs = flatten(variables["params"][DISCRIMINATOR])
        common = {path: leaf for path, leaf in theirs.items() if path.startswith(tuple(shared))}
        own["params"] = unflatten(common | flatten(own["params"]))
    return own


def loss(
    generator: Any,
    discriminator: Any,
    *,
    masking: Masking,
    shared: Sequence[str] = (),
    discriminator_weight: float = 50.0,
    train: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """The generator's masked cross-entropy plus `discriminator_weight` times the discriminator's
    binary cross-entropy (both nats), over the variables that `join` makes.

    Section 2 of the paper. Masked tokens are replaced by samples of the generator (with Gumbel
    noise; no gradient flows through them), and a token is "replaced" only if the sample is another
    than what was there. The first term is a mean over masked tokens, the second over all tokens
    that are no padding; the sum has the weight of the second, so that accumulated over pieces the
    first counts by the pieces' tokens.

    Args:
        generator: with the head ``masked_lm``.
        discriminator: whose ``logits`` [B, T] say that a token was replaced: ELECTRA's head
            ``pretraining``.
        masking: the paper's equation 2 has ``mask_share=1, random_share=0``, its code
            ``mask_share=0.85, random_share=0``.
        shared: see `join`.
        discriminator_weight: lambda in equation 5.
        train: whether dropout is on.
        chunk_size: see `vocabulary_loss`.
    """
    generate = apply_fn(generator, output_logits=False)
    discriminate = apply_fn(discriminator)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        mask_rng, *rngs, sample_rng = [None] * 4 if rng is None else list(jax.random.split(rng, 4))
        mine = part(variables, GENERATOR, shared=shared)
        theirs = part(variables, DISCRIMINATOR)
        masked = mask_tokens(mask_rng, batch, masking)
        output, first = generate(mine, masked.batch, rngs[0], train=train)
        assert output.last_hidden_state is not None
        hidden = gather(output.last_hidden_state, masked.positions)  # [B, M, D]
        unembed = unembed_fn(generator, mine)
        filled_in = vocabulary_loss(
            unembed, hidden, masked.labels, masked.weights, chunk_size=chunk_size
        )
        ids = jnp.asarray(batch["input_ids"])
        fake = corrupt(sample_rng, batch, masked, unembed, hidden, chunk_size=chunk_size)
        replaced = fake != ids  # [B, T]
        output, second = discriminate(theirs, {**batch, "input_ids": fake}, rngs[1], train=train)
        assert output.logits is not None
        if output.logits.shape != ids.shape:
            raise ValueError(
                f"the discriminator's logits have shape {output.logits.shape}; it must give one "
                f"for each of {ids.shape} tokens"
            )
        losses = optax.sigmoid_binary_cross_entropy(output.logits, replaced)  # [B, T]
        rows = row_weights(batch, len(ids))
        weights = rows[:, None] * (
            jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids))) != 0
        )
        found = Mean.of(losses, weights)
        metrics = {
            "generator_nll": filled_in.nll,
            "generator_accuracy": filled_in.accuracy,
            "discriminator_loss": found,
            "discriminator_accuracy": Mean.of((output.logits > 0) == replaced, weights),
            "replaced": Mean.of(replaced, weights),
        }
        value = filled_in.loss.value + discriminator_weight * found.value
        updates: Variables = {}
        for side, new in ((GENERATOR, first), (DISCRIMINATOR, second)):
            for name, tree in new.items():
                updates.setdefault(name, {})[side] = tree
        return value, Aux(found.weight, metrics, updates)

    return loss_fn


def corrupt(
    rng: Array | None,
    batch: Batch,
    masked: Masked,
    unembed: Unembed,
    hidden: Array,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Array:
    """int [B, T]: the ids with a sample of the generator at every masked position.

    Args:
        rng: a typed key; None draws for each example by its ``index`` alone.
        batch: before it was masked.
        masked: what was masked.
        unembed: the generator's vocabulary head.
        hidden: [B, M, D], the generator's states at the masked positions.
        chunk_size: see `vocabulary_loss`.
    """
    ids, positions = jnp.asarray(batch["input_ids"]), masked.positions
    assert positions is not None
    keys = jax.vmap(lambda key: jax.random.split(key, positions.shape[1]))(row_keys(rng, batch, 1))
    impl = jax.random.key_impl(keys)

    def sample(logits: Array, key_data: Array) -> Array:
        keys = jax.random.wrap_key_data(key_data, impl=impl)  # [B, t]
        return jax.vmap(jax.vmap(jax.random.categorical))(keys, logits)  # by Gumbel noise

    drawn = over_vocabulary(
        unembed,
        sample,
        jax.lax.stop_gradient(hidden),
        jax.random.key_data(keys),
        chunk_size=chunk_size,
    )  # [B, M]
    old = jnp.take_along_axis(ids, positions, axis=1)
    new = jnp.where(masked.labels == IGNORED, old, drawn.astype(ids.dtype))
    return jax.vmap(lambda row, at, values: row.at[at].set(values))(ids, positions, new)


def evaluate(
    generator: Any,
    discriminator: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    masking: Masking,
    shared: Sequence[str] = (),
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Losses and accuracies of both models over a whole set; every call masks and samples alike.

    Args:
        generator, discriminator, masking, shared, chunk_size: see `loss`.
        variables: of both, see `join`.
        batches: one epoch; the order does not matter.

    Returns:
        "generator_nll" (nats), "generator_accuracy", "discriminator_loss" (nats),
        "discriminator_accuracy", and "replaced", the share of tokens that are.
    """
    loss_fn = once(
        loss,
        generator,
        discriminator=discriminator,
        masking=masking,
        shared=tuple(shared),
        train=False,
        chunk_size=chunk_size,
    )
    found = means(loss_fn, variables, batches)
    return {name: total.value for name, total in found.items() if name != "loss"}


def predict(discriminator: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, T]``: the probability that each token was replaced.

    Args:
        discriminator: see `loss`; the variables are its own (`part`).
    """
    apply = apply_fn(discriminator)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return jax.nn.sigmoid(logits)

    return predict_fn
