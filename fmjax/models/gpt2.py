"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): causal
pre-norm decoder with learned positions. HF "gpt2"; GPT-SW3 and GPT-3's sizes are the same function.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.attention import Attention
from fmjax.nn.decoder import Decoder, Inputs
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.heads import Unembedding
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.sides import cross_attention, own_cache
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, decoder_head_rules, dense_rules, fused, norm_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    classifier_dropout: float | None = None
    # Of the head "double_heads" alone.
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            rate = dataclasses.asdict(self)[name]
            if not 0 <= rate < 1:
                problems.append(f"{name}={rate} must be at least 0 and below 1")
        if self.summary_activation not in (None, "tanh"):
            problems.append(
                f"summary_activation={self.summary_activation!r} must be 'tanh' or null"
            )
        if problems:
            raise ValueError("gpt2 config: " + "; ".join(problems))

    @property
    def num_hidden_layers(self) -> int:
        """L, under the name that other families have for it."""
        return self.n_layer

    @property
    def hidden_size(self) -> int:
        """D, under the name that other families have for it."""
        return self.n_embd


MODEL_TYPE = "gpt2"
HEADS = {
    "model": "GPT2Model",
    "causal_lm": "GPT2LMHeadModel",
    "double_heads": "GPT2DoubleHeadsModel",
    "sequence_classification": "GPT2ForSequenceClassification",
    "token_classification": "GPT2ForTokenClassification",
    "question_answering": "GPT2ForQuestionAnswering",
}


def _sized(layers: int, width: int, heads: int, positions: int = 1024) -> Config:
    return Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)


