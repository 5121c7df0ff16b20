"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama whose queries see a sliding window of keys.
HF "mistral".
"""

from __future__ import annotations

import dataclasses

from fmjax.models import llama
from fmjax.models.llama import FIXED, IGNORED, PREFIX, from_tensors, inputs
from fmjax.weights import Rule

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    hidden_act: str = "silu"
    sliding_window: int | None = 4096

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def window(self) -> int | None:
        return self.sliding_window


MODEL_TYPE = "mistral"
HEADS = {
    "model": "MistralModel",
    "causal_lm": "MistralForCausalLM",
    "sequence_classification": "MistralForSequenceClassification",
    "token_classification": "MistralForTokenClassification",
    "question_answering": "MistralForQuestionAnswering",
}


def _released(
    layers: int, width: int, inner: int, heads: int, vocabulary: int, theta: float, positions: int
) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, head_dim=128, vocab_size=vocabulary, rope_theta=theta,
        max_position_embeddings=positions, rms_norm_eps=1e-5, sliding_window=None,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, sliding_window=3, pad_token_id=2,
    ),
    # Jiang et al. 2023, table 1; the others from config.json of the released weights.
    "7b-v0.1": dataclasses.replace(
        _released(32, 4096, 14336, 32, 32000, 10000.0, 32768), sliding_window=4096
    ),
    "7b-v0.3": _released(32, 4096, 14336, 32, 32768, 1e6, 32768),
    "nemo-12b": _released(40, 5120, 14336, 32, 131072, 1e6, 131072),
    "small-22b": _released(56, 6144, 16384, 48, 32768, 1e6, 32768),
    "small-24b": _released(40, 5120, 32768, 32, 131072, 1e8, 32768),
    "large-123b": _released(88, 12288, 28672, 96, 32768, 1e6, 131072),
}  # fmt: skip


class Model(llama.Model):
    """Mistral with one head; see `fmjax.nn.decoder.Decoder`."""


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return llama.assemble(config, head, llama.layer_rules(config))
