"""T5 (Raffel et al. 2020, arXiv:1910.10683): pre-norm Transformer encoder-decoder without biases,
positions by buckets of distances; T5 v1.1 and Flan-T5 with gated feed-forward layers and an output
matrix of its own. HF "t5"; parent of mt5 and longt5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import ACTIVATIONS
from fmjax.nn.attention import Attention
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import RMSNorm
from fmjax.nn.position import relative_position_buckets
from fmjax.nn.seq2seq import EncoderDecoder
from fmjax.nn.sides import (
    Shared,
    Tokens,
    Words,
    cross_attention,
    own_cache,
    shift_right,
    stack_output,
)
from fmjax.nn.stack import LayerOutput, run_stack
from fmjax.types import Output, PyTree, Remat
from fmjax.weights import TRANSPOSE, Rule


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """The fields of config.json that all siblings have, with T5's defaults (transformers 5)."""

    vocab_size: int = 32128
    d_model: int = dataclasses.field(default=512, metadata={"also": ("hidden_size",)})
    d_kv: int = dataclasses.field(default=64, metadata={"also": ("head_dim",)})
    d_ff: int = 2048
    num_layers: int = dataclasses.field(default=6, metadata={"also": ("num_hidden_layers",)})
    num_decoder_layers: int | None = None  # None is as `num_layers`
    num_heads: int = dataclasses.field(default=8, metadata={"also": ("num_attention_heads",)})
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = True
    # What `feed_forward_proj` says, in other words; kept as None once they agree.
    dense_act_fn: str | None = dataclasses.field(default=None, metadata={"saved": False})
    is_gated_act: bool | None = dataclasses.field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        name = type(self).__module__.rpartition(".")[2]
        if problems := self.problems():
            raise ValueError(f"{name} config: " + "; ".join(problems))
        # Frozen, so set this way: two configs of one function must be equal.
        object.__setattr__(self, "dense_act_fn", None)
        object.__setattr__(self, "is_gated_act", None)

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        problems = [
            f"{name}={value} must be at least 1"
            for name, value in values.items()
            if type(value) is int and not name.endswith("_id") and value < 1
        ]
        problems += [
            f"{name}={value} must be at least 0 and below 1"
            for name, value in values.items()
            if "dropout" in name and not 0 <= value < 1
        ]
        kind = self.feed_forward_proj
        if kind.removeprefix("gated-") not in ACTIVATIONS:
            problems.append(
                f"feed_forward_proj={kind!r} must be an activation or gated-ACTIVATION, which is "
                f"one of {sorted(ACTIVATIONS)}"
            )
        if self.dense_act_fn not in (None, self.activation):
            problems.append(f"dense_act_fn={self.dense_act_fn!r} contradicts {kind!r}")
        if self.is_gated_act not in (None, self.gated):
            problems.append(f"is_gated_act={self.is_gated_act} contradicts {kind!r}")
        pad = self.pad_token_id
        if pad is not None and not 0 <= pad < self.vocab_size:
            problems.append(f"pad_token_id={pad} is outside the vocabulary of {self.vocab_size}")
        if self.relative_attention_num_buckets < 4:
            problems.append(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets} must be at "
                "least 4"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            problems.append(
                f"relative_attention_max_distance={self.relative_attention_max_distance} must be "
                "above half of relative_attention_num_buckets"
            )
        return problems

    @property
    def gated(self) -> bool:
        """Whether feed-forward layers are gated."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The activation of feed-forward layers."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def decoder_layers(self) -> int:
        """L of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def scaled(self) -> bool:
        """Whether hidden states are scaled by d_model^-0.5 for the vocabulary head."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Config(PairConfig):
    """T5's fields."""

    # Whether hidden states are scaled for the vocabulary head; None: if it is tied.
    scale_decoder_outputs: bool | None = dataclasses.field(default=None, metadata={"saved": "set"})
    classifier_dropout: float = 0.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    @property
    def scaled(self) -> bool:
        scale = self.scale_decoder_outputs
        return self.tie_word_embeddings if scale is None else scale


