"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671 and 2412.15115): Llama with biases of
query, key and value, and windows that slide in the upper layers if asked for. HF "qwen2".
"""

from __future__ import annotations

import dataclasses

from fmjax.models import llama
from fmjax.models.llama import IGNORED, PREFIX, from_tensors, inputs
from fmjax.weights import Rule

__all__ = ["IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class LayeredConfig(llama.DecoderConfig):
    """The fields of config.json that Qwen2 and Qwen3 share."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def problems(self) -> list[str]:
        types = self.layer_types
        return super().problems() + (
            [] if types is None else llama.layer_type_problems(types, self)
        )

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    @property
    def sliding(self) -> tuple[bool, ...]:
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return tuple(
            self.window is not None and i >= self.max_window_layers
            for i in range(self.num_hidden_layers)
        )


@dataclasses.dataclass(frozen=True)
class Config(LayeredConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    @property
    def qkv_bias(self) -> bool:
        return True


MODEL_TYPE = "qwen2"
HEADS = {
    "model": "Qwen2Model",
    "causal_lm": "Qwen2ForCausalLM",
    "sequence_classification": "Qwen2ForSequenceClassification",
    "token_classification": "Qwen2ForTokenClassification",
    "question_answering": "Qwen2ForQuestionAnswering",
}


def _released(
    layers: int, width: int, inner: int, heads: int, groups: int, *, tied: bool, eps: float = 1e-6
) -> Config:
    """The tied ones, up to 3 B, have no rows in the table for divisibility."""
    return Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
        vocab_size=151936 if tied else 152064, rms_norm_eps=eps, rope_theta=1e6,
        max_position_embeddings=131072, sliding_window=None,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64,
        attention_dropout=0.1, use_sliding_window=True, sliding_window=3, max_window_layers=1,
        tie_word_embeddings=True, pad_token_id=2,
    ),
    # Yang et al. 2024, arXiv:2407.10671, table 1; 2412.15115, table 1; config.json of the weights.
    # The sizes of version 2 that 2.5 has too are one function.
    "0.5b": _released(24, 896, 4864, 14, 2, tied=True),
    "1.5b": _released(28, 1536, 8960, 12, 2, tied=True),
    "7b": _released(28, 3584, 18944, 28, 4, tied=False),
    "72b": _released(80, 8192, 29568, 64, 8, tied=False, eps=1e-5),
    "2.5-3b": _released(36, 2048, 11008, 16, 2, tied=True),
    "2.5-14b": _released(48, 5120, 13824, 40, 8, tied=False, eps=1e-5),
    "2.5-32b": _released(64, 5120, 27648, 40, 8, tied=False, eps=1e-5),
}  # fmt: skip

FIXED = {"use_mrope": False}


class Model(llama.Model):
    """Qwen2 with one head; see `fmjax.nn.decoder.Decoder`."""


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return llama.assemble(config, head, llama.layer_rules(config), answering="transformer.")
