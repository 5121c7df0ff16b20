"""Phi-1, Phi-1.5 and Phi-2 (Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023,
arXiv:2309.05463): attention and feed-forward in parallel after one norm, rotary positions in a part
of each head, biases everywhere. HF "phi".
"""

from __future__ import annotations

import dataclasses
from functools import partial

from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.models.gpt_neox import rotary_problems
from fmjax.models.gptj import Shared
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, TokenEmbeddings, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import RopeScaling, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under version 4's names and with transformers 5's defaults."""

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_attention_heads", act="hidden_act"
        )
        if not problems:
            problems += partly_rotary_problems(self.rope_scaling, self.rotary_size, self.head_size)
            if self.num_attention_heads % self.groups:
                problems.append(
                    f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                    f"num_key_value_heads={self.groups}"
                )
        if problems:
            raise ValueError("phi config: " + "; ".join(problems))

    @property
    def groups(self) -> int:
        """G."""
        groups = self.num_key_value_heads
        return self.num_attention_heads if groups is None else groups

    @property
    def head_size(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """R, how many features of a head are rotated."""
        return int(self.head_size * self.partial_rotary_factor)


def partly_rotary_problems(scaling: RopeScaling | None, rotary: int, size: int) -> list[str]:
    """`fmjax.models.gpt_neox.rotary_problems`, of families that round no odd number up."""
    if rotary % 2:
        return [f"{rotary} rotary features of a head of {size}: they must be even"]
    return rotary_problems(scaling, rotary, size)


MODEL_TYPE = "phi"
HEADS = {
    "model": "PhiModel",
    "causal_lm": "PhiForCausalLM",
    "sequence_classification": "PhiForSequenceClassification",
    "token_classification": "PhiForTokenClassification",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True,
        resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1,
        rope_scaling=RopeScaling(rope_type="linear", factor=2.0), max_position_embeddings=32,
    ),
    # The config.json files of microsoft/phi-1, phi-1_5 and phi-2.
    "1": Config(),
    "1.5": Config(),
    "2": Config(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, partial_rotary_factor=0.4,
        resid_pdrop=0.1,
    ),
}  # fmt: skip


class Block(nn.Module):
    """One norm, then attention and feed-forward side by side, then the residual."""

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

        def drop(x: Array) -> Array:
            return Dropout(config.resid_pdrop)(x, self.train)

        normed = LayerNorm(config.layer_norm_eps, name="norm_1")(hidden)
        update, probabilities, cache = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            num_key_value_heads=config.groups,
            head_norm=partial(LayerNorm, config.layer_norm_eps) if config.qk_layernorm else None,
            name="attn",
        )(normed, mask=shared.mask, rotary=shared.rotary, cache=cache, start=shared.start)
        mlp = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")
        hidden = hidden + drop(update) + drop(mlp(normed))
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Model(Decoder):
    """Phi with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.groups, self.config.head_size

    @property
    def lm_bias(self) -> bool:
        return True

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.classifier_dropout
        return 0.1 if rate is None else rate

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.embed = TokenEmbeddings(
            config.vocab_size, config.hidden_size, init, config.pad_token_id, config.embd_pdrop
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
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}embed_tokens.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}final_layernorm"),
        *norm_rules(f"{here}/norm_1", f"{layer}.input_layernorm"),
        *dense_rules(f"{here}/attn/query", f"{layer}.self_attn.q_proj"),
        *dense_rules(f"{here}/attn/key", f"{layer}.self_attn.k_proj"),
        *dense_rules(f"{here}/attn/value", f"{layer}.self_attn.v_proj"),
        *dense_rules(f"{here}/attn/out", f"{layer}.self_attn.dense"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.fc1"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.fc2"),
        *decoder_head_rules(
            head, tied=config.tie_word_embeddings, lm_bias=True, token_classifier="score"
        ),
    ]
    if config.qk_layernorm:
        table += norm_rules(f"{here}/attn/query_norm", f"{layer}.self_attn.q_layernorm")
        table += norm_rules(f"{here}/attn/key_norm", f"{layer}.self_attn.k_layernorm")
    return table
