"""BART (Lewis et al. 2019, arXiv:1910.13461): a post-norm Transformer encoder-decoder with learned
positions. HF "bart"; parent of mbart, marian, pegasus, blenderbot and blenderbot_small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.attention import Attention
from fmjax.nn.decoder import config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.seq2seq import WithDecoderAlone
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
from fmjax.weights import TRANSPOSE, Rule, dense_rules, norm_rules

EPSILON = 1e-5  # of every layer norm; no config.json names it


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """The fields of config.json that all siblings have, with BART's defaults (transformers 5)."""

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = dataclasses.field(default=1024, metadata={"also": ("hidden_size",)})
    encoder_layers: int = dataclasses.field(default=12, metadata={"also": ("num_hidden_layers",)})
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = dataclasses.field(
        default=16, metadata={"also": ("num_attention_heads",)}
    )
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="d_model", heads="encoder_attention_heads", act="activation_function"
        )
        if self.decoder_attention_heads > 0 and self.d_model % self.decoder_attention_heads:
            problems.append(
                f"d_model={self.d_model} is not a multiple of "
                f"decoder_attention_heads={self.decoder_attention_heads}"
            )
        if problems:
            family = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"{family} config: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Config(PairConfig):
    """BART's fields."""

    classifier_dropout: float = 0.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1", "LABEL_2")


MODEL_TYPE = "bart"
HEADS = {
    "model": "BartModel",
    "seq2seq_lm": "BartForConditionalGeneration",
    "sequence_classification": "BartForSequenceClassification",
    "question_answering": "BartForQuestionAnswering",
    "causal_lm": "BartForCausalLM",
}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
        scale_embedding=True,
    ),
    # Lewis et al. 2019, sections 2.1 and 5.
    "base": Config(
        d_model=768, encoder_layers=6, encoder_ffn_dim=3072, encoder_attention_heads=12,
        decoder_layers=6, decoder_ffn_dim=3072, decoder_attention_heads=12,
    ),
    "large": Config(),
}  # fmt: skip


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, feed-forward; each with residual and norm.

    Post-norm; a pre-norm family overrides `enter` and `leave`.
    """

    config: Any
    decoder: bool
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    key_bias: ClassVar[bool] = True

    def kernel_init(self) -> Callable[..., Array]:
        """Initializer of the kernels."""
        return nn.initializers.normal(self.config.init_std)

    def enter(self, name: str, hidden: Array) -> Array:
        """What a sublayer reads."""
        return hidden

    def leave(self, name: str, hidden: Array, update: Array) -> Array:
        """The hidden state after a sublayer."""
        return LayerNorm(EPSILON, name=name)(hidden + self.drop(update))

    def drop(self, x: Array) -> Array:
        """The dropout of residual updates."""
        return Dropout(self.config.dropout)(x, self.train)

    @nn.compact
    def __call__(
        self, hidden: Array, cache: PyTree, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config, before = self.config, hidden
        init = self.kernel_init()
        heads, width, layerdrop = (
            (config.decoder_attention_heads, config.decoder_ffn_dim, config.decoder_layerdrop)
            if self.decoder
            else (config.encoder_attention_heads, config.encoder_ffn_dim, config.encoder_layerdrop)
        )

        def attention(name: str) -> Attention:
            return Attention(
                heads,
                dropout_rate=config.attention_dropout,
                train=self.train,
                with_probabilities=self.output_attentions,
                kernel_init=init,
                key_bias=self.key_bias,
                name=name,
            )

        update, probabilities, new_cache = attention("attn")(
            self.enter("norm_1", hidden),
            mask=shared.mask,
            cache=own_cache(cache),
            start=shared.start,
        )
        hidden = self.leave("norm_1", hidden, update)
        crossed = None
        if self.decoder and (shared.encoder is not None or isinstance(cache, dict)):
            update, crossed, kept = cross_attention(
                attention("cross_attn"), self.enter("norm_cross", hidden), shared, cache
            )
            hidden = self.leave("norm_cross", hidden, update)
            if isinstance(cache, dict):
                new_cache = {"self": new_cache, "cross": kept}
        mlp = Mlp(
            width,
            config.activation_function,
            init,
            dropout_rate=config.activation_dropout,
            train=self.train,
            name="mlp",
        )
        hidden = self.leave("norm_2", hidden, mlp(self.enter("norm_2", hidden)))
        if self.train and layerdrop > 0.0:  # Fan et al. 2019, arXiv:1909.11556
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - layerdrop)
            hidden = jnp.where(keep, hidden, before)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(new_cache, copy, probabilities, crossed)


class Embeddings(nn.Module):
    """Learned positions, added to word vectors; norm and dropout."""

    config: Any

    offset: ClassVar[int] = 2  # the row of the first position; the rows before it are not used

    def setup(self) -> None:
        config = self.config
        self.position = Embed(
            config.max_position_embeddings + self.offset,
            config.d_model,
            nn.initializers.normal(config.init_std),
        )
        self.norm = LayerNorm(EPSILON)
        self.dropout = Dropout(config.dropout)

    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        return self.dropout(self.norm(words + self.position(positions + self.offset)), train)


class Stack(nn.Module):
    """One side: embeddings, blocks, perhaps a last norm.

    Args:
        config: the family's.
        decoder: whether it is the decoder.
        block, embeddings: the family's modules.
        final_norm: whether a norm follows the last block.
        scan, remat: see `fmjax.nn.stack.run_stack`.
    """

    config: Any
    decoder: bool
    block: type[nn.Module]
    embeddings: type[nn.Module]
    final_norm: bool
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(
        self, words: Array, positions: Array, side: Tokens, shared: Shared, cache: PyTree
    ) -> Output:
        """[B, T, D] of words -> the side's states."""
        config = self.config
        embedded = self.embeddings(config, name="embed")(words, positions, side.train)
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
            shared,
            num_layers=config.decoder_layers if self.decoder else config.encoder_layers,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
        )
        hidden = stack.hidden
        if self.final_norm:
            hidden = LayerNorm(EPSILON, name="final_norm")(hidden)
        return stack_output(side, embedded, stack, hidden)


