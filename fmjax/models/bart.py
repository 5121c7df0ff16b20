"""BART (Lewis et al. 2019, arXiv:1910.13461): a post-norm Transformer encoder-decoder with learned
positions. HF "bart"; parent of mbart, marian, pegasus, blenderbot and blenderbot_small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention, empty_cache
from fmjax.nn.decoder import config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.seq2seq import (
    EncoderDecoder,
    Flags,
    Shared,
    Tokens,
    Words,
    cross_attention,
    cross_mask,
    own_cache,
    shift_right,
    stack_output,
    tokens,
)
from fmjax.nn.stack import LayerOutput, run_stack
from fmjax.types import Output, PyTree
from fmjax.weights import TRANSPOSE, Rule

EPSILON = 1e-5  # of every layer norm; no config.json names it


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

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
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    tie_word_embeddings: bool = True
    # Whether the vocabulary head adds this constant; the weights tell, and without it, it is 0.
    final_logits_bias: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1", "LABEL_2")

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
        init = nn.initializers.normal(config.init_std)
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

    def setup(self) -> None:
        config = self.config
        # The table has two more rows than positions: position t is row t + 2.
        self.position = Embed(
            config.max_position_embeddings + 2,
            config.d_model,
            nn.initializers.normal(config.init_std),
        )
        self.norm = LayerNorm(EPSILON)
        self.dropout = Dropout(config.dropout)

    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        return self.dropout(self.norm(words + self.position(positions + 2)), train)


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
    remat: bool

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


class Model(EncoderDecoder):
    """BART with one head; see `fmjax.nn.seq2seq.EncoderDecoder`.

    The head "causal_lm" is the decoder alone.
    """

    block: ClassVar[type[nn.Module]] = Block
    embeddings: ClassVar[type[nn.Module]] = Embeddings
    final_norm: ClassVar[bool] = False

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        config = self.config
        heads = config.decoder_attention_heads
        return config.decoder_layers, heads, config.d_model // heads

    def make_words(self, vocab_size: int) -> Words:
        """A table of word vectors."""
        config = self.config
        return Words(
            vocab_size,
            config.d_model,
            nn.initializers.normal(config.init_std),
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
            if self.head != "causal_lm":
                self.encoder_embed = self.make_words(self.config.vocab_size)

        def stack(decoder: bool) -> Stack:
            return Stack(
                self.config, decoder, self.block, self.embeddings, self.final_norm,
                self.scan, self.remat,
            )  # fmt: skip

        if self.head != "causal_lm":
            self.encoder = stack(False)
        self.decoder = stack(True)
        if self.head == "seq2seq_lm" and self.config.final_logits_bias:
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
        if self.head == "seq2seq_lm" and self.config.final_logits_bias:
            logits = logits + jax.lax.stop_gradient(self.logits_bias.value[0])
        return logits

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        encoder_outputs: Array | None = None,
        inputs_embeds: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        position_ids: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; see `fmjax.nn.seq2seq.EncoderDecoder`.

        The head "causal_lm" takes `input_ids` or `inputs_embeds`, `attention_mask` and `cache` as
        decoder-only models do (`fmjax.nn.decoder.Decoder`), and as the one head

        Args:
            position_ids: int [B, T]; None counts from 0, or from the cache's length.
            encoder_hidden_states: [B, S, D], for cross-attention.
            encoder_attention_mask: [B, S].

        Raises:
            ValueError: inputs that contradict each other, the head or the config.
        """
        alone = self.head == "causal_lm"
        refused = {
            "position_ids": (position_ids, False),
            "encoder_hidden_states": (encoder_hidden_states, False),
            "encoder_attention_mask": (encoder_attention_mask, False),
            "decoder_input_ids": (decoder_input_ids, True),
            "decoder_attention_mask": (decoder_attention_mask, True),
            "decoder_inputs_embeds": (decoder_inputs_embeds, True),
            "encoder_outputs": (encoder_outputs, True),
        }
        if names := [name for name, (x, of) in refused.items() if x is not None and of == alone]:
            raise ValueError(f"the head {self.head!r} does not take {', '.join(names)}")
        if not alone:
            return super().__call__(
                input_ids, attention_mask, decoder_input_ids, decoder_attention_mask,
                encoder_outputs, inputs_embeds, decoder_inputs_embeds, cache,
                train=train, output_hidden_states=output_hidden_states,
                output_attentions=output_attentions, output_logits=output_logits,
            )  # fmt: skip
        side = tokens(
            input_ids,
            inputs_embeds,
            attention_mask,
            Flags(train, output_hidden_states, output_attentions),
            prefix="",
            causal=True,
            cache=cache,
            max_positions=self.max_positions,
        )
        positions = side.positions() if position_ids is None else position_ids
        encoder_mask = cross_mask(encoder_attention_mask, None)
        shared = Shared(side.mask, side.start, encoder_hidden_states, encoder_mask)
        out = self.decoder(self.decoder_words(side), positions, side, shared, cache)
        if output_logits:
            assert out.last_hidden_state is not None  # every decoder has one
            logits = self.unembed(out.last_hidden_state)
            out = dataclasses.replace(out, logits=logits, last_hidden_state=None)
        return out

    def init_cache(
        self,
        batch_size: int,
        length: int,
        encoder_length: int | None = None,
        dtype: Any = jnp.float32,
    ) -> PyTree:
        """An empty cache; see `fmjax.nn.seq2seq.EncoderDecoder`.

        Args:
            batch_size: B.
            length: decoder positions there is room for.
            encoder_length: S of the encoder's states; the head "causal_lm" has none.
            dtype: of keys and values.
        """
        if (encoder_length is None) != (self.head == "causal_lm"):
            raise ValueError(
                f"encoder_length={encoder_length} for the head {self.head!r}: the head 'causal_lm' "
                "has none, all others need it"
            )
        if encoder_length is not None:
            return super().init_cache(batch_size, length, encoder_length, dtype)
        layers, heads, size = self.cache_shape
        return empty_cache(layers, (batch_size, heads, length, size), dtype=dtype, scan=self.scan)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    token = jnp.zeros((1, 1), jnp.int32)
    if head == "causal_lm":
        return {"input_ids": token, "encoder_hidden_states": jnp.zeros((1, 1, config.d_model))}
    return {"input_ids": token, "decoder_input_ids": token}


