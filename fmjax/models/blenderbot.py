"""BlenderBot (Roller et al. 2020, arXiv:2004.13637), 400 M to 9.4 B: mBART's layers with learned
positions and no norm of embeddings. HF "blenderbot"; the 90 M model is another family,
"blenderbot-small".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from jax import Array

from fmjax.models import bart, marian, mbart
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(bart.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 8008
    max_position_embeddings: int = 128
    d_model: int = dataclasses.field(default=2560, metadata={"also": ("hidden_size",)})
    encoder_layers: int = dataclasses.field(default=2, metadata={"also": ("num_hidden_layers",)})
    encoder_ffn_dim: int = 10240
    encoder_attention_heads: int = dataclasses.field(
        default=32, metadata={"also": ("num_attention_heads",)}
    )
    decoder_layers: int = 24
    decoder_ffn_dim: int = 10240
    decoder_attention_heads: int = 32
    pad_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 1


MODEL_TYPE = "blenderbot"
HEADS = {
    "model": "BlenderbotModel",
    "seq2seq_lm": "BlenderbotForConditionalGeneration",
    "causal_lm": "BlenderbotForCausalLM",
}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        scale_embedding=True,
    ),
    # Roller et al. 2020, table 2 (the 3 B model), and the released distillations of it.
    "400m-distill": Config(
        d_model=1280, encoder_ffn_dim=5120, decoder_ffn_dim=5120, decoder_layers=12,
        scale_embedding=True,
    ),
    "1b-distill": Config(decoder_layers=12, scale_embedding=True),
    "3b": Config(scale_embedding=True),
}  # fmt: skip


class Embeddings(nn.Module):
    """Learned positions, added to word vectors; dropout."""

    config: Any

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.position = Embed(config.max_position_embeddings, config.d_model, init)
        self.dropout = Dropout(config.dropout)

    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        return self.dropout(words + self.position(positions), train)


class Model(mbart.Model):
    """BlenderBot with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    embeddings = Embeddings

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = "model."
FIXED = marian.FIXED
IGNORED = bart.IGNORED


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return bart.all_rules(config, head, embedding_norm=False, final_norm=True)
