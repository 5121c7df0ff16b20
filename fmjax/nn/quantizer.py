"""Vector quantisation by Gumbel-softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter


class GumbelQuantizer(nn.Module):
    """Each frame's choice of one vector from each of several codebooks, side by side.

    Baevski et al. 2020 (arXiv:2006.11477, section 2 and eq. 1): in training the choice is drawn by
    Gumbel noise, and its gradient is that of the softmax at a temperature (Jang et al. 2016,
    arXiv:1611.01144); otherwise it is the best one, through which no gradient passes.

    Args:
        groups: G, codebooks.
        entries: V, vectors of each.
        width: of G vectors side by side.
    """

    groups: int
    entries: int
    width: int

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, temperature: Array | float, train: bool
    ) -> tuple[Array, Array]:
        """Quantises frames.

        Args:
            x: [B, T, C].
            mask: bool [B, T], the frames whose choices count for the perplexity; None for all.
            temperature: of the softmax: a number, or [B].
            train: whether choices are drawn; it needs ``rngs={"dropout": key}``.

        Returns:
            ([B, T, width], perplexity [] float32): of the mean distribution over a codebook's
            vectors, summed over codebooks; G * V where all vectors are used alike.
        """
        total = self.groups * self.entries
        table = parameter(
            self,
            "codevectors",
            nn.initializers.uniform(1.0),
            (1, total, self.width // self.groups),
        )
        logits = Dense(total, kernel_init=nn.initializers.normal(1.0), name="scores")(x)
        logits = logits.reshape(*x.shape[:2], self.groups, self.entries).astype(jnp.float32)
        if train:
            heat = jnp.asarray(temperature, jnp.float32).reshape(-1, 1, 1, 1)
            noise = jax.random.gumbel(self.make_rng("dropout"), logits.shape)
            soft = jax.nn.softmax((logits + noise) / heat, axis=-1)
            hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), self.entries)
            # The difference first, exactly 0: frames of the same choice have the same vectors.
            chosen = hard + (soft - jax.lax.stop_gradient(soft))
            distribution = jax.nn.softmax(logits, axis=-1)
        else:
            chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), self.entries)
            distribution = chosen
        vectors = table.reshape(self.groups, self.entries, -1)
        out = jnp.einsum("BTGV,GVW->BTGW", chosen.astype(vectors.dtype), vectors)
        return out.reshape(*x.shape[:2], -1), perplexity(distribution, mask)


def perplexity(distribution: Array, mask: Array | None) -> Array:
    """exp of the entropy (nats) of the mean distribution, summed over codebooks: float32 [].

    Args:
        distribution: [B, T, G, V].
        mask: bool [B, T], the frames that count; None for all.
    """
    keep = jnp.ones(distribution.shape[:2], bool) if mask is None else mask
    mean = jnp.einsum("BTGV,BT->GV", distribution, keep.astype(jnp.float32))
    mean = mean / jnp.maximum(keep.sum(), 1)
    return jnp.exp(jax.scipy.special.entr(mean).sum(axis=-1)).sum()
