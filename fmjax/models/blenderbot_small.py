"""The 90 M BlenderBot (Roller et al. 2020, arXiv:2004.13637): BART with positions counted from the
first row of their table, which the decoder adds behind the norm. HF "blenderbot-small".
"""

from __future__ import annotations

import dataclasses

from jax import Array

from fmjax.models import bart, marian
from fmjax.nn.sides import Tokens
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(bart.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    max_position_embeddings: int = 512
    d_model: int = dataclasses.field(default=512, metadata={"also": ("hidden_size",)})
    encoder_layers: int = dataclasses.field(default=8, metadata={"also": ("num_hidden_layers",)})
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 8
    decoder_ffn_dim: int = 2048
    pad_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 1


MODEL_TYPE = "blenderbot-small"
HEADS = {
    "model": "BlenderbotSmallModel",
    "seq2seq_lm": "BlenderbotSmallForConditionalGeneration",
    "causal_lm": "BlenderbotSmallForCausalLM",
}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        scale_embedding=True,
    ),
    # Roller et al. 2020, table 2.
    "90m": Config(vocab_size=54944, scale_embedding=True),
}  # fmt: skip


class Embeddings(bart.Embeddings):
    """BART's, without unused rows of positions."""

    offset = 0


class DecoderEmbeddings(Embeddings):
    """Word vectors, normed; learned positions are added to that; dropout."""

    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        return self.dropout(self.norm(words) + self.position(positions), train)


class Model(bart.Model):
    """The small BlenderBot with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    embeddings = Embeddings
    decoder_embeddings = DecoderEmbeddings

    def decoder_words(self, side: Tokens) -> Array:
        """[B, T, D]: not scaled, unlike the encoder's, which the norm that follows hardly shows."""
        if side.ids is None:
            return super().decoder_words(side)
        return self.word(side.ids)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = "model."
FIXED = marian.FIXED
IGNORED = bart.IGNORED


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return bart.all_rules(config, head)
