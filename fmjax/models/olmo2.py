"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): Llama whose norms follow the sublayers, and whose
queries and keys are normed over their whole width. HF "olmo2".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from jax import Array

from fmjax.models import llama, qwen3
from fmjax.models.llama import FIXED, IGNORED, PREFIX, from_tensors, inputs
from fmjax.nn.norm import RMSNorm
from fmjax.weights import Rule, norm_rules

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    hidden_act: str = "silu"
    attention_bias: bool = False

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias


MODEL_TYPE = "olmo2"
HEADS = {
    "model": "Olmo2Model",
    "causal_lm": "Olmo2ForCausalLM",
    "sequence_classification": "Olmo2ForSequenceClassification",
}


def _released(layers: int, width: int, inner: int, heads: int, groups: int | None = None) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=100352,
        pad_token_id=100277, rope_theta=500000.0, max_position_embeddings=4096, rms_norm_eps=1e-6,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, attention_bias=True,
    ),
    # OLMo Team 2024, table 1 (7 B, 13 B, 32 B); config.json of the released weights.
    "1b": _released(16, 2048, 8192, 16),
    "7b": _released(32, 4096, 11008, 32),
    "13b": _released(40, 5120, 13824, 40),
    "32b": _released(64, 5120, 27648, 40, 8),
}  # fmt: skip


class Block(llama.Block):
    """Attention, norm, residual; feed-forward, norm, residual."""

    def attention_fields(self) -> dict[str, Any]:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        return super().attention_fields() | {"width_norm": norm}

    def before(self, hidden: Array, name: str) -> Array:
        return hidden

    def after(self, update: Array, name: str) -> Array:
        return self.norm(name)(update)


class Model(llama.Model):
    """OLMo 2 with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    layer = [
        *llama.attention_rules(config),
        *qwen3.head_norm_rules(),
        *llama.feed_forward_rules(config),
        *norm_rules("layers_{i}/norm_1", "layers.{i}.post_attention_layernorm", bias=False),
        *norm_rules("layers_{i}/norm_2", "layers.{i}.post_feedforward_layernorm", bias=False),
    ]
    return llama.assemble(config, head, layer)
