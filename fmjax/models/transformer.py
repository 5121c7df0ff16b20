"""The Transformer as published (Vaswani et al. 2017, arXiv:1706.03762): post-norm encoder-decoder
with sinusoidal positions and one matrix for both tables of words and for the output.

Hugging Face has no such class: ``model_type`` "transformer" is ours. Tensors are named as those of
torch.nn.Transformer, which computes the same without its last norms (it has ReLU and post-norm by
default).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bart
from fmjax.nn.dropout import Dropout
from fmjax.nn.position import sinusoids
from fmjax.weights import TRANSPOSE, Rule, dense_rules, fused, joined_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class Config(bart.PairConfig):
    """Sizes and constants; the defaults are the base model's (table 3).

    ``init_std`` is not used: kernels start uniform (Glorot & Bengio 2010) and words with deviation
    ``d_model**-0.5``, so that scaled by ``d_model**0.5`` (section 3.4) they have 1.
    """

    vocab_size: int = 37000
    d_model: int = 512
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    activation_function: str = "relu"
    scale_embedding: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 1


MODEL_TYPE = "transformer"
HEADS = {"model": "TransformerModel", "seq2seq_lm": "TransformerForConditionalGeneration"}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
    ),
    # Vaswani et al. 2017, table 3; dropout of the big model as for English-German.
    "base": Config(),
    "big": Config(
        d_model=1024, encoder_ffn_dim=4096, decoder_ffn_dim=4096, encoder_attention_heads=16,
        decoder_attention_heads=16, dropout=0.3,
    ),
}  # fmt: skip


class Block(bart.Block):
    """BART's post-norm layers from other initial weights."""

    def kernel_init(self) -> Callable[..., Array]:
        return nn.initializers.xavier_uniform()


class Embeddings(nn.Module):
    """Sinusoids of positions (section 3.5), added to word vectors; dropout (section 5.4)."""

    config: Any

    @nn.compact
    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        config = self.config
        table = sinusoids(config.max_position_embeddings, config.d_model, interleaved=True)
        words = words + jnp.asarray(table, words.dtype)[positions]
        return Dropout(config.dropout)(words, train)


class Model(bart.Model):
    """The Transformer with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    block = Block
    embeddings = Embeddings
    has_logits_bias = False

    @property
    def word_init(self) -> Callable[..., Array]:
        return nn.initializers.normal(self.config.d_model**-0.5)

    @property
    def head_init(self) -> Callable[..., Array]:
        return nn.initializers.xavier_uniform()

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None


inputs = bart.inputs
from_tensors = bart.from_tensors
PREFIX = ""
FIXED = {}
IGNORED = ()


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and tensors named as torch.nn.Transformer's; the tables of words are beside it."""
    if config.tie_word_embeddings:
        table = [Rule("params/embed/word/embedding", "embedding.weight")]
    else:
        table = [
            Rule(f"params/{side}_embed/word/embedding", f"{side}_embedding.weight")
            for side in ("encoder", "decoder")
        ]
        if head == "seq2seq_lm":
            table.append(Rule("params/head/kernel", "generator.weight", TRANSPOSE))
    for side in ("encoder", "decoder"):
        here, layer = f"{side}/layers_{{i}}", f"{side}.layers.{{i}}"
        sublayers = [("attn", "self_attn", "norm_1")]
        if side == "decoder":
            sublayers.append(("cross_attn", "multihead_attn", "norm_cross"))
        for number, (name, theirs, norm) in enumerate(sublayers):
            kernels = ("query", "key", "value")
            # One parameter without a module: "in_proj_weight", not "in_proj.weight".
            joined = joined_rules(f"{here}/{name}", kernels, f"{layer}.{theirs}.in_proj", fused(3))
            table += [
                dataclasses.replace(rule, tensor=rule.tensors[0].replace("in_proj.", "in_proj_"))
                for rule in joined
            ]
            table += dense_rules(f"{here}/{name}/out", f"{layer}.{theirs}.out_proj")
            table += norm_rules(f"{here}/{norm}", f"{layer}.norm{number + 1}")
        table += dense_rules(f"{here}/mlp/up", f"{layer}.linear1")
        table += dense_rules(f"{here}/mlp/down", f"{layer}.linear2")
        table += norm_rules(f"{here}/norm_2", f"{layer}.norm{len(sublayers) + 1}")
    return table