class Model(WithDecoderAlone):
    """BART with one head; see `fmjax.nn.seq2seq.WithDecoderAlone`."""

    block: ClassVar[type[nn.Module]] = Block
    embeddings: ClassVar[type[nn.Module]] = Embeddings
    decoder_embeddings: ClassVar[type[nn.Module] | None] = None  # None is as `embeddings`
    final_norm: ClassVar[bool] = False
    has_logits_bias: ClassVar[bool] = True

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        config = self.config
        heads = config.decoder_attention_heads
        return config.decoder_layers, heads, config.d_model // heads

    @property
    def word_init(self) -> Callable[..., Array]:
        """Initializer of the tables of words."""
        return nn.initializers.normal(self.config.init_std)

    def make_words(self, vocab_size: int) -> Words:
        """A table of word vectors."""
        config = self.config
        return Words(
            vocab_size,
            config.d_model,
            self.word_init,
            config.pad_token_id,
            math.sqrt(config.d_model) if config.scale_embedding else 1.0,
        )

    @property
    def shared_words(self) -> bool:
        """Whether both sides have one table of words; untied, they have none in common."""
        return self.config.tie_word_embeddings

    @property
    def decoder_vocab_size(self) -> int:
        """V of the decoder."""
        return self.config.vocab_size

    @property
    def word(self) -> Embed:
        return self.embed.word if self.shared_words else self.decoder_embed.word

    def setup(self) -> None:
        if self.shared_words:
            self.embed = self.make_words(self.config.vocab_size)
        else:
            self.decoder_embed = self.make_words(self.decoder_vocab_size)
            if not self.alone:
                self.encoder_embed = self.make_words(self.config.vocab_size)

        def stack(decoder: bool) -> Stack:
            embeddings = self.decoder_embeddings if decoder else None
            return Stack(
                self.config, decoder, self.block, embeddings or self.embeddings, self.final_norm,
                self.scan, self.remat,
            )  # fmt: skip

        if not self.alone:
            self.encoder = stack(False)
        self.decoder = stack(True)
        if self.head == "seq2seq_lm" and self.has_logits_bias:
            # A constant of the file, no parameter: PyTorch does not train it either.
            self.logits_bias = self.variable(
                "buffers", "final_logits_bias", jnp.zeros, (1, self.word.num_embeddings)
            )
        super().setup()

    def encoder_words(self, side: Tokens) -> Array:
        """[B, S, D]: the encoder's word vectors."""
        return self.embed(side) if self.shared_words else self.encoder_embed(side)

    def decoder_words(self, side: Tokens) -> Array:
        """[B, T, D]: the decoder's word vectors."""
        return self.embed(side) if self.shared_words else self.decoder_embed(side)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "decoder_input_ids are not given and the config has no decoder_start_token_id to "
                "make them of input_ids"
            )
        return shift_right(input_ids, start)

    def run_encoder(self, side: Tokens) -> Output:
        words = self.encoder_words(side)
        return self.encoder(words, side.positions(), side, Shared(side.mask), None)

    def run_decoder(
        self, side: Tokens, encoder: Array | None, encoder_mask: Array | None, cache: PyTree
    ) -> Output:
        shared = Shared(side.mask, side.start, encoder, encoder_mask)
        return self.decoder(self.decoder_words(side), side.positions(), side, shared, cache)

    def unembed(self, hidden: Array) -> Array:
        logits = super().unembed(hidden)
        if self.head == "seq2seq_lm" and self.has_logits_bias:
            logits = logits + jax.lax.stop_gradient(self.logits_bias.value[0])
        return logits


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    token = jnp.zeros((1, 1), jnp.int32)
    if head == "causal_lm":
        return {"input_ids": token, "encoder_hidden_states": jnp.zeros((1, 1, config.d_model))}
    return {"input_ids": token, "decoder_input_ids": token}


