"""Llama (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Grattafiori et al. 2024,
arXiv:2407.21783): causal pre-norm decoder with rotary positions, RMS norms, gated feed-forward and
grouped-query attention. HF "llama"; the parent of most of today's decoders, which override what
they vary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.nn.activation import ACTIVATIONS
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs
from fmjax.nn.embed import Embed
from fmjax.nn.mask import Mask, keep_of
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import RMSNorm
from fmjax.nn.position import RopeScaling, Rotary, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.types import PyTree
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The fields of config.json that Llama and its siblings share."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = dataclasses.field(default=None, metadata={"saved": "set"})
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if problems := self.problems():
            family = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"{family} config: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the values; siblings add to it."""
        problems = [
            f"{name}={value} must be at least 1"
            for name, value in dataclasses.asdict(self).items()
            if name in SIZES and value is not None and value < 1
        ]
        if problems:
            return problems
        heads, groups = self.num_attention_heads, self.groups
        if self.head_dim is None and self.hidden_size % heads:
            problems.append(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}, "
                "and there is no head_dim"
            )
        if heads % groups:
            problems.append(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}"
            )
        if (self.rotary_size + 1) // 2 * 2 > self.head_size:
            problems.append(f"rotary positions need an even head size, not {self.head_size}")
        if not 0 <= self.attention_dropout < 1:
            problems.append(
                f"attention_dropout={self.attention_dropout} must be at least 0 and below 1"
            )
        if self.rope_theta <= 1:
            problems.append(f"rope_theta={self.rope_theta} must be above 1")
        if self.rope_scaling is not None:
            problems += self.rope_scaling.size_problems(self.rotary_size)
        pad, size = self.pad_token_id, self.vocab_size
        if pad is not None and not -size <= pad < size:
            problems.append(f"pad_token_id={pad} is outside the vocabulary of {size}")
        if self.act not in ACTIVATIONS:
            problems.append(f"the activation {self.act!r} is not one of {sorted(ACTIVATIONS)}")
        return problems

    @property
    def act(self) -> str:
        """The activation of the feed-forward's gate."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """G."""
        groups = self.num_key_value_heads
        return self.num_attention_heads if groups is None else groups

    @property
    def head_size(self) -> int:
        """K."""
        size = self.head_dim
        return self.hidden_size // self.num_attention_heads if size is None else size

    @property
    def rotary_size(self) -> int:
        """R, how many features of a head are rotated."""
        return self.head_size

    @property
    def scaling(self) -> RopeScaling | None:
        """How the rotary positions are stretched."""
        return self.rope_scaling

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return False

    @property
    def out_bias(self) -> bool:
        """Whether attention's output has a bias."""
        return False

    @property
    def feed_forward_bias(self) -> bool:
        """Whether the feed-forward's layers have biases."""
        return False

    @property
    def window(self) -> int | None:
        """How many keys a query of a sliding layer sees."""
        return None

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each layer, whether its window slides."""
        return (self.window is not None,) * self.num_hidden_layers


def layer_type_problems(layer_types: Sequence[str], config: DecoderConfig) -> list[str]:
    """What is wrong with config.json's ``layer_types``."""
    known = ("full_attention", "sliding_attention")
    problems = []
    if len(layer_types) != config.num_hidden_layers:
        problems.append(
            f"layer_types has {len(layer_types)} entries for num_hidden_layers="
            f"{config.num_hidden_layers}"
        )
    if unknown := sorted(set(layer_types) - {*known}):
        problems.append(f"layer_types has {unknown}; known are {known}")
    if config.window is None and "sliding_attention" in layer_types:
        problems.append("layer_types has sliding_attention, but there is no sliding_window")
    return problems


SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings sliding_window".split()
)


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias

    @property
    def feed_forward_bias(self) -> bool:
        return self.mlp_bias


MODEL_TYPE = "llama"
HEADS = {
    "model": "LlamaModel",
    "causal_lm": "LlamaForCausalLM",
    "sequence_classification": "LlamaForSequenceClassification",
    "token_classification": "LlamaForTokenClassification",
    "question_answering": "LlamaForQuestionAnswering",
}


def _llama1(layers: int, width: int, heads: int, inner: int) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=inner,
    )  # fmt: skip


