"""PEGASUS (Zhang et al. 2020, arXiv:1912.08777): mBART's layers with sinusoidal positions and no
norm of embeddings. HF "pegasus".
"""

from __future__ import annotations

import dataclasses

from jax import Array

from fmjax.models import bart, marian, mbart
from fmjax.nn.sides import Tokens
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(bart.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = 0


MODEL_TYPE = "pegasus"
HEADS = {
    "model": "PegasusModel",
    "seq2seq_lm": "PegasusForConditionalGeneration",
    "causal_lm": "PegasusForCausalLM",
}


def _sized(layers: int, width: int, inner: int, heads: int) -> Config:
    return Config(
        vocab_size=96103, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_ffn_dim=inner, decoder_ffn_dim=inner, encoder_attention_heads=heads,
        decoder_attention_heads=heads, activation_function="relu", scale_embedding=True,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        scale_embedding=True, activation_function="relu",
    ),
    # Zhang et al. 2020, section 6.
    "base": _sized(12, 768, 3072, 12),
    "large": _sized(16, 1024, 4096, 16),
}  # fmt: skip


class Model(mbart.Model):
    """PEGASUS with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    embeddings = marian.Embeddings

    def decoder_words(self, side: Tokens) -> Array:
        return marian.scaled_words(self, side)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = "model."
FIXED = marian.FIXED
IGNORED = bart.IGNORED


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = bart.all_rules(config, head, positions=False, embedding_norm=False, final_norm=True)
    return table + marian.position_rules(config, head, "" if head == "model" else PREFIX)
