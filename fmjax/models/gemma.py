"""Gemma (Gemma Team 2024, arXiv:2403.08295): Llama with word vectors scaled by the square root of
the width, norms that multiply by 1 + scale, and a gelu gate. HF "gemma".
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import llama
from fmjax.models.llama import IGNORED, PREFIX, from_tensors, inputs
from fmjax.nn.decoder import Inputs
from fmjax.nn.parameter import parameter
from fmjax.weights import Rule

__all__ = ["IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5).

    The activation has two names, of which `hidden_activation` counts where it is given, and
    ``hidden_act="gelu"`` has always meant the tanh approximation. Both are set to what counts, so
    that every version of transformers reads the same from a file.
    """

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        act = self.hidden_activation
        if act is None:
            act = "gelu_pytorch_tanh" if self.hidden_act == "gelu" else self.hidden_act
        object.__setattr__(self, "hidden_act", act)
        object.__setattr__(self, "hidden_activation", act)
        super().__post_init__()

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias


MODEL_TYPE = "gemma"
HEADS = {
    "model": "GemmaModel",
    "causal_lm": "GemmaForCausalLM",
    "sequence_classification": "GemmaForSequenceClassification",
    "token_classification": "GemmaForTokenClassification",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, attention_bias=True,
    ),
    # Gemma Team 2024, table 1.
    "2b": Config(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1,
    ),
    "7b": Config(),
}  # fmt: skip


class Norm(nn.Module):
    """RMS norm times 1 + scale, over the last axis, in x's dtype.

    The parameter is the difference from 1, as in the files: it keeps its digits in half precision,
    and weight decay pulls to the identity.

    Args:
        epsilon: added to the mean square.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        scale = parameter(self, "scale", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(square + self.epsilon)
        return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class Block(llama.Block):
    """Llama's, with Gemma's norms."""

    def norm(self, name: str) -> nn.Module:
        return Norm(self.config.rms_norm_eps, name=name)


class Model(llama.Model):
    """Gemma with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block
    norm = Norm

    def embed_inputs(self, inputs: Inputs) -> Array:
        x = super().embed_inputs(inputs)
        if inputs.input_ids is None:
            return x
        # Rounded to float32 and then to x's type, in which sqrt(3072) may be 55.5.
        return x * jnp.asarray(np.float32(math.sqrt(self.config.hidden_size)), x.dtype)


# PyTorch's eager attention is causal whatever this says.
FIXED: dict[str, Any] = {"use_bidirectional_attention": frozenset({None, False})}


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return llama.assemble(config, head, llama.layer_rules(config))