MODEL_TYPE = "t5"
HEADS = {
    "model": "T5Model",
    "seq2seq_lm": "T5ForConditionalGeneration",
    "encoder": "T5EncoderModel",
    "sequence_classification": "T5ForSequenceClassification",
    "token_classification": "T5ForTokenClassification",
    "question_answering": "T5ForQuestionAnswering",
}


def _sized(layers: int, width: int, heads: int, size: int, inner: int) -> Config:
    return Config(
        num_layers=layers, d_model=width, num_heads=heads, d_kv=size, d_ff=inner,
        decoder_start_token_id=0,
    )  # fmt: skip


def gated_sizes(cls: type[PairConfig], **fields: Any) -> dict[str, Any]:
    """The sizes of T5 v1.1 and Flan-T5 (Chung et al. 2022, arXiv:2210.11416), which mT5 has too."""
    return {
        name: cls(
            num_layers=layers, d_model=width, num_heads=heads, d_ff=inner,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
            **fields,
        )
        for name, layers, width, heads, inner in (
            ("small", 8, 512, 6, 1024),
            ("base", 12, 768, 12, 2048),
            ("large", 24, 1024, 16, 2816),
            ("xl", 24, 2048, 32, 5120),
            ("xxl", 24, 4096, 64, 10240),
        )
    }  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    ),
    # Raffel et al. 2020, section 3.7.
    "small": _sized(6, 512, 8, 64, 2048),
    "base": _sized(12, 768, 12, 64, 3072),
    "large": _sized(24, 1024, 16, 64, 4096),
    "3b": _sized(24, 1024, 32, 128, 16384),
    "11b": _sized(24, 1024, 128, 128, 65536),
    **{f"v1.1-{name}": config for name, config in gated_sizes(Config).items()},
}  # fmt: skip


def fan_in(scale: float) -> Callable[..., Array]:
    """Normal with standard deviation scale * I^-0.5."""
    return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


