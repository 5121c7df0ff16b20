"""Marian's translation models (Junczys-Dowmunt et al. 2018, arXiv:1804.00344), such as OPUS-MT:
BART's layers with sinusoidal positions and no norm of embeddings. HF "marian".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bart
from fmjax.nn.dropout import Dropout
from fmjax.nn.position import sinusoids
from fmjax.nn.sides import Tokens
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(bart.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None  # None is as `vocab_size`
    share_encoder_decoder_embeddings: bool = True
    pad_token_id: int | None = 58100
    eos_token_id: int | None = 0
    decoder_start_token_id: int | None = 58100

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.vocab_size, self.decoder_vocab_size or self.vocab_size)
        if self.share_encoder_decoder_embeddings and len(set(sizes)) == 2:
            raise ValueError(
                f"marian config: decoder_vocab_size={sizes[1]} must be vocab_size={sizes[0]} where "
                "share_encoder_decoder_embeddings is true"
            )


MODEL_TYPE = "marian"
HEADS = {"model": "MarianModel", "seq2seq_lm": "MarianMTModel", "causal_lm": "MarianForCausalLM"}


def _sized(layers: int, width: int, heads: int) -> Config:
    """OPUS-MT's models; vocabularies vary by pair of languages, this one is English-German's."""
    return Config(
        max_position_embeddings=512, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, encoder_attention_heads=heads,
        decoder_attention_heads=heads, activation_function="swish", scale_embedding=True,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        activation_function="swish", pad_token_id=98, decoder_start_token_id=98,
        scale_embedding=True,
    ),
    # Tiedemann & Thottingal 2020, "OPUS-MT": 6 layers, 8 heads; the "big" models of Tatoeba-MT.
    "base": _sized(6, 512, 8),
    "big": _sized(6, 1024, 16),
}  # fmt: skip


class Embeddings(nn.Module):
    """Sinusoids of positions, added to word vectors; dropout."""

    config: Any

    def setup(self) -> None:
        config = self.config
        shape = (config.max_position_embeddings, config.d_model)
        # A constant, which some files hold.
        self.sinusoids = self.variable(
            "buffers", "sinusoids", lambda: jnp.asarray(sinusoids(*shape, interleaved=False))
        )
        self.dropout = Dropout(config.dropout)

    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        table = jax.lax.stop_gradient(self.sinusoids.value).astype(words.dtype)
        return self.dropout(words + table[positions], train)


class Model(bart.Model):
    """Marian with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    embeddings = Embeddings

    @property
    def shared_words(self) -> bool:
        return shares_words(self.config)

    @property
    def decoder_vocab_size(self) -> int:
        return self.config.decoder_vocab_size or self.config.vocab_size

    def decoder_words(self, side: Tokens) -> Array:
        return scaled_words(self, side)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None


def shares_words(config: Config) -> bool:
    """Whether both sides have one table of words."""
    return config.tie_word_embeddings and config.share_encoder_decoder_embeddings


def scaled_words(model: Any, side: Tokens) -> Array:
    """[B, T, D]: the decoder's word vectors; vectors given in their place are scaled too."""
    words = bart.Model.decoder_words(model, side)
    if side.embeds is None or not model.config.scale_embedding:
        return words
    return words * jnp.asarray(model.config.d_model**0.5, words.dtype)


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = "model."
FIXED = {**bart.FIXED, "classifier_dropout": ..., "problem_type": ...}
IGNORED = bart.IGNORED


def position_rules(config: Any, head: str, body: str) -> list[Rule]:
    """The tables of sinusoids, which Marian's files leave out and Pegasus' hold."""
    shape = (config.max_position_embeddings, config.d_model)
    return [
        Rule(
            f"buffers/{side}/embed/sinusoids",
            f"{body}{side}.embed_positions.weight",
            default=partial(sinusoids, *shape, interleaved=False),
        )
        for side in bart.sides(head)
    ]


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = bart.word_rules(
        config, head, body, shared=shares_words(config),
        third=config.share_encoder_decoder_embeddings,
    )  # fmt: skip
    table += position_rules(config, head, body)
    for side in bart.sides(head):
        table += bart.stack_rules(
            side, f"{body}{side}", positions=False, embedding_norm=False, final_norm=False
        )
    size = config.decoder_vocab_size or config.vocab_size
    return table + bart.head_rules(config, head, size)