def _llama2(layers: int, width: int, heads: int, inner: int, groups: int | None = None) -> Config:
    return dataclasses.replace(
        _llama1(layers, width, heads, inner), num_key_value_heads=groups,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip


def _llama3(layers: int, width: int, heads: int, inner: int, factor: float | None) -> Config:
    """Version 3.1 stretched the positions by `factor`; 3.2's small models are tied."""
    scaling = None
    if factor is not None:
        scaling = RopeScaling(
            "llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )  # fmt: skip
    return dataclasses.replace(
        _llama2(layers, width, heads, inner, 8),
        vocab_size=128256, rope_theta=500000.0, rope_scaling=scaling,
        max_position_embeddings=8192 if factor is None else 131072,
        tie_word_embeddings=factor == 32.0,
    )  # fmt: skip


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        rope_scaling=RopeScaling(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        attention_dropout=0.1, attention_bias=True, mlp_bias=True, pad_token_id=2,
    ),
    # Touvron et al. 2023, arXiv:2302.13971, table 2; inner widths of the released weights.
    "7b": _llama1(32, 4096, 32, 11008),
    "13b": _llama1(40, 5120, 40, 13824),
    "33b": _llama1(60, 6656, 52, 17920),
    "65b": _llama1(80, 8192, 64, 22016),
    # Touvron et al. 2023, arXiv:2307.09288, table 1; config.json of the released weights.
    "2-7b": _llama2(32, 4096, 32, 11008),
    "2-13b": _llama2(40, 5120, 40, 13824),
    "2-70b": _llama2(80, 8192, 64, 28672, 8),
    # Grattafiori et al. 2024, arXiv:2407.21783, table 3; config.json of the released weights. 3.3
    # is 3.1's 70 B.
    "3-8b": _llama3(32, 4096, 32, 14336, None),
    "3-70b": _llama3(80, 8192, 64, 28672, None),
    "3.1-8b": _llama3(32, 4096, 32, 14336, 8.0),
    "3.1-70b": _llama3(80, 8192, 64, 28672, 8.0),
    "3.1-405b": _llama3(126, 16384, 128, 53248, 8.0),
    "3.2-1b": _llama3(16, 2048, 32, 8192, 32.0),
    "3.2-3b": _llama3(28, 3072, 24, 8192, 32.0),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S], of layers that see everything before; None if there are none.
        local_mask: the same, of layers whose window slides.
        rotary: tables for the positions of the call.
        start: positions already in the cache.
    """

    mask: Mask | None
    local_mask: Mask | None
    rotary: Rotary
    start: Array | int


def of_layer(sliding: Sequence[bool], index: Array | int, full: PyTree, local: PyTree) -> PyTree:
    """`local` where the layer's window slides, `full` elsewhere; the index may be traced.

    Args:
        sliding: of each layer.
        index: the layer's number.
        full, local: trees of arrays of the same shapes, or masks; the one that no layer needs may
            be None. A mask chosen by a traced index is an array.
    """
    if all(sliding):
        return local
    if not any(sliding):
        return full
    if isinstance(index, int):
        return local if sliding[index] else full
    slides = jnp.array(sliding)[index]
    full, local = keep_of(full), keep_of(local)
    return jax.tree.map(lambda one, other: jnp.where(slides, one, other), local, full)


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    config: Any
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Initializer of kernels."""
        return nn.initializers.normal(self.config.initializer_range)

    def attention_fields(self) -> dict[str, Any]:
        """The fields of `fmjax.nn.attention.Attention`."""
        config = self.config
        return {
            "num_heads": config.num_attention_heads,
            "num_key_value_heads": config.groups,
            "head_dim": config.head_size,
            "use_bias": config.qkv_bias,
            "out_bias": config.out_bias,
            "dropout_rate": config.attention_dropout,
            "train": self.train,
            "with_probabilities": self.output_attentions,
            "kernel_init": self.kernel_init,
        }

    def rotary(self, index: Array | int, shared: Any) -> Rotary:
        """The rotary tables of a layer."""
        return shared.rotary

    def norm(self, name: str) -> nn.Module:
        """A norm over the width."""
        return RMSNorm(self.config.rms_norm_eps, name=name)

    def before(self, hidden: Array, name: str) -> Array:
        """What a sublayer reads, from the hidden state [B, T, D]; its norm is called `name`."""
        return self.norm(name)(hidden)

    def after(self, update: Array, name: str) -> Array:
        """What is added to the hidden state, from the sublayer's output [B, T, D]."""
        return update

    def feed_forward(self, x: Array) -> tuple[Array, Array | None]:
        """[B, T, D] -> [B, T, D], and the router's logits [B * T, E] where there are experts."""
        config = self.config
        mlp = Mlp(
            config.intermediate_size, config.act, self.kernel_init,
            use_bias=config.feed_forward_bias, gated=True, name="mlp",
        )  # fmt: skip
        return mlp(x), None

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Cache | None, index: Array | int, shared: Any
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        update, probabilities, cache = Attention(**self.attention_fields(), name="attn")(
            self.before(hidden, "norm_1"),
            mask=of_layer(self.config.sliding, index, shared.mask, shared.local_mask),
            rotary=self.rotary(index, shared),
            cache=cache,
            start=shared.start,
        )
        hidden = hidden + self.after(update, "norm_1")
        update, router_logits = self.feed_forward(self.before(hidden, "norm_2"))
        hidden = hidden + self.after(update, "norm_2")
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(cache, copy, probabilities, router_logits=router_logits)


class Embeddings(nn.Module):
    """Word vectors; positions are rotations."""

    config: Any

    def setup(self) -> None:
        config = self.config
        pad = config.pad_token_id
        self.word = Embed(
            config.vocab_size,
            config.hidden_size,
            nn.initializers.normal(config.initializer_range),
            None if pad is None else pad % config.vocab_size,
        )

    def __call__(self, ids: Array) -> Array:  # [B, T] -> [B, T, D]
        return self.word(ids)


class Model(Decoder):
    """Llama with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Any
    block = Block
    norm: ClassVar[type[nn.Module]] = RMSNorm

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.groups, self.config.head_size

    @property
    def classifier_dropout(self) -> float:
        return 0.1

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = self.norm(self.config.rms_norm_eps)
        super().setup()

    def embed_inputs(self, inputs: Inputs) -> Array:
        if inputs.input_ids is None:
            assert inputs.inputs_embeds is not None  # the frame has checked that there is one
            return inputs.inputs_embeds
        return self.embed(inputs.input_ids)

    def shared(self, inputs: Inputs, hidden: Array) -> PyTree:
        config = self.config
        return Shared(
            None if all(config.sliding) else inputs.mask(),
            inputs.mask(config.window) if any(config.sliding) else None,
            scaled_rotary(
                inputs.position_ids,
                config.rotary_size,
                config.rope_theta,
                config.scaling,
                max_positions=config.max_position_embeddings,
            ),
            inputs.start,
        )


inputs = token_inputs
from_tensors = config_alone
PREFIX = "model."
FIXED: dict[str, Any] = {}
# Frequencies that files of before 2023 keep; they follow from the config.
IGNORED = (r"rotary_emb\.inv_freq$",)


def attention_rules(config: Any) -> list[Rule]:
    """The projections of one layer's attention, named from the base model on."""
    return [
        rule
        for name, tensor in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
        for rule in dense_rules(
            f"layers_{{i}}/attn/{name}",
            f"layers.{{i}}.self_attn.{tensor}_proj",
            bias=config.out_bias if name == "out" else config.qkv_bias,
        )
    ]


def feed_forward_rules(config: Any) -> list[Rule]:
    """One layer's gated feed-forward, named from the base model on."""
    return [
        rule
        for name in ("gate", "up", "down")
        for rule in dense_rules(
            f"layers_{{i}}/mlp/{name}",
            f"layers.{{i}}.mlp.{name}_proj",
            bias=config.feed_forward_bias,
        )
    ]


def pre_norm_rules() -> list[Rule]:
    """One layer's two norms, named from the base model on."""
    return [
        *norm_rules("layers_{i}/norm_1", "layers.{i}.input_layernorm", bias=False),
        *norm_rules("layers_{i}/norm_2", "layers.{i}.post_attention_layernorm", bias=False),
    ]


def layer_rules(config: Any) -> list[Rule]:
    """All of one layer's, named from the base model on."""
    return [*attention_rules(config), *feed_forward_rules(config), *pre_norm_rules()]


def assemble(
    config: Any, head: str, layer: Sequence[Rule], *, answering: str = PREFIX
) -> list[Rule]:
    """A family's whole table.

    Args:
        config: the family's.
        head: a key of its HEADS.
        layer: the rules of one layer, named from the base model on.
        answering: the prefix of the base model in PyTorch's question answering, which some
            families call "transformer."; the other heads then read such a checkpoint too.
    """
    names = {"model": "", "question_answering": answering}
    body = names.get(head, PREFIX)
    # The names of other heads' checkpoints. `fmjax.weights.fit_prefix` adds and takes away PREFIX.
    other = "" if head == "question_answering" else answering
    others = () if answering == PREFIX else (other,)
    embedding = Rule("params/embed/word/embedding", "embed_tokens.weight")
    table = []
    for rule in [embedding, *layer, *norm_rules("final_norm", "norm", bias=False)]:
        named = tuple(body + tensor for tensor in rule.tensors)
        aliases = tuple(other + tensor for other in others for tensor in rule.tensors)
        if rule is embedding and config.tie_word_embeddings:
            aliases = (*aliases, "lm_head.weight")
        table.append(dataclasses.replace(rule, tensor=named, aliases=aliases))
    return table + decoder_head_rules(
        head, tied=config.tie_word_embeddings, token_classifier="score"
    )


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return assemble(config, head, layer_rules(config), answering="transformer.")