class Block(nn.Module):
    """Norm, self-attention; in a decoder norm, cross-attention; norm, feed-forward; residuals."""

    config: Any
    decoder: bool
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    def norm(self, name: str) -> RMSNorm:
        """A norm of the config's epsilon."""
        return RMSNorm(self.config.layer_norm_epsilon, name=name)

    def drop(self, x: Array) -> Array:
        """The dropout of residual updates."""
        return Dropout(self.config.dropout_rate)(x, self.train)

    def attention_fields(self) -> dict[str, Any]:
        """The fields of every attention layer: scores are not scaled, the initial weights are."""
        config, factor = self.config, self.config.initializer_factor
        return {
            "num_heads": config.num_heads,
            "head_dim": config.d_kv,
            "scale": 1.0,
            "use_bias": False,
            "dropout_rate": config.dropout_rate,
            "train": self.train,
            "with_probabilities": self.output_attentions,
            "kernel_init": fan_in(factor),
            "query_init": fan_in(factor * config.d_kv**-0.5),
        }

    def attend(self, x: Array, cache: PyTree, shared: Shared) -> tuple[Array, Any, Any]:
        """Self-attention: (update, probabilities, cache)."""
        attention = Attention(**self.attention_fields(), name="attn")
        return attention(
            x, mask=shared.mask, bias=shared.bias, cache=own_cache(cache), start=shared.start
        )

    @nn.compact
    def __call__(
        self, hidden: Array, cache: PyTree, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        update, probabilities, new_cache = self.attend(self.norm("norm_1")(hidden), cache, shared)
        hidden = hidden + self.drop(update)
        crossed = None
        if self.decoder:
            attention = Attention(**self.attention_fields(), name="cross_attn")
            update, crossed, kept = cross_attention(
                attention, self.norm("norm_cross")(hidden), shared, cache
            )
            hidden = hidden + self.drop(update)
            if cache is not None:
                new_cache = {"self": new_cache, "cross": kept}
        mlp = Mlp(
            config.d_ff,
            config.activation,
            fan_in(config.initializer_factor),
            use_bias=False,
            gated=config.gated,
            dropout_rate=config.dropout_rate,
            train=self.train,
            name="mlp",
        )
        hidden = hidden + self.drop(mlp(self.norm("norm_2")(hidden)))
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(new_cache, copy, probabilities, crossed)


class Stack(nn.Module):
    """One side: dropout, blocks that share one table of relative biases, last norm and dropout."""

    config: Any
    decoder: bool
    scan: bool
    remat: Remat

    block: ClassVar[type[nn.Module]] = Block

    def bias_table(self, name: str = "relative_bias") -> Embed:
        """The biases of every bucket and head: [buckets, H]."""
        config = self.config
        init = nn.initializers.normal(config.initializer_factor * config.d_model**-0.5)
        return Embed(config.relative_attention_num_buckets, config.num_heads, init, name=name)

    def buckets(self, relative: Array) -> Array:
        """The bucket of each distance, key minus query."""
        return relative_position_buckets(
            relative,
            bidirectional=not self.decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )

    def prepare(self, side: Tokens, shared: Shared) -> Shared:
        """`shared` with what all blocks of this side read; called in a compact method."""
        relative = jnp.arange(side.capacity)[None, :] - side.positions()[0, :, None]  # [T, S]
        bias = self.bias_table()(self.buckets(relative))  # [T, S, H]
        return shared._replace(bias=jnp.moveaxis(bias, -1, 0)[None])  # [1, H, T, S]

    @nn.compact
    def __call__(self, words: Array, side: Tokens, shared: Shared, cache: PyTree) -> Output:
        """[B, T, D] of words -> the side's states."""
        config = self.config
        dropout = Dropout(config.dropout_rate)
        embedded = dropout(words, side.train)
        stack = run_stack(
            self.block,
            {
                "config": config,
                "decoder": self.decoder,
                "train": side.train,
                "output_hidden_states": side.output_hidden_states,
                "output_attentions": side.output_attentions,
            },
            embedded,
            self.prepare(side, shared),
            num_layers=config.decoder_layers if self.decoder else config.num_layers,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
        )
        hidden = RMSNorm(config.layer_norm_epsilon, name="final_norm")(stack.hidden)
        return stack_output(side, embedded, stack, dropout(hidden, side.train))


class Model(EncoderDecoder):
    """T5 with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    encoder_stack: ClassVar[type[Stack]] = Stack

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.config.decoder_layers, self.config.num_heads, self.config.d_kv

    @property
    def head_init(self) -> Callable[..., Array]:
        if self.head in ("seq2seq_lm", "token_classification"):
            return nn.initializers.normal(self.config.initializer_factor)
        return fan_in(self.config.initializer_factor)

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_factor)
        self.embed = Words(config.vocab_size, config.d_model, init)
        self.encoder = self.encoder_stack(config, False, self.scan, self.remat)
        if not self.encoder_alone:
            self.decoder = Stack(config, True, self.scan, self.remat)
        super().setup()

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        if self.head not in ("sequence_classification", "question_answering"):
            return None
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "decoder_input_ids are not given and the config has no decoder_start_token_id to "
                "make them of input_ids"
            )
        return shift_right(input_ids, start)

    def run_encoder(self, side: Tokens) -> Output:
        return self.encoder(self.embed(side), side, Shared(side.mask), None)

    def run_decoder(
        self, side: Tokens, encoder: Array | None, encoder_mask: Array | None, cache: PyTree
    ) -> Output:
        shared = Shared(side.mask, side.start, encoder, encoder_mask)
        return self.decoder(self.embed(side), side, shared, cache)

    def unembed(self, hidden: Array) -> Array:
        if self.config.scaled:
            hidden = hidden * jnp.asarray(self.config.d_model**-0.5, hidden.dtype)
        return super().unembed(hidden)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    token = jnp.zeros((1, 1), jnp.int32)
    if head in ("encoder", "token_classification"):
        return {"input_ids": token}
    return {"input_ids": token, "decoder_input_ids": token}


PREFIX = "transformer."
FIXED: dict[str, Any] = {
    # The head decides.
    "is_decoder": ...,
    "is_encoder_decoder": ...,
    # Of old files; distances need no greatest position.
    "n_positions": ...,
}
# Files converted from the first TensorFlow code have a table that is never read.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",)


def from_tensors(config: Any, head: str, names: Collection[str]) -> Any:
    """The config with what only the tensors' names tell: whether the output matrix is tied.

    transformers 5 writes ``tie_word_embeddings: true`` for T5 v1.1 too, whose head has a matrix of
    its own, and tells it by ``scale_decoder_outputs: false``.
    """
    scale = config.scale_decoder_outputs
    untied = config.tie_word_embeddings and scale is False and "lm_head.weight" in names
    if untied:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    if scale == config.tie_word_embeddings:
        config = dataclasses.replace(config, scale_decoder_outputs=None)
    return config


def stack_rules(
    config: Any, side: str, tensor: str, *, attention: str = "SelfAttention"
) -> list[Rule]:
    """One side's parameters.

    Args:
        config: the family's.
        side: "encoder" or "decoder".
        tensor: what its tensors' names start with.
        attention: the name of its self-attention.
    """
    here, layer = f"params/{side}/layers_{{i}}", f"{tensor}.block.{{i}}.layer"
    sublayers = [("attn", attention, "norm_1")]
    if side == "decoder":
        sublayers.append(("cross_attn", "EncDecAttention", "norm_cross"))
    table = [
        Rule(
            f"params/{side}/relative_bias/embedding",
            f"{tensor}.block.0.layer.0.{attention}.relative_attention_bias.weight",
        ),
        Rule(f"params/{side}/final_norm/scale", f"{tensor}.final_layer_norm.weight"),
    ]
    for number, (name, theirs, norm) in enumerate(sublayers):
        table.append(Rule(f"{here}/{norm}/scale", f"{layer}.{number}.layer_norm.weight"))
        for kernel in ("query", "key", "value", "out"):
            letter = kernel[0]
            weight = f"{layer}.{number}.{theirs}.{letter}.weight"
            table.append(Rule(f"{here}/{name}/{kernel}/kernel", weight, TRANSPOSE))
    last = f"{layer}.{len(sublayers)}"
    table.append(Rule(f"{here}/norm_2/scale", f"{last}.layer_norm.weight"))
    kernels = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    for kernel, theirs in {**kernels, "down": "wo"}.items():
        weight = f"{last}.DenseReluDense.{theirs}.weight"
        table.append(Rule(f"{here}/mlp/{kernel}/kernel", weight, TRANSPOSE))
    return table


def outer_rules(config: Any, head: str, body: str) -> list[Rule]:
    """The table of words and the head."""
    copies = [f"{body}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    if config.tie_word_embeddings:
        copies.append("lm_head.weight")
    table = [Rule("params/embed/word/embedding", f"{body}shared.weight", aliases=tuple(copies))]
    if head == "seq2seq_lm" and not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "lm_head.weight", TRANSPOSE))
    layers = {
        "sequence_classification": {
            "head/dense": "classification_head.dense",
            "head/out": "classification_head.out_proj",
        },
        "token_classification": {"head": "classifier"},
        "question_answering": {"head": "qa_outputs"},
    }.get(head, {})
    for param, tensor in layers.items():
        table.append(Rule(f"params/{param}/kernel", f"{tensor}.weight", TRANSPOSE))
        table.append(Rule(f"params/{param}/bias", f"{tensor}.bias"))
    return table


def body_of(head: str) -> str:
    """What the names of a head's base model start with."""
    return PREFIX if head in ("sequence_classification", "token_classification") else ""


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = body_of(head)
    table = outer_rules(config, head, body) + stack_rules(config, "encoder", f"{body}encoder")
    if head not in ("encoder", "token_classification"):
        table += stack_rules(config, "decoder", f"{body}decoder")
    return table
