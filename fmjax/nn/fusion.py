"""Fusing what several encoders say of one example: late, by cross-attention, by co-attention.

A modality is a sequence of states [B, S, D] with a mask [B, S]; an example that lacks it is masked
everywhere in it. Each sequence is led by a token of its modality's own, which is always there: an
example without the modality has it alone, so that no attention is ever without keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.stack import LayerOutput

COMBINATIONS = ("mean", "product")


class Shared(NamedTuple):
    """What every layer reads.

    Args:
        fixed: by modality, states [B, S, D] that are attended to and stay as they are.
        masks: by modality, bool [B, S].
    """

    fixed: Mapping[str, Array]
    masks: Mapping[str, Array]


class Stream(nn.Module):
    """One modality's update: to the others' states and feed-forward, to its own and feed-forward.

    The co-attentional layer of ViLBERT (Lu et al. 2019, arXiv:1908.02265, section 2.2, figure 2b)
    and the Transformer layer that follows it, each sublayer with dropout, residual and norm.

    Args:
        num_heads: H.
        inner: F, of the feed-forward layers.
        act: their activation.
        epsilon: of the norms.
        dropout_rate: of each sublayer's output and of the probabilities.
        kernel_init: initializer of the kernels.
        train: whether to drop.
    """

    num_heads: int
    inner: int
    act: str
    epsilon: float
    dropout_rate: float
    kernel_init: Callable[..., Array]
    train: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array, others: Array, others_mask: Array) -> Array:
        update = self.attend("cross_attn", x, others_mask, others)  # [B, T, D]
        x = self.leave(x, update, "norm_cross")
        x = self.leave(x, self.feed_forward("cross_mlp", x), "norm_cross_mlp")
        x = self.leave(x, self.attend("attn", x, mask), "norm_1")
        return self.leave(x, self.feed_forward("mlp", x), "norm_2")

    def attend(self, name: str, x: Array, mask: Array, others: Array | None = None) -> Array:
        """Attention from x [B, T, D] to itself or to others [B, S, D], of which `mask` is."""
        layer = Attention(
            self.num_heads,
            dropout_rate=self.dropout_rate,
            train=self.train,
            kernel_init=self.kernel_init,
            name=name,
        )
        return layer(x, mask=mask[:, None, None, :], others=others)[0]

    def feed_forward(self, name: str, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        return Mlp(self.inner, self.act, self.kernel_init, name=name)(x)

    def leave(self, x: Array, update: Array, norm: str) -> Array:
        """The state after a sublayer."""
        update = Dropout(self.dropout_rate)(update, self.train)
        return LayerNorm(self.epsilon, name=norm)(x + update)


class Layer(nn.Module):
    """One layer over all modalities that are updated, for `fmjax.nn.stack.run_stack`.

    A modality that is updated attends to all others, as they were before the layer: with two that
    are both updated this is co-attention, with one it is cross-attention.

    Args:
        stream: makes the module that updates one modality, ``stream(name=...)``.
    """

    stream: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, hidden: dict[str, Array], cache: None, index: Array | int, shared: Shared
    ) -> tuple[dict[str, Array], LayerOutput]:
        states = {**shared.fixed, **hidden}
        result = {}
        for name, x in hidden.items():
            others = [other for other in states if other != name]
            result[name] = self.stream(name=name)(
                x,
                shared.masks[name],
                jnp.concatenate([states[other] for other in others], axis=1),
                jnp.concatenate([shared.masks[other] for other in others], axis=1),
            )
        return result, LayerOutput()


class Lead(nn.Module):
    """A modality's states at the common width, led by its token: [B, S, I] -> [B, 1 + S, D].

    Args:
        width: D.
        epsilon: of the norm.
        dropout_rate: after it.
        kernel_init: initializer of the kernel and the token.
        train: whether to drop.
    """

    width: int
    epsilon: float
    dropout_rate: float
    kernel_init: Callable[..., Array]
    train: bool

    @nn.compact
    def __call__(self, states: Array, mask: Array) -> tuple[Array, Array]:
        x = Dense(self.width, kernel_init=self.kernel_init, name="project")(states)
        token = parameter(self, "token", self.kernel_init, (1, 1, self.width)).astype(x.dtype)
        batch = states.shape[0]
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1)
        x = Dropout(self.dropout_rate)(LayerNorm(self.epsilon, name="norm")(x), self.train)
        return x, jnp.concatenate([jnp.ones((batch, 1), bool), mask], axis=1)


def masked_mean(states: Array, mask: Array) -> Array:
    """The mean of the states to keep, 0 where there are none: [B, S, D] -> [B, D]."""
    total = jnp.where(mask[..., None], states.astype(jnp.float32), 0.0).sum(axis=1)
    return (total / jnp.maximum(mask.sum(axis=1), 1)[:, None]).astype(states.dtype)


def combine(vectors: Sequence[Array], present: Array, combination: str) -> Array:
    """One vector of those of the modalities that an example has: [B, D] each -> [B, D].

    Args:
        vectors: of M modalities.
        present: bool [B, M].
        combination: "mean", or "product" (ViLBERT's, section 3.2).
    """
    stacked = jnp.stack([vector.astype(jnp.float32) for vector in vectors], axis=1)  # [B, M, D]
    keep = present[..., None]
    if combination == "product":
        product = jnp.where(keep, stacked, 1.0).prod(axis=1)
        result = jnp.where(present.any(axis=1)[:, None], product, 0.0)
    else:
        total = jnp.where(keep, stacked, 0.0).sum(axis=1)
        result = total / jnp.maximum(keep.sum(axis=1), 1)
    return result.astype(vectors[0].dtype)


def only_present(value: Array, present: Array) -> Any:
    """An input with 0 in the rows that lack its modality: nothing computed from it can tell what
    stood there, not even that it was no number.
    """
    keep = present.reshape(-1, *[1] * (value.ndim - 1))
    return jnp.where(keep, value, jnp.zeros((), value.dtype))