PREFIX = "model."
FIXED: dict[str, Any] = {
    # The head decides.
    "is_decoder": ...,
    "is_encoder_decoder": ...,
    "add_cross_attention": ...,
    # Old files, in which they are true of the family or never read.
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "normalize_before": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": 2,
    "force_bos_token_to_be_generated": ...,
    "classif_dropout": ...,
    "save_step": ...,
}
IGNORED = (r"(^|\.)(encoder|decoder)\.version$",)


def from_tensors(config: Any, head: str, names: Collection[str]) -> Any:
    """The config with what only the tensors' names tell: whether there is a bias of logits."""
    has_bias = head != "seq2seq_lm" or "final_logits_bias" in names
    return dataclasses.replace(config, final_logits_bias=has_bias)


def dense(param: str, tensor: str) -> list[Rule]:
    """A layer with kernel and bias."""
    return [
        Rule(f"params/{param}/kernel", f"{tensor}.weight", TRANSPOSE),
        Rule(f"params/{param}/bias", f"{tensor}.bias"),
    ]


def norm(param: str, tensor: str) -> list[Rule]:
    """A norm with scale and bias."""
    return [
        Rule(f"params/{param}/scale", f"{tensor}.weight"),
        Rule(f"params/{param}/bias", f"{tensor}.bias"),
    ]


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
        table += norm(f"{side}/embed/norm", f"{tensor}.layernorm_embedding")
    for name, theirs, before in attentions:
        for ours, projection in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            table += dense(f"{here}/{name}/{ours}", f"{layer}.{theirs}.{projection}_proj")
        table += norm(f"{here}/{before}", f"{layer}.{theirs}_layer_norm")
    table += dense(f"{here}/mlp/up", f"{layer}.fc1")
    table += dense(f"{here}/mlp/down", f"{layer}.fc2")
    table += norm(f"{here}/norm_2", f"{layer}.final_layer_norm")
    if final_norm:
        table += norm(f"{side}/final_norm", f"{tensor}.layer_norm")
    return table


def word_rules(config: Any, head: str, body: str, *, shared: bool) -> list[Rule]:
    """The tables of words.

    Args:
        config: the family's.
        head: a key of its HEADS.
        body: the prefix of the base model.
        shared: whether both sides have one table, which files know by many names; otherwise a file
            of transformers 4 has one tensor where ours are two.
    """
    common, encoder, decoder = (
        f"{body}{name}.weight"
        for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    if not shared:
        table = [Rule("params/decoder_embed/word/embedding", decoder, aliases=(common, *tied))]
        if head != "causal_lm":
            table.append(Rule("params/encoder_embed/word/embedding", encoder, copies=(common,)))
        return table
    if head == "causal_lm":
        return [Rule("params/embed/word/embedding", decoder, aliases=(common, encoder, *tied))]
    return [Rule("params/embed/word/embedding", common, aliases=(encoder, decoder, *tied))]


def head_rules(config: Any, head: str) -> list[Rule]:
    """What follows the decoder."""
    table = []
    if head in ("seq2seq_lm", "causal_lm") and not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "lm_head.weight", TRANSPOSE))
    if head == "seq2seq_lm" and config.final_logits_bias:
        table.append(Rule("buffers/final_logits_bias", "final_logits_bias"))
    if head == "sequence_classification":
        table += dense("head/dense", "classification_head.dense")
        table += dense("head/out", "classification_head.out_proj")
    if head == "question_answering":
        table += dense("head", "qa_outputs")
    return table


def sides(head: str) -> Sequence[str]:
    """Which stacks a head has."""
    return ("decoder",) if head == "causal_lm" else ("encoder", "decoder")


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = word_rules(config, head, body, shared=config.tie_word_embeddings)
    for side in sides(head):
        table += stack_rules(
            side, f"{body}{side}", positions=True, embedding_norm=True, final_norm=False
        )
    return table + head_rules(config, head)
