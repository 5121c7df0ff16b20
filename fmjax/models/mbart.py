"""mBART (Liu et al. 2020, arXiv:2001.08210) and mBART-50: BART with norms before the layers and one
more after the last. HF "mbart"; parent of pegasus and blenderbot, which have the same layers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from fmjax.models import bart
from fmjax.nn.norm import LayerNorm
from fmjax.nn.sides import shift_right
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(bart.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    decoder_start_token_id: int | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")


MODEL_TYPE = "mbart"
HEADS = {
    "model": "MBartModel",
    "seq2seq_lm": "MBartForConditionalGeneration",
    "sequence_classification": "MBartForSequenceClassification",
    "question_answering": "MBartForQuestionAnswering",
    "causal_lm": "MBartForCausalLM",
}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        scale_embedding=True,
    ),
    # Liu et al. 2020, section 2.2 (25 languages); Tang et al. 2020, arXiv:2008.00401 (50).
    "large": Config(vocab_size=250027, scale_embedding=True),
    "large-50": Config(vocab_size=250054, scale_embedding=True, activation_function="relu"),
}  # fmt: skip


class Block(bart.Block):
    """BART's layers with the norm before each (pre-norm)."""

    def enter(self, name: str, hidden: Array) -> Array:
        return LayerNorm(bart.EPSILON, name=name)(hidden)

    def leave(self, name: str, hidden: Array, update: Array) -> Array:
        return hidden + self.drop(update)


class Model(bart.Model):
    """mBART with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    block = Block
    final_norm = True

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        """The encoder's tokens behind their last one, which is the language's."""
        real = input_ids != self.config.pad_token_id
        last = jnp.maximum(real.sum(axis=-1, keepdims=True) - 1, 0)  # [B, 1]
        start = jnp.take_along_axis(input_ids, last, axis=-1)
        return shift_right(input_ids, 0).at[:, :1].set(start)


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = "model."
FIXED = bart.FIXED
IGNORED = bart.IGNORED


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return bart.all_rules(config, head, final_norm=True)
