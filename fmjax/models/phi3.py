"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): Llama with fused projections in its files, dropout
of the residual updates, and positions stretched by longrope. HF "phi3"; Phi-4 is the same function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from fmjax.models import llama
from fmjax.models.llama import IGNORED, PREFIX, from_tensors, inputs
from fmjax.nn.dropout import Dropout
from fmjax.nn.position import RopeScaling
from fmjax.weights import Rule, dense_rules, fused, joined_rules

__all__ = ["IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 32000
    hidden_act: str = "silu"
    partial_rotary_factor: float = 1.0
    resid_pdrop: float = 0.0
    sliding_window: int | None = None

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 <= self.resid_pdrop < 1:
            problems.append(f"resid_pdrop={self.resid_pdrop} must be at least 0 and below 1")
        if not 0 < self.partial_rotary_factor <= 1:
            problems.append(f"partial_rotary_factor={self.partial_rotary_factor} must be in (0, 1]")
        if self.original_max_position_embeddings < 1:
            problems.append(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be "
                "at least 1"
            )
        kind = None if self.rope_scaling is None else self.rope_scaling.rope_type
        if kind not in (None, "default", "longrope"):
            problems.append(f"rope_scaling has the rope_type {kind!r}; Phi-3 has 'longrope' alone")
        return problems

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def scaling(self) -> RopeScaling | None:
        """The original context stands outside `rope_scaling`, and counts."""
        if self.rope_scaling is None or self.rope_scaling.rope_type == "default":
            return None
        return dataclasses.replace(
            self.rope_scaling,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )

    @property
    def window(self) -> int | None:
        return self.sliding_window


MODEL_TYPE = "phi3"
HEADS = {
    "model": "Phi3Model",
    "causal_lm": "Phi3ForCausalLM",
    "sequence_classification": "Phi3ForSequenceClassification",
    "token_classification": "Phi3ForTokenClassification",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=48, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64,
        original_max_position_embeddings=32, partial_rotary_factor=0.5,
        rope_scaling=RopeScaling("longrope", short_factor=(1.0, 1.5), long_factor=(2.0, 4.0)),
        attention_dropout=0.1, resid_pdrop=0.1, sliding_window=3, pad_token_id=2,
    ),
    # Abdin et al. 2024, section 2; config.json of the released weights with the short context.
    "mini": Config(sliding_window=2047),
    "medium": Config(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, sliding_window=2047,
    ),
    # Abdin et al. 2024, arXiv:2412.08905.
    "4-14b": Config(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, vocab_size=100352, pad_token_id=100349, rope_theta=250000.0,
        max_position_embeddings=16384, original_max_position_embeddings=16384,
    ),
}  # fmt: skip


class Block(llama.Block):
    """Llama's, with dropout of what is added."""

    def after(self, update: Array, name: str) -> Array:
        return Dropout(self.config.resid_pdrop)(update, self.train)


class Model(llama.Model):
    """Phi-3 with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block


# Files say these; PyTorch reads none of them.
FIXED: dict[str, Any] = {
    "embd_pdrop": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    sizes = [
        heads * config.head_size for heads in (config.num_attention_heads, *[config.groups] * 2)
    ]
    here, layer = "layers_{i}", "layers.{i}"
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    table = [
        *joined_rules(
            f"{here}/attn", ("query", "key", "value"), f"{attn}.qkv_proj", fused(sizes), bias=False
        ),
        *dense_rules(f"{here}/attn/out", f"{attn}.o_proj", bias=False),
        *joined_rules(f"{here}/mlp", ("gate", "up"), f"{mlp}.gate_up_proj", fused(2), bias=False),
        *dense_rules(f"{here}/mlp/down", f"{mlp}.down_proj", bias=False),
        *llama.pre_norm_rules(),
    ]
    return llama.assemble(config, head, table)
