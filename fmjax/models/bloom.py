"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100): causal decoder with linear biases for positions
(ALiBi) and a norm after the word vectors. HF "bloom".
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import alibi_slopes
from fmjax.nn.stack import LayerOutput
from fmjax.weights import (
    Rule,
    decoder_head_rules,
    dense_rules,
    fused_per_head,
    joined_rules,
    norm_rules,
)

ACT = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 250880
    hidden_size: int = dataclasses.field(default=64, metadata={"also": ("n_embed",)})
    n_layer: int = dataclasses.field(default=2, metadata={"also": ("num_hidden_layers",)})
    n_head: int = dataclasses.field(default=8, metadata={"also": ("num_attention_heads",)})
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if problems := config_problems(self, width="hidden_size", heads="n_head"):
            raise ValueError("bloom config: " + "; ".join(problems))

    @property
    def num_hidden_layers(self) -> int:
        """L, under the name that other families have for it."""
        return self.n_layer


MODEL_TYPE = "bloom"
HEADS = {
    "model": "BloomModel",
    "causal_lm": "BloomForCausalLM",
    "sequence_classification": "BloomForSequenceClassification",
    "token_classification": "BloomForTokenClassification",
    "question_answering": "BloomForQuestionAnswering",
}


def _sized(layers: int, width: int, heads: int) -> Config:
    return Config(n_layer=layers, hidden_size=width, n_head=heads, pad_token_id=3)


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, n_layer=2, n_head=3, hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
    # Le Scao et al. 2022, table 3.
    "560m": _sized(24, 1024, 16),
    "1b1": _sized(24, 1536, 16),
    "1b7": _sized(24, 2048, 16),
    "3b": _sized(30, 2560, 32),
    "7b1": _sized(30, 4096, 32),
    "176b": _sized(70, 14336, 112),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S].
        start: positions already in the cache.
        bias: of the scores, float32 [B | 1, H, T | 1, S].
    """

    mask: Mask
    start: Array | int
    bias: Array


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        from_normed = config.apply_residual_connection_post_layernorm

        def drop(x: Array) -> Array:
            return Dropout(config.hidden_dropout)(x, self.train)

        normed = LayerNorm(config.layer_norm_epsilon, name="norm_1")(hidden)
        update, probabilities, cache = Attention(
            config.n_head,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            name="attn",
        )(normed, mask=shared.mask, bias=shared.bias, cache=cache, start=shared.start)
        hidden = (normed if from_normed else hidden) + drop(update)
        normed = LayerNorm(config.layer_norm_epsilon, name="norm_2")(hidden)
        update = Mlp(4 * config.hidden_size, ACT, init, name="mlp")(normed)
        hidden = (normed if from_normed else hidden) + drop(update)
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Embeddings(nn.Module):
    """Word vectors, normed."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.word = Embed(config.vocab_size, config.hidden_size, init)
        self.norm = LayerNorm(config.layer_norm_epsilon)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        return self.norm(inputs.embedded(self.word))


def key_positions(inputs: Inputs) -> Array:
    """int32 [B | 1, T | 1, S]: where keys stand among those that are not padding.

    A linear bias of them differs from one of distances by a constant for every query, which
    softmax does not see.
    """
    mask = inputs.attention_mask
    if mask is None:
        return jnp.arange(inputs.capacity)[None, None]  # [1, 1, S]
    mask = mask.astype(jnp.int32)
    mask = mask[:, None] if mask.ndim == 2 else mask  # [B, T | 1, S]
    return (jnp.cumsum(mask, axis=-1) - 1) * mask


class Model(Decoder):
    """BLOOM with one head; see `fmjax.nn.decoder.Decoder`.

    Positions are told by the attention mask alone: ``position_ids`` changes nothing.
    """

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.n_head, self.config.hidden_size // self.config.n_head

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.classifier_dropout
        return self.config.hidden_dropout if rate is None else rate

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(self.config.layer_norm_epsilon)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        slopes = jnp.asarray(alibi_slopes(self.config.n_head))[:, None, None]  # [H, 1, 1]
        return Shared(inputs.mask(), inputs.start, slopes * key_positions(inputs)[:, None])


inputs = token_inputs
from_tensors = config_alone
PREFIX = "transformer."
EITHER = frozenset((False, True))
FIXED = {
    "is_encoder_decoder": False,
    "n_inner": None,
    # How the training code computed the same function.
    "attention_softmax_in_fp32": EITHER,
    "bias_dropout_fusion": EITHER,
    "masked_softmax_fusion": EITHER,
    "offset_alibi": 100,
    "skip_bias_add": EITHER,
    "skip_bias_add_qkv": EITHER,
    "slow_but_exact": EITHER,
}
IGNORED = ()


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}h.{{i}}", "layers_{i}"
    attention = f"{layer}.self_attention"
    joined = fused_per_head(3, config.n_head)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return [
        Rule("params/embed/word/embedding", f"{body}word_embeddings.weight", aliases=tied),
        *norm_rules("embed/norm", f"{body}word_embeddings_layernorm"),
        *norm_rules("final_norm", f"{body}ln_f"),
        *norm_rules(f"{here}/norm_1", f"{layer}.input_layernorm"),
        *norm_rules(f"{here}/norm_2", f"{layer}.post_attention_layernorm"),
        *joined_rules(
            f"{here}/attn", ("query", "key", "value"), f"{attention}.query_key_value", joined
        ),
        *dense_rules(f"{here}/attn/out", f"{attention}.dense"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.dense_h_to_4h"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.dense_4h_to_h"),
        *decoder_head_rules(head, tied=config.tie_word_embeddings),
    ]
