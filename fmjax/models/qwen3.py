"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Qwen2 without biases by default, whose queries and
keys pass an RMS norm over each head. HF "qwen3", the dense sizes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from fmjax.models import llama
from fmjax.models.llama import FIXED, IGNORED, PREFIX, from_tensors, inputs
from fmjax.models.qwen2 import LayeredConfig
from fmjax.nn.norm import RMSNorm
from fmjax.weights import Rule, norm_rules

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(LayeredConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    head_dim: int | None = 128
    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias


MODEL_TYPE = "qwen3"
HEADS = {
    "model": "Qwen3Model",
    "causal_lm": "Qwen3ForCausalLM",
    "sequence_classification": "Qwen3ForSequenceClassification",
    "token_classification": "Qwen3ForTokenClassification",
    "question_answering": "Qwen3ForQuestionAnswering",
}


def _released(layers: int, width: int, inner: int, heads: int, *, tied: bool) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied,
        rope_theta=1e6, max_position_embeddings=40960, sliding_window=None,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, attention_bias=True, use_sliding_window=True, sliding_window=3,
        max_window_layers=1, pad_token_id=2,
    ),
    # Yang et al. 2025, table 1; config.json of the released weights.
    "0.6b": _released(28, 1024, 3072, 16, tied=True),
    "1.7b": _released(28, 2048, 6144, 16, tied=True),
    "4b": _released(36, 2560, 9728, 32, tied=True),
    "8b": _released(36, 4096, 12288, 32, tied=False),
    "14b": _released(40, 5120, 17408, 40, tied=False),
    "32b": _released(64, 5120, 25600, 64, tied=False),
}  # fmt: skip


class Block(llama.Block):
    """Llama's, with a norm over each head of queries and keys."""

    def attention_fields(self) -> dict[str, Any]:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        return super().attention_fields() | {"head_norm": norm}


class Model(llama.Model):
    """Qwen3 with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block


def head_norm_rules() -> list[Rule]:
    """The norms of one layer's queries and keys, named from the base model on."""
    return [
        rule
        for name, tensor in (("query", "q"), ("key", "k"))
        for rule in norm_rules(
            f"layers_{{i}}/attn/{name}_norm", f"layers.{{i}}.self_attn.{tensor}_norm", bias=False
        )
    ]


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    layer = [*llama.layer_rules(config), *head_norm_rules()]
    return llama.assemble(config, head, layer, answering="transformer.")
