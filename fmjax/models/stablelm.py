"""StableLM 3B (Tow et al. 2023, "StableLM 3B 4E1T") and StableLM 2 (Bellagente et al. 2024,
arXiv:2402.17834): layer norms, rotary positions in a part of each head, gated feed-forward, after
attention or beside it; perhaps a norm for every head of queries and keys. HF "stablelm".
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.models.gptj import Shared
from fmjax.models.phi import partly_rotary_problems
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, TokenEmbeddings, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.position import RopeScaling, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules, stacked


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under version 4's names and with transformers 5's defaults."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_attention_heads", act="hidden_act"
        )
        if not problems:
            problems += partly_rotary_problems(self.rope_scaling, self.rotary_size, self.head_size)
            if self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                    f"num_key_value_heads={self.num_key_value_heads}"
                )
        if problems:
            raise ValueError("stablelm config: " + "; ".join(problems))

    @property
    def head_size(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """R, how many features of a head are rotated."""
        return int(self.head_size * self.partial_rotary_factor)


MODEL_TYPE = "stablelm"
HEADS = {
    "model": "StableLmModel",
    "causal_lm": "StableLmForCausalLM",
    "sequence_classification": "StableLmForSequenceClassification",
    "token_classification": "StableLmForTokenClassification",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=0.5,
        use_qkv_bias=True, qk_layernorm=True, hidden_dropout=0.1, attention_dropout=0.1,
        rope_scaling=RopeScaling(rope_type="linear", factor=2.0), max_position_embeddings=32,
    ),
    # The config.json files of stabilityai/stablelm-3b-4e1t, stablelm-2-1_6b and stablelm-2-12b.
    "3b-4e1t": Config(),
    "2-1.6b": Config(
        vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        use_qkv_bias=True,
    ),
    "2-12b": Config(
        vocab_size=100352, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_key_value_heads=8, qk_layernorm=True, use_parallel_residual=True,
    ),
}  # fmt: skip


class HeadwiseNorm(nn.Module):
    """Layer normalisation of every head, each with a scale of its own."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, H, K] -> [B, T, H, K]
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-2:])
        normed = LayerNorm(self.epsilon, use_bias=False, use_scale=False)(x.astype(jnp.float32))
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual; or both after the first norm."""

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
        normed = LayerNorm(config.layer_norm_eps, name="norm_1")(hidden)
        update, probabilities, cache = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            num_key_value_heads=config.num_key_value_heads,
            use_bias=config.use_qkv_bias,
            out_bias=False,
            head_norm=partial(HeadwiseNorm, config.layer_norm_eps) if config.qk_layernorm else None,
            name="attn",
        )(normed, mask=shared.mask, rotary=shared.rotary, cache=cache, start=shared.start)
        hidden = hidden + update
        if not config.use_parallel_residual:
            normed = LayerNorm(config.layer_norm_eps, name="norm_2")(hidden)
        update = Mlp(
            config.intermediate_size,
            config.hidden_act,
            init,
            use_bias=False,
            gated=True,
            name="mlp",
        )(normed)
        hidden = hidden + Dropout(config.hidden_dropout)(update, self.train)
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Model(Decoder):
    """StableLM with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.num_key_value_heads, self.config.head_size

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.classifier_dropout
        return self.config.hidden_dropout if rate is None else rate

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.embed = TokenEmbeddings(
            config.vocab_size, config.hidden_size, init, config.pad_token_id
        )
        self.final_norm = LayerNorm(config.layer_norm_eps)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        config = self.config
        rotary = scaled_rotary(
            inputs.position_ids,
            config.rotary_size,
            config.rope_theta,
            config.rope_scaling,
            max_positions=config.max_position_embeddings,
        )
        return Shared(inputs.mask(), inputs.start, rotary)


inputs = token_inputs
from_tensors = config_alone
PREFIX = "model."
FIXED = {}
IGNORED = (r"(^|\.)rotary_emb\.inv_freq$",)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}layers.{{i}}", "layers_{i}"
    attention, bias = f"{layer}.self_attn", config.use_qkv_bias
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}embed_tokens.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}norm"),
        *norm_rules(f"{here}/norm_1", f"{layer}.input_layernorm"),
        *dense_rules(f"{here}/attn/query", f"{attention}.q_proj", bias=bias),
        *dense_rules(f"{here}/attn/key", f"{attention}.k_proj", bias=bias),
        *dense_rules(f"{here}/attn/value", f"{attention}.v_proj", bias=bias),
        *dense_rules(f"{here}/attn/out", f"{attention}.o_proj", bias=False),
        *dense_rules(f"{here}/mlp/gate", f"{layer}.mlp.gate_proj", bias=False),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.up_proj", bias=False),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.down_proj", bias=False),
        *decoder_head_rules(head, tied=config.tie_word_embeddings, token_classifier="score"),
    ]
    if not config.use_parallel_residual:
        table += norm_rules(f"{here}/norm_2", f"{layer}.post_attention_layernorm")
    if config.qk_layernorm:
        for name in ("query", "key"):
            scales = f"{attention}.{name[0]}_layernorm.norms.{{head}}.weight"
            table.append(Rule(f"params/{here}/attn/{name}_norm/scale", scales, stacked()))
    return table
