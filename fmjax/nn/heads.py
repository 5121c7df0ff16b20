"""Output heads that several families share."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.embed import Embed
from fmjax.nn.linear import Dense, dense
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import kept, parameter
from fmjax.nn.product import add_bias


class Unembedding(nn.Module):
    """Logits over the vocabulary from hidden states, nothing between.

    Args:
        vocab_size: V.
        tied: whether the input embedding is the output matrix.
        use_bias: whether a bias is added.
        kernel_init: initializer of the kernel.
    """

    vocab_size: int
    tied: bool
    use_bias: bool
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, embed: Embed) -> Array:  # [..., D] -> [..., V] float32
        kernel, bias = None, None
        if not self.tied:
            shape = (x.shape[-1], self.vocab_size)
            kernel = kept(self, "kernel", self.kernel_init, shape)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.vocab_size,))
        if kernel is not None:
            return dense(self, x, kernel, bias, add_bias)
        logits = embed.attend(x)
        return logits if bias is None else add_bias(logits, bias)


class VocabularyHead(nn.Module):
    """Transform, norm and logits over the vocabulary (Devlin et al. 2019, masked LM).

    Args:
        vocab_size: V.
        act: name of the activation after the transform.
        epsilon: of the layer norm.
        tied: whether the input embedding is the output matrix.
        kernel_init: initializer of the kernels.
        width: of the transform, which is that of a tied embedding; None is D.
    """

    vocab_size: int
    act: str
    epsilon: float
    tied: bool
    kernel_init: Callable[..., Array]
    width: int | None = None

    @nn.compact
    def __call__(self, x: Array, embed: Embed) -> Array:  # [B, T, D] -> [B, T, V] float32
        width = x.shape[-1] if self.width is None else self.width
        x = Dense(width, kernel_init=self.kernel_init, name="transform")(x)
        x = LayerNorm(self.epsilon, name="norm")(activation(self.act)(x))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.vocab_size,))
        if self.tied:
            return add_bias(embed.attend(x), bias)
        kernel = kept(self, "kernel", self.kernel_init, (width, self.vocab_size))
        return dense(self, x, kernel, bias, add_bias)
