"""The decoder of TrOCR (Li et al. 2021, arXiv:2109.10282), which reads lines of text in pictures:
BART's, alone, over the states of an image encoder of another width. HF "trocr".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bart
from fmjax.nn.checks import refuse
from fmjax.nn.decoder import config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import sinusoids_of
from fmjax.nn.sides import Shared, Tokens
from fmjax.types import Output, PyTree
from fmjax.weights import TRANSPOSE, Rule


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50265
    d_model: int = dataclasses.field(default=1024, metadata={"also": ("hidden_size",)})
    decoder_layers: int = dataclasses.field(default=12, metadata={"also": ("num_hidden_layers",)})
    decoder_attention_heads: int = dataclasses.field(
        default=16, metadata={"also": ("num_attention_heads",)}
    )
    decoder_ffn_dim: int = 4096
    activation_function: str = "gelu"
    max_position_embeddings: int = 512  # of sinusoids no limit
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    decoder_layerdrop: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    use_learned_position_embeddings: bool = True
    layernorm_embedding: bool = True
    cross_attention_hidden_size: int | None = None  # of the encoder's states; None is d_model
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="d_model", heads="decoder_attention_heads", act="activation_function"
        )
        if not self.use_learned_position_embeddings:
            if self.d_model < 4:
                problems.append(f"d_model={self.d_model} must be at least 4 for two sinusoids")
            if self.pad_token_id is None:
                problems.append("sinusoids are counted from pad_token_id, which is None")
        refuse(self, problems)


MODEL_TYPE = "trocr"
# Files name one class, which is read as the last head that it is.
HEADS = {"model": "TrOCRForCausalLM", "causal_lm": "TrOCRForCausalLM"}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, decoder_layers=2, decoder_ffn_dim=28,
        decoder_attention_heads=3, scale_embedding=True, cross_attention_hidden_size=16,
    ),
    # Microsoft's: behind DeiT small, BEiT base and BEiT large, of 384, 768 and 1,024 features. The
    # first stage of training and what was made of it for print have sinusoids.
    "small": Config(
        vocab_size=64044, d_model=256, decoder_layers=6, decoder_attention_heads=8,
        decoder_ffn_dim=1024, activation_function="relu", scale_embedding=True,
        cross_attention_hidden_size=384,
    ),
    "base": Config(cross_attention_hidden_size=768),
    "large": Config(cross_attention_hidden_size=1024),
    "large-printed": Config(
        activation_function="relu", max_position_embeddings=1024, scale_embedding=True,
        use_learned_position_embeddings=False, layernorm_embedding=False,
        cross_attention_hidden_size=1024, tie_word_embeddings=False,
    ),
}  # fmt: skip


class Embeddings(nn.Module):
    """Word vectors, positions, a norm where the config has one; dropout.

    Called with the positions as rows of the table, or of the sinusoids, of which row
    `pad_token_id` is zero.
    """

    config: Config

    def setup(self) -> None:
        config = self.config
        if config.use_learned_position_embeddings:
            rows = config.max_position_embeddings + bart.Embeddings.offset
            self.position = Embed(rows, config.d_model, nn.initializers.normal(config.init_std))
        if config.layernorm_embedding:
            self.norm = LayerNorm(bart.EPSILON)
        self.dropout = Dropout(config.dropout)

    def __call__(self, words: Array, rows: Array, train: bool) -> Array:  # [B, T, D]
        config = self.config
        if config.use_learned_position_embeddings:
            places = self.position(rows)
        else:
            there = (rows != config.pad_token_id)[..., None]
            places = jnp.where(there, sinusoids_of(rows, config.d_model), 0.0).astype(words.dtype)
        x = words + places
        return self.dropout(self.norm(x) if config.layernorm_embedding else x, train)


class Model(bart.Model):
    """TrOCR's decoder with one head; see `fmjax.nn.seq2seq.WithDecoderAlone`, of whose arguments
    it takes those of the head "causal_lm".
    """

    decoder_embeddings = Embeddings
    vocabulary_heads = ("model", "causal_lm")

    @property
    def alone(self) -> bool:
        return True

    @property
    def max_positions(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        config = self.config
        return config.max_position_embeddings if config.use_learned_position_embeddings else None

    @property
    def shared_words(self) -> bool:
        return True  # there is one side

    def run_decoder(
        self, side: Tokens, encoder: Array | None, encoder_mask: Array | None, cache: PyTree
    ) -> Output:
        shared = Shared(side.mask, side.start, encoder, encoder_mask)
        out = self.decoder(self.decoder_words(side), self.rows(side), side, shared, cache)
        if self.is_initializing():
            # The bare model has the output matrix too, as PyTorch's one class.
            self.unembed(out.last_hidden_state)  # pyright: ignore[reportArgumentType]
        return out

    def rows(self, side: Tokens) -> Array:
        """int [B | 1, T]: where each token's position is looked up.

        Of sinusoids padding has the row `pad_token_id`, and what follows it does not count it.
        """
        pad = self.config.pad_token_id
        if self.config.use_learned_position_embeddings:
            return side.positions() + bart.Embeddings.offset
        if side.ids is None or side.position_ids is not None:
            return side.positions() + pad + 1
        there = (side.ids != pad).astype(jnp.int32)
        return (jnp.cumsum(there, axis=1) + side.start) * there + pad


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    width = config.cross_attention_hidden_size or config.d_model
    states = jnp.zeros((1, 1, width))
    return {"input_ids": jnp.zeros((1, 1), jnp.int32), "encoder_hidden_states": states}


PREFIX = "model."
FIXED: dict[str, Any] = dict.fromkeys(
    """
    add_cross_attention add_final_layer_norm classifier_dropout encoder_attention_heads
    encoder_ffn_dim encoder_layerdrop encoder_layers is_decoder is_encoder_decoder
    normalize_before problem_type
    """.split(),
    ...,
)
# Sinusoids that files of transformers 4 hold.
IGNORED = (*bart.IGNORED, r"(^|\.)embed_positions\.(weights|_float_tensor)$")
from_tensors = bart.from_tensors


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    tied = ("output_projection.weight",) if config.tie_word_embeddings else ()
    word = "model.decoder.embed_tokens.weight"
    table = [Rule("params/embed/word/embedding", word, aliases=tied)]
    table += bart.stack_rules(
        "decoder",
        "model.decoder",
        positions=config.use_learned_position_embeddings,
        embedding_norm=config.layernorm_embedding,
        final_norm=False,
    )
    if not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "output_projection.weight", TRANSPOSE))
    return table
