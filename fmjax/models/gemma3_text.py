"""Gemma 3's language model (Gemma Team 2025, arXiv:2503.19786): Gemma 2 with norms of queries and
keys in place of the scores' cap, five sliding layers to a full one, and another base of the rotary
positions for each kind. HF "gemma3_text"; EmbeddingGemma (arXiv:2509.20354) sees both directions.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from fmjax.models import gemma, gemma2, llama, qwen3
from fmjax.models.llama import IGNORED, PREFIX, from_tensors, inputs
from fmjax.nn.decoder import Inputs
from fmjax.nn.mask import Mask, make_attention_mask
from fmjax.nn.position import RopeScaling, Rotary, scaled_rotary
from fmjax.types import PyTree
from fmjax.weights import Rule

__all__ = ["IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(gemma2.LayeredConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0
    sliding_window_pattern: int = dataclasses.field(  # read where there are no layer_types
        default=6, metadata={"also": ("_sliding_window_pattern",)}
    )
    use_bidirectional_attention: bool | None = False

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.rope_local_base_freq <= 1:
            problems.append(f"rope_local_base_freq={self.rope_local_base_freq} must be above 1")
        if self.sliding_window_pattern < 1:
            problems.append(
                f"sliding_window_pattern={self.sliding_window_pattern} must be at least 1"
            )
        return problems

    @property
    def window(self) -> int | None:
        """Seen from both sides, a window reaches half as far."""
        window = self.sliding_window
        return (
            window // 2 + 1 if window is not None and self.use_bidirectional_attention else window
        )

    @property
    def period(self) -> int:
        return self.sliding_window_pattern


MODEL_TYPE = "gemma3_text"
HEADS = {
    "model": "Gemma3TextModel",
    "causal_lm": "Gemma3ForCausalLM",
    "sequence_classification": "Gemma3TextForSequenceClassification",
}


def _released(
    layers: int, width: int, inner: int, heads: int, groups: int, *,
    vocabulary: int = 262144, window: int = 512, positions: int = 32768,
) -> Config:  # fmt: skip
    return Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocabulary,
        sliding_window=window, max_position_embeddings=positions,
    )  # fmt: skip


def _long(layers: int, width: int, inner: int, heads: int, groups: int) -> Config:
    """The language models of the sizes that also see."""
    return dataclasses.replace(
        _released(
            layers, width, inner, heads, groups,
            vocabulary=262208, window=1024, positions=131072,
        ),
        rope_scaling=RopeScaling("linear", factor=8.0),
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, attention_bias=True, query_pre_attn_scalar=12, sliding_window=3,
        sliding_window_pattern=2, rope_scaling=RopeScaling("linear", factor=8.0),
        final_logit_softcapping=0.3,
    ),
    # Gemma Team 2025, table 1; config.json of the released weights.
    "270m": _released(18, 640, 2048, 4, 1),
    "1b": _released(26, 1152, 6912, 4, 1),
    "4b": _long(34, 2560, 10240, 8, 4),
    "12b": _long(48, 3840, 15360, 16, 8),
    "27b": dataclasses.replace(
        _long(62, 5376, 21504, 32, 16), head_dim=128, query_pre_attn_scalar=168
    ),
    # Schechter Vera et al. 2025, arXiv:2509.20354.
    "embedding-300m": dataclasses.replace(
        _released(24, 768, 1152, 3, 1, positions=2048), use_bidirectional_attention=True
    ),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads: as in `fmjax.models.llama.Shared`, and tables for sliding layers."""

    mask: Mask | None
    local_mask: Mask | None
    rotary: Rotary
    start: Array | int
    local_rotary: Rotary


class Block(gemma.Block):
    """Gemma 2's, with a norm over each head of queries and keys."""

    after = gemma2.Block.after

    def attention_fields(self) -> dict[str, Any]:
        config = self.config
        return super().attention_fields() | {
            "scale": config.query_pre_attn_scalar**-0.5,
            "head_norm": partial(gemma.Norm, config.rms_norm_eps),
        }

    def rotary(self, index: Array | int, shared: Shared) -> Rotary:
        return llama.of_layer(self.config.sliding, index, shared.rotary, shared.local_rotary)


class Model(gemma2.Model):
    """Gemma 3 with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block

    def check(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        position_ids: Array | None,
        inputs_embeds: Array | None,
        cache: PyTree,
        train: bool,
    ) -> Inputs:
        if self.config.use_bidirectional_attention and cache is not None:
            raise ValueError(
                "use_bidirectional_attention: every token sees those after it, so that nothing is "
                "decoded step by step; drop the cache"
            )
        return super().check(input_ids, attention_mask, position_ids, inputs_embeds, cache, train)

    def shared(self, inputs: Inputs, hidden: Array) -> PyTree:
        config = self.config
        common = super().shared(inputs, hidden)
        if config.use_bidirectional_attention:
            keep = inputs.attention_mask
            full, local = (
                make_attention_mask(
                    jnp.ones((1, inputs.length)) if keep is None else keep,
                    query_length=inputs.length,
                    key_length=inputs.capacity,
                    causal=False,
                    window=window,
                )
                for window in (None, config.window)
            )
            common = common._replace(mask=full, local_mask=local)
        local_rotary = scaled_rotary(
            inputs.position_ids,
            config.rotary_size,
            config.rope_local_base_freq,
            max_positions=config.max_position_embeddings,
        )
        return Shared(common.mask, common.local_mask, common.rotary, common.start, local_rotary)


# PyTorch has the key attn_logit_softcapping and does not read it.
FIXED: dict[str, Any] = {"attn_logit_softcapping": None, "hidden_act": "gelu_pytorch_tanh"}


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    layer = [*gemma2.layer_rules(config), *qwen3.head_norm_rules()]
    return llama.assemble(config, head, layer)
