"""GPT-J (Wang & Komatsuzaki 2021, "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model"):
attention and feed-forward in parallel after one norm, rotary positions in neighbouring pairs of the
first features of a head. HF "gptj".
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.models.gpt_neo import SUMMARY, TypedDecoder
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Inputs, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import Rotary, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50400
    n_positions: int = dataclasses.field(
        default=2048, metadata={"also": ("max_position_embeddings",)}
    )
    n_embd: int = dataclasses.field(default=4096, metadata={"also": ("hidden_size",)})
    n_layer: int = dataclasses.field(default=28, metadata={"also": ("num_hidden_layers",)})
    n_head: int = dataclasses.field(default=16, metadata={"also": ("num_attention_heads",)})
    rotary_dim: int = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(self, width="n_embd", heads="n_head", act="activation_function")
        size = self.n_embd // max(self.n_head, 1)
        if self.rotary_dim % 2 or self.rotary_dim > size:
            problems.append(
                f"rotary_dim={self.rotary_dim} must be even and at most the size of a head, {size}"
            )
        if problems:
            raise ValueError("gptj config: " + "; ".join(problems))

    @property
    def num_hidden_layers(self) -> int:
        """L, under the name that other families have for it."""
        return self.n_layer


MODEL_TYPE = "gptj"
HEADS = {
    "model": "GPTJModel",
    "causal_lm": "GPTJForCausalLM",
    "sequence_classification": "GPTJForSequenceClassification",
    "question_answering": "GPTJForQuestionAnswering",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, n_positions=32, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_inner=40,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    ),
    "6b": Config(),  # the config.json of EleutherAI/gpt-j-6b
}  # fmt: skip


class Shared(NamedTuple):
    """What every block of a rotary decoder reads.

    Args:
        mask: bool [B | 1, 1, T, S].
        start: positions already in the cache.
        rotary: tables for the positions of the input.
    """

    mask: Mask
    start: Array | int
    rotary: Rotary


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

        normed = LayerNorm(config.layer_norm_epsilon, name="norm_1")(hidden)
        update, probabilities, cache = Attention(
            config.n_head,
            dropout_rate=config.attn_pdrop,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=False,
            interleaved=True,
            name="attn",
        )(normed, mask=shared.mask, rotary=shared.rotary, cache=cache, start=shared.start)
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        mlp = Mlp(inner, config.activation_function, init, name="mlp")
        hidden = hidden + drop(update) + drop(mlp(normed))
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Embeddings(nn.Module):
    """Word vectors; token types, where given, are looked up as words."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.word = Embed(config.vocab_size, config.n_embd, init)
        self.dropout = Dropout(config.embd_pdrop)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = inputs.embedded(self.word)
        if inputs.extra["token_type_ids"] is not None:
            x = x + self.word(inputs.extra["token_type_ids"])
        return self.dropout(x, inputs.train)


class Model(TypedDecoder):
    """GPT-J with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def max_positions(self) -> int:
        return self.config.n_positions

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.n_head, self.config.n_embd // self.config.n_head

    @property
    def lm_bias(self) -> bool:
        return True

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(self.config.layer_norm_epsilon)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        config = self.config
        rotary = scaled_rotary(
            inputs.position_ids, config.rotary_dim, 10000.0, max_positions=config.n_positions
        )
        return Shared(inputs.mask(), inputs.start, rotary)


inputs = token_inputs
from_tensors = config_alone
PREFIX = "transformer."
FIXED = SUMMARY | {"is_encoder_decoder": False, "rotary": True, "scale_attn_weights": True}
IGNORED = (r"\.attn\.(bias|masked_bias)$",)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}h.{{i}}", "layers_{i}"
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return [
        Rule("params/embed/word/embedding", f"{body}wte.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}ln_f"),
        *norm_rules(f"{here}/norm_1", f"{layer}.ln_1"),
        *dense_rules(f"{here}/attn/query", f"{layer}.attn.q_proj", bias=False),
        *dense_rules(f"{here}/attn/key", f"{layer}.attn.k_proj", bias=False),
        *dense_rules(f"{here}/attn/value", f"{layer}.attn.v_proj", bias=False),
        *dense_rules(f"{here}/attn/out", f"{layer}.attn.out_proj", bias=False),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.fc_in"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.fc_out"),
        *decoder_head_rules(head, tied=config.tie_word_embeddings, lm_bias=True),
    ]
