"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): Gemma with a second norm after each sublayer,
windows that slide in every other layer, and scores and logits capped by a tanh. HF "gemma2".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from fmjax.models import gemma, llama
from fmjax.models.llama import IGNORED, PREFIX, from_tensors, inputs
from fmjax.weights import Rule, norm_rules

__all__ = ["IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class LayeredConfig(llama.DecoderConfig):
    """The fields of config.json that Gemma 2 and 3 share."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    final_logit_softcapping: float | None = None

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.layer_types is not None:
            problems += llama.layer_type_problems(self.layer_types, self)
        elif self.window is None:
            problems.append("layers slide, but there is no sliding_window")
        if self.query_pre_attn_scalar <= 0:
            problems.append(f"query_pre_attn_scalar={self.query_pre_attn_scalar} must be positive")
        return problems

    @property
    def act(self) -> str:
        return self.hidden_activation

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias

    @property
    def window(self) -> int | None:
        return self.sliding_window

    @property
    def period(self) -> int:
        """Every how many layers one sees everything."""
        raise NotImplementedError

    @property
    def sliding(self) -> tuple[bool, ...]:
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return tuple((i + 1) % self.period > 0 for i in range(self.num_hidden_layers))


@dataclasses.dataclass(frozen=True)
class Config(LayeredConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 256000
    max_position_embeddings: int = 8192
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    @property
    def period(self) -> int:
        return 2


MODEL_TYPE = "gemma2"
HEADS = {
    "model": "Gemma2Model",
    "causal_lm": "Gemma2ForCausalLM",
    "sequence_classification": "Gemma2ForSequenceClassification",
    "token_classification": "Gemma2ForTokenClassification",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, attention_bias=True, query_pre_attn_scalar=12, sliding_window=3,
        attn_logit_softcapping=0.5, final_logit_softcapping=0.3,
    ),
    # Gemma Team 2024, arXiv:2408.00118, table 1.
    "2b": Config(),
    "9b": Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "27b": Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    ),
}  # fmt: skip


class Block(gemma.Block):
    """Norm, attention, norm, residual; norm, feed-forward, norm, residual."""

    def attention_fields(self) -> dict[str, Any]:
        config = self.config
        return super().attention_fields() | {
            "scale": config.query_pre_attn_scalar**-0.5,
            "softcap": config.attn_logit_softcapping,
        }

    def after(self, update: Array, name: str) -> Array:
        return self.norm(f"{name}_post")(update)


class Model(gemma.Model):
    """Gemma 2 with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block

    def scale_logits(self, logits: Array) -> Array:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


# Files name the activation and the window twice; PyTorch reads hidden_activation and
# sliding_window.
FIXED: dict[str, Any] = gemma.FIXED | {
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window_size": 4096,
}


def layer_rules(config: LayeredConfig) -> list[Rule]:
    """All of one layer's, named from the base model on."""
    norms = {
        "norm_1": "input_layernorm",
        "norm_1_post": "post_attention_layernorm",
        "norm_2": "pre_feedforward_layernorm",
        "norm_2_post": "post_feedforward_layernorm",
    }
    table = [*llama.attention_rules(config), *llama.feed_forward_rules(config)]
    for name, tensor in norms.items():
        table += norm_rules(f"layers_{{i}}/{name}", f"layers.{{i}}.{tensor}", bias=False)
    return table


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return llama.assemble(config, head, layer_rules(config))