PREFIX = "model."
# Keys of old files that PyTorch does not read either; is_decoder and its like follow the head.
FIXED: dict[str, Any] = dict.fromkeys(
    """
    add_bias_logits add_cross_attention add_final_layer_norm classif_dropout
    do_blenderbot_90_layernorm extra_layer_norm extra_pos_embeddings force_bos_token_to_be_generated
    is_decoder is_encoder_decoder layernorm_variant normalize_before normalize_embedding save_step
    static_position_embeddings unk_token_id
    """.split(),
    ...,
)
IGNORED = (r"(^|\.)(encoder|decoder)\.version$",)
from_tensors = config_alone


def stack_rules(
    side: str, tensor: str, *, positions: bool, embedding_norm: bool, final_norm: bool
) -> list[Rule]:
    """One side's parameters.

    Args:
        side: "encoder" or "decoder".
        tensor: what its tensors' names start with.
        positions: whether it has a table of positions.
        embedding_norm: whether the embeddings are normed.
        final_norm: whether a norm follows the last block.
    """
    layer, here = f"{tensor}.layers.{{i}}", f"{side}/layers_{{i}}"
    attentions = [("attn", "self_attn", "norm_1")]
    if side == "decoder":
        attentions.append(("cross_attn", "encoder_attn", "norm_cross"))
    table = []
    if positions:
        table.append(
            Rule(f"params/{side}/embed/position/embedding", f"{tensor}.embed_positions.weight")
        )
    if embedding_norm:
        table += norm_rules(f"{side}/embed/norm", f"{tensor}.layernorm_embedding")
    for name, theirs, before in attentions:
        for ours, projection in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            table += dense_rules(f"{here}/{name}/{ours}", f"{layer}.{theirs}.{projection}_proj")
        table += norm_rules(f"{here}/{before}", f"{layer}.{theirs}_layer_norm")
    table += dense_rules(f"{here}/mlp/up", f"{layer}.fc1")
    table += dense_rules(f"{here}/mlp/down", f"{layer}.fc2")
    table += norm_rules(f"{here}/norm_2", f"{layer}.final_layer_norm")
    if final_norm:
        table += norm_rules(f"{side}/final_norm", f"{tensor}.layer_norm")
    return table


def word_rules(
    config: Any, head: str, body: str, *, shared: bool, third: bool = True
) -> list[Rule]:
    """The tables of words.

    Args:
        config: the family's.
        head: a key of its HEADS.
        body: the prefix of the base model.
        shared: whether both sides have one table, which files know by many names; otherwise a file
            of transformers 4 has one tensor where ours are two.
        third: whether PyTorch keeps a common table, unused, where it is not shared.
    """
    common, encoder, decoder = (
        f"{body}{name}.weight"
        for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    if not shared:
        table = [Rule("params/decoder_embed/word/embedding", decoder, aliases=(common, *tied))]
        if head != "causal_lm":
            table.append(
                Rule("params/encoder_embed/word/embedding", encoder, copies=(common,) * third)
            )
        return table
    if head == "causal_lm":
        return [Rule("params/embed/word/embedding", decoder, aliases=(common, encoder, *tied))]
    return [Rule("params/embed/word/embedding", common, aliases=(encoder, decoder, *tied))]


def head_rules(config: Any, head: str, vocab_size: int) -> list[Rule]:
    """What follows the decoder, whose vocabulary has `vocab_size` tokens."""
    table = []
    if head in ("seq2seq_lm", "causal_lm") and not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "lm_head.weight", TRANSPOSE))
    if head == "seq2seq_lm":
        none = partial(np.zeros, (1, vocab_size), np.float32)
        table.append(Rule("buffers/final_logits_bias", "final_logits_bias", default=none))
    if head == "sequence_classification":
        table += dense_rules("head/dense", "classification_head.dense")
        table += dense_rules("head/out", "classification_head.out_proj")
    if head == "question_answering":
        table += dense_rules("head", "qa_outputs")
    return table


def sides(head: str) -> Sequence[str]:
    """Which stacks a head has."""
    return ("decoder",) if head == "causal_lm" else ("encoder", "decoder")


def all_rules(
    config: Any,
    head: str,
    *,
    positions: bool = True,
    embedding_norm: bool = True,
    final_norm: bool = False,
) -> list[Rule]:
    """The table of a sibling with these of BART's modules; see `stack_rules`."""
    body = "" if head == "model" else PREFIX
    table = word_rules(config, head, body, shared=config.tie_word_embeddings)
    for side in sides(head):
        table += stack_rules(
            side,
            f"{body}{side}",
            positions=positions,
            embedding_norm=embedding_norm,
            final_norm=final_norm,
        )
    return table + head_rules(config, head, config.vocab_size)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return all_rules(config, head)