VARIANTS = {
    "tiny": Config(
        vocab_size=99, n_positions=32, n_embd=24, n_layer=2, n_head=3,
        scale_attn_by_inverse_layer_idx=True,
    ),
    # Radford et al. 2019, table 2; widths 768 to 1600 with heads of 64.
    "base": _sized(12, 768, 12),
    "medium": _sized(24, 1024, 16),
    "large": _sized(36, 1280, 20),
    "xl": _sized(48, 1600, 25),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1: sizes and context of GPT-3, dense attention.
    # The width of "gpt3-13b" is 5140 there, which 40 heads do not divide: 5120.
    "gpt3-small": _sized(12, 768, 12, 2048),
    "gpt3-medium": _sized(24, 1024, 16, 2048),
    "gpt3-large": _sized(24, 1536, 16, 2048),
    "gpt3-xl": _sized(24, 2048, 16, 2048),
    "gpt3-2.7b": _sized(32, 2560, 32, 2048),
    "gpt3-6.7b": _sized(32, 4096, 32, 2048),
    "gpt3-13b": _sized(40, 5120, 40, 2048),
    "gpt3-175b": _sized(96, 12288, 96, 2048),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S].
        start: positions already in the cache.
        encoder: [B, S, D] or None.
        encoder_mask: bool [B, 1, 1, S] or None.
    """

    mask: Mask | None
    start: Array | int
    encoder: Array | None
    encoder_mask: Array | None


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Any, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        # Output projections start smaller by the square root of the number of residual updates.
        out_init = nn.initializers.normal(config.initializer_range / math.sqrt(2 * config.n_layer))

        scale: Any = 1.0
        if config.scale_attn_weights:
            scale = 1.0 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / (1.0 + jnp.asarray(index, jnp.float32))

        def attention(name: str) -> Attention:
            return Attention(
                config.n_head,
                dropout_rate=config.attn_pdrop,
                train=self.train,
                with_probabilities=self.output_attentions,
                kernel_init=init,
                out_init=out_init,
                scale=scale,
                name=name,
            )

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(config.layer_norm_epsilon, name=name)(x)

        def drop(x: Array) -> Array:
            return Dropout(config.resid_pdrop)(x, self.train)

        update, probabilities, new_cache = attention("attn")(
            norm("norm_1", hidden),
            mask=shared.mask,
            cache=own_cache(cache),
            start=shared.start,
        )
        hidden = hidden + drop(update)
        crossed = None
        if config.add_cross_attention and (shared.encoder is not None or isinstance(cache, dict)):
            update, crossed, kept = cross_attention(
                attention("cross_attn"), norm("norm_cross", hidden), shared, cache
            )
            hidden = hidden + drop(update)
            if isinstance(cache, dict):
                new_cache = {"self": new_cache, "cross": kept}
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        mlp = Mlp(inner, config.activation_function, init, out_init=out_init, name="mlp")
        hidden = hidden + drop(mlp(norm("norm_2", hidden)))
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(new_cache, copy, probabilities, crossed)


class Embeddings(nn.Module):
    """Word and position vectors; token types, where given, are looked up as words."""

    config: Config

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        self.word = Embed(self.config.vocab_size, self.config.n_embd, init)
        self.position = Embed(self.config.n_positions, self.config.n_embd, init)
        self.dropout = Dropout(self.config.embd_pdrop)

    def __call__(self, inputs: Inputs, token_type_ids: Array | None) -> Array:
        x = inputs.embedded(self.word) + self.position(inputs.position_ids)  # [B, T, D]
        if token_type_ids is not None:
            x = x + self.word(token_type_ids)
        return self.dropout(x, inputs.train)


class Summary(nn.Module):
    """One vector a sequence and a score from it (transformers' SequenceSummary)."""

    config: Config

    @nn.compact
    def __call__(self, hidden: Array, at: Array | None, train: bool) -> Array:
        config = self.config
        if at is None:
            x = hidden[:, -1]  # [B, D]
        else:
            x = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        x = Dropout(config.summary_first_dropout)(x, train)
        if config.summary_use_proj:
            labels = config.summary_proj_to_labels
            init = nn.initializers.normal(config.initializer_range)
            x = Dense(1 if labels else config.n_embd, kernel_init=init, name="summary")(x)
        return jnp.tanh(x) if config.summary_activation == "tanh" else x


class Model(Decoder):
    """GPT-2 with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def max_positions(self) -> int:
        return self.config.n_positions

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.n_head, self.config.n_embd // self.config.n_head

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.classifier_dropout
        return 0.1 if rate is None else rate

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(self.config.layer_norm_epsilon)
        super().setup()
        if self.head == "double_heads":
            self.vocabulary = Unembedding(
                self.config.vocab_size, self.tied, False,
                nn.initializers.normal(self.config.initializer_range), name="head",
            )  # fmt: skip
            self.summary = Summary(self.config)

    def embed_inputs(self, inputs: Inputs) -> Array:
        return self.embed(inputs, inputs.extra.get("token_type_ids"))

    def shared(self, inputs: Inputs, hidden: Array) -> PyTree:
        encoder_mask = inputs.extra.get("encoder_attention_mask")
        if encoder_mask is not None:
            encoder_mask = encoder_mask.astype(bool)[:, None, None, :]  # [B, 1, 1, S]
        encoder = inputs.extra.get("encoder_hidden_states")
        return Shared(inputs.mask(), inputs.start, encoder, encoder_mask)

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        mc_token_ids: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; beside the arguments of `fmjax.nn.decoder.Decoder`:

        Args:
            token_type_ids: int [B, T], looked up in the word table and added.
            encoder_hidden_states: [B, S, D], for cross-attention. With a cache made for them they
                are needed in the first call only.
            encoder_attention_mask: [B, S].
            mc_token_ids: int [B, N], of the head "double_heads": where each choice's summary is
                read; None is the last position. That head takes [B, N, T] for [B, T].

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs add_cross_attention=True in the config")
        choices: tuple[int, ...] = ()
        if self.head == "double_heads":
            per_choice = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            choices = next(x for x in per_choice if x is not None).shape[:2]  # (B, N)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else x.reshape(-1, *x.shape[2:]) for x in per_choice
            )  # [B, N, T] -> [B * N, T]
        elif mc_token_ids is not None:
            raise ValueError(f"mc_token_ids is for the head 'double_heads', not {self.head!r}")
        inputs = self.check(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, train
        )._replace(
            extra={
                "token_type_ids": token_type_ids,
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "mc_token_ids": None if mc_token_ids is None else mc_token_ids.reshape(-1),
                "choices": choices,
            }
        )
        return self.run(
            inputs,
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )

    def head_output(self, hidden: Array, inputs: Inputs, output_logits: bool) -> Output:
        if self.head != "double_heads":
            return super().head_output(hidden, inputs, output_logits)
        choices = inputs.extra["choices"]
        scores = self.summary(hidden, inputs.extra["mc_token_ids"], inputs.train)  # [B * N, 1 | D]
        hidden = hidden.reshape(*choices, *hidden.shape[1:])  # [B, N, T, D]
        out = Output(mc_logits=jnp.squeeze(scores.reshape(*choices, -1).astype(jnp.float32), -1))
        if not output_logits:
            return dataclasses.replace(out, last_hidden_state=hidden)
        return dataclasses.replace(out, logits=self.unembed(hidden))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    tokens = jnp.zeros((1, 1, 1) if head == "double_heads" else (1, 1), jnp.int32)
    if not config.add_cross_attention:
        return {"input_ids": tokens}
    return {"input_ids": tokens, "encoder_hidden_states": jnp.zeros((1, 1, config.n_embd))}


PREFIX = "transformer."
# n_ctx is an old name of n_positions that changes nothing. PyTorch's summary has other types, which
# take the choices for positions.
FIXED = {"n_ctx": 1024, "reorder_and_upcast_attn": False, "summary_type": "cls_index"}
IGNORED = (r"\.attn\.(bias|masked_bias)$", r"\.crossattention\.(bias|masked_bias)$")
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX

    def conv1d(param: str, tensor: str) -> list[Rule]:
        """PyTorch's Conv1D keeps kernels as we do, [I, O]."""
        return [
            Rule(f"params/{param}/kernel", f"{tensor}.weight"),
            Rule(f"params/{param}/bias", f"{tensor}.bias"),
        ]

    def joined(param: str, names: tuple[str, ...], tensor: str) -> list[Rule]:
        """Several of them, one after the other."""
        kernels = tuple(f"params/{param}/{name}/kernel" for name in names)
        biases = tuple(f"params/{param}/{name}/bias" for name in names)
        return [
            Rule(kernels, f"{tensor}.weight", fused(len(names), axis=1)),
            Rule(biases, f"{tensor}.bias", fused(len(names))),
        ]

    layer, here = f"{body}h.{{i}}", "layers_{i}"
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}wte.weight", aliases=tied),
        Rule("params/embed/position/embedding", f"{body}wpe.weight"),
        *norm_rules("final_norm", f"{body}ln_f"),
        *norm_rules(f"{here}/norm_1", f"{layer}.ln_1"),
        *norm_rules(f"{here}/norm_2", f"{layer}.ln_2"),
        *joined(f"{here}/attn", ("query", "key", "value"), f"{layer}.attn.c_attn"),
        *conv1d(f"{here}/attn/out", f"{layer}.attn.c_proj"),
        *conv1d(f"{here}/mlp/up", f"{layer}.mlp.c_fc"),
        *conv1d(f"{here}/mlp/down", f"{layer}.mlp.c_proj"),
    ]
    if config.add_cross_attention:
        table += norm_rules(f"{here}/norm_cross", f"{layer}.ln_cross_attn")
        table += joined(f"{here}/cross_attn", ("key", "value"), f"{layer}.crossattention.c_attn")
        table += conv1d(f"{here}/cross_attn/query", f"{layer}.crossattention.q_attn")
        table += conv1d(f"{here}/cross_attn/out", f"{layer}.crossattention.c_proj")
    if head == "double_heads" and config.summary_use_proj:
        table += dense_rules("summary/summary", "multiple_choice_head.summary")
    name = "causal_lm" if head == "double_heads" else head
    return table + decoder_head_rules(name, tied=config.tie_word_embeddings)
