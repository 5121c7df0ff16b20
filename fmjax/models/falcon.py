"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867) and RefinedWeb models (Penedo et al. 2023,
arXiv:2306.01116): attention and feed-forward in parallel over few key-value heads and rotary
positions; the older ones one after the other over linear biases (ALiBi). HF "falcon".
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.models.bloom import key_positions
from fmjax.models.gpt_neox import rotary_problems
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, TokenEmbeddings, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import RopeScaling, Rotary, alibi_slopes, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.weights import (
    Rule,
    decoder_head_rules,
    dense_rules,
    fused_per_head,
    joined_rules,
    norm_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under version 4's names and with transformers 5's defaults."""

    vocab_size: int = 65024
    hidden_size: int = dataclasses.field(default=4544, metadata={"also": ("n_embed",)})
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None  # of the new architecture alone
    num_ln_in_parallel_attn: int | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_attention_heads", act="activation"
        )
        if not problems:
            if not self.alibi:
                problems += rotary_problems(self.rope_scaling, self.head_size, self.head_size)
            if self.num_attention_heads % self.groups:
                problems.append(
                    f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                    f"num_kv_heads={self.groups}"
                )
        if self.new_decoder_architecture and not self.parallel_attn:
            problems.append("new_decoder_architecture=True needs parallel_attn=True")
        if self.num_ln_in_parallel_attn not in (None, 1, 2):
            problems.append(
                f"num_ln_in_parallel_attn={self.num_ln_in_parallel_attn} must be 1 or 2"
            )
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            problems.append("num_ln_in_parallel_attn=2 needs new_decoder_architecture=True")
        if problems:
            raise ValueError("falcon config: " + "; ".join(problems))

    @property
    def head_size(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """G, the number of key-value heads."""
        if self.new_decoder_architecture and self.num_kv_heads is not None:
            return self.num_kv_heads
        if self.multi_query and not self.new_decoder_architecture:
            return 1
        return self.num_attention_heads

    @property
    def has_second_norm(self) -> bool:
        """Whether the feed-forward has a norm of its own."""
        if self.new_decoder_architecture:
            return self.num_ln_in_parallel_attn != 1
        return not self.parallel_attn


MODEL_TYPE = "falcon"
HEADS = {
    "model": "FalconModel",
    "causal_lm": "FalconForCausalLM",
    "sequence_classification": "FalconForSequenceClassification",
    "token_classification": "FalconForTokenClassification",
    "question_answering": "FalconForQuestionAnswering",
}


def _new(layers: int, width: int, heads: int) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_kv_heads=8,
        new_decoder_architecture=True,
    )  # fmt: skip


def _rw(layers: int, width: int, heads: int, vocab_size: int) -> Config:
    return Config(
        vocab_size=vocab_size, num_hidden_layers=layers, hidden_size=width,
        num_attention_heads=heads, alibi=True, multi_query=False, parallel_attn=False, bias=True,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        ffn_hidden_size=40, new_decoder_architecture=True, bias=True, hidden_dropout=0.1,
        max_position_embeddings=32,
    ),
    # The config.json files of tiiuae/falcon-*.
    "rw-1b": _rw(24, 2048, 32, 50304),
    "rw-7b": _rw(36, 4096, 64, 65024),
    "7b": Config(),
    "11b": dataclasses.replace(
        _new(60, 4096, 32), num_ln_in_parallel_attn=1, max_position_embeddings=8192,
        rope_theta=500042.0,
    ),
    "40b": _new(60, 8192, 128),
    "180b": _new(80, 14848, 232),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S].
        start: positions already in the cache.
        rotary: tables for the positions of the input, or None.
        bias: of the scores, float32 [B | 1, H, T | 1, S], or None.
    """

    mask: Mask
    start: Array | int
    rotary: Rotary | None
    bias: Array | None


class Block(nn.Module):
    """Attention and feed-forward side by side after one or two norms, or one after the other."""

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
        normed = LayerNorm(config.layer_norm_epsilon, name="norm_1")(hidden)
        update, probabilities, cache = Attention(
            config.num_attention_heads,
            # As in the original, rotary models drop no probabilities.
            dropout_rate=config.attention_dropout if config.alibi else 0.0,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            num_key_value_heads=config.groups,
            use_bias=config.bias,
            name="attn",
        )(
            normed,
            mask=shared.mask,
            bias=shared.bias,
            rotary=shared.rotary,
            cache=cache,
            start=shared.start,
        )
        serial = not (config.parallel_attn or config.new_decoder_architecture)
        if serial:
            hidden = hidden + Dropout(config.attention_dropout)(update, self.train)
            update = 0.0
        if config.has_second_norm:
            normed = LayerNorm(config.layer_norm_epsilon, name="norm_2")(hidden)
        inner = config.ffn_hidden_size
        inner = 4 * config.hidden_size if inner is None else inner
        mlp = Mlp(inner, config.activation, init, use_bias=config.bias, name="mlp")
        hidden = hidden + Dropout(config.hidden_dropout)(update + mlp(normed), self.train)
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Model(Decoder):
    """Falcon with one head; see `fmjax.nn.decoder.Decoder`.

    With ``alibi`` positions are told by the attention mask alone: ``position_ids`` changes nothing.
    """

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.groups, self.config.head_size

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.classifier_dropout
        return self.config.hidden_dropout if rate is None else rate

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.embed = TokenEmbeddings(config.vocab_size, config.hidden_size, init)
        self.final_norm = LayerNorm(config.layer_norm_epsilon)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        config = self.config
        if not config.alibi:
            rotary = scaled_rotary(
                inputs.position_ids,
                config.head_size,
                config.rope_theta,
                config.rope_scaling,
                max_positions=config.max_position_embeddings,
            )
            return Shared(inputs.mask(), inputs.start, rotary, None)
        # Trained with biases in bfloat16, which stay so whatever the model's dtype.
        slopes = jnp.asarray(alibi_slopes(config.num_attention_heads), jnp.bfloat16)
        bias = slopes[:, None, None] * key_positions(inputs)[:, None].astype(jnp.bfloat16)
        bias = bias.astype(jnp.float32) / math.sqrt(config.head_size)  # [B | 1, H, T | 1, S]
        return Shared(inputs.mask(), inputs.start, None, bias)


inputs = token_inputs
from_tensors = config_alone
PREFIX = "transformer."
# In files, read by no version.
FIXED = {"apply_residual_connection_post_layernorm": False, "ff_factor": 4}
IGNORED = (r"(^|\.)(rotary_emb|maybe_rotary|rotary)\.inv_freq$",)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}h.{{i}}", "layers_{i}"
    attention, bias, groups = f"{layer}.self_attention", config.bias, config.groups
    joined = fused_per_head((config.num_attention_heads // groups, 1, 1), groups)
    norms = ("input_layernorm", "post_attention_layernorm")
    if config.new_decoder_architecture and config.has_second_norm:
        norms = ("ln_attn", "ln_mlp")
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}word_embeddings.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}ln_f"),
        *norm_rules(f"{here}/norm_1", f"{layer}.{norms[0]}"),
        *joined_rules(
            f"{here}/attn", ("query", "key", "value"), f"{attention}.query_key_value", joined,
            bias=bias,
        ),
        *dense_rules(f"{here}/attn/out", f"{attention}.dense", bias=bias),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.dense_h_to_4h", bias=bias),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.dense_4h_to_h", bias=bias),
        *decoder_head_rules(head, tied=config.tie_word_embeddings),
    ]  # fmt: skip
    if config.has_second_norm:
        table += norm_rules(f"{here}/norm_2", f"{layer}.{norms[1]}")
    return table
