"""GPT-Neo (Black et al. 2021, "GPT-Neo: Large Scale Autoregressive Language Modeling with
Mesh-Tensorflow", doi:10.5281/zenodo.5297715): GPT-2 with local attention in every other layer and
scores that are not scaled. HF "gpt_neo".
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
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules

AttentionTypes = tuple[tuple[tuple[str, ...] | int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = dataclasses.field(default=24, metadata={"also": ("num_hidden_layers",)})
    num_heads: int = dataclasses.field(default=16, metadata={"also": ("num_attention_heads",)})
    # Pairs of a pattern of "global" and "local" and how often it is repeated.
    attention_types: AttentionTypes = ((("global", "local"), 12),)
    # The same written out, which files have too; it is only compared.
    attention_layers: tuple[str, ...] | None = dataclasses.field(
        default=None, compare=False, metadata={"saved": False}
    )
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_heads", act="activation_function"
        )
        if not all(
            len(pair) == 2 and isinstance(pair[0], tuple) and isinstance(pair[1], int)
            for pair in self.attention_types
        ):
            problems.append(
                f"attention_types={self.attention_types} must be pairs of a list of types and how "
                "often it is repeated, as in [[['global', 'local'], 12]]"
            )
        else:
            kinds = self.kinds
            if len(kinds) != self.num_layers:
                problems.append(
                    f"attention_types={self.attention_types} are {len(kinds)} layers, not "
                    f"num_layers={self.num_layers}"
                )
            if unknown := set(kinds) - {"global", "local"}:
                problems.append(
                    f"attention_types has {sorted(unknown)}; layers are 'global' or 'local'"
                )
            if self.attention_layers not in (None, kinds):
                problems.append(
                    f"attention_layers={self.attention_layers} contradicts attention_types="
                    f"{self.attention_types}; delete one of them"
                )
        if problems:
            raise ValueError("gpt_neo config: " + "; ".join(problems))

    @property
    def kinds(self) -> tuple[str, ...]:
        """ "global" or "local" for every layer."""
        expanded: tuple[str, ...] = ()
        for pattern, times in self.attention_types:
            assert isinstance(pattern, tuple)
            assert isinstance(times, int)
            expanded += pattern * times
        return expanded

    @property
    def num_hidden_layers(self) -> int:
        """L, under the name that other families have for it."""
        return self.num_layers


MODEL_TYPE = "gpt_neo"
HEADS = {
    "model": "GPTNeoModel",
    "causal_lm": "GPTNeoForCausalLM",
    "sequence_classification": "GPTNeoForSequenceClassification",
    "token_classification": "GPTNeoForTokenClassification",
    "question_answering": "GPTNeoForQuestionAnswering",
}


def _sized(layers: int, width: int, heads: int) -> Config:
    return Config(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        attention_types=((("global", "local"), layers // 2),),
    )


VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, hidden_size=24, num_layers=2, num_heads=3,
        attention_types=((("global", "local"), 1),), window_size=3, intermediate_size=40,
        resid_dropout=0.1, embed_dropout=0.1, attention_dropout=0.1,
    ),
    # The config.json files of EleutherAI/gpt-neo-125m, -1.3B and -2.7B.
    "125m": _sized(12, 768, 12),
    "1.3b": _sized(24, 2048, 16),
    "2.7b": _sized(32, 2560, 20),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S], of the global layers.
        window: the same of the local layers.
        local: bool [L], which layers are local.
        start: positions already in the cache.
    """

    mask: Mask
    window: Mask
    local: Array
    start: Array | int


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

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(config.layer_norm_epsilon, name=name)(x)

        def drop(x: Array) -> Array:
            return Dropout(config.resid_dropout)(x, self.train)

        update, probabilities, cache = Attention(
            config.num_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=False,
            out_bias=True,
            scale=1.0,
            name="attn",
        )(
            norm("norm_1", hidden),
            mask=jnp.where(shared.local[index], shared.window.keep, shared.mask.keep),
            cache=cache,
            start=shared.start,
        )
        hidden = hidden + drop(update)
        inner = config.intermediate_size
        inner = 4 * config.hidden_size if inner is None else inner
        mlp = Mlp(inner, config.activation_function, init, name="mlp")
        hidden = hidden + drop(mlp(norm("norm_2", hidden)))
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Embeddings(nn.Module):
    """Word and position vectors; token types, where given, are looked up as words."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.word = Embed(config.vocab_size, config.hidden_size, init)
        self.position = Embed(config.max_position_embeddings, config.hidden_size, init)
        self.dropout = Dropout(config.embed_dropout)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = inputs.embedded(self.word) + self.position(inputs.position_ids)
        if inputs.extra["token_type_ids"] is not None:
            x = x + self.word(inputs.extra["token_type_ids"])
        return self.dropout(x, inputs.train)


class TypedDecoder(Decoder):
    """A decoder that takes token types too; its ``embed`` looks them up as words and adds them."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
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

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        inputs = self.check(input_ids, attention_mask, position_ids, inputs_embeds, cache, train)
        return self.run(
            inputs._replace(extra={"token_type_ids": token_type_ids}),
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )


class Model(TypedDecoder):
    """GPT-Neo with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.num_heads, self.config.hidden_size // self.config.num_heads

    @property
    def classifier_dropout(self) -> float:
        return self.config.classifier_dropout

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(self.config.layer_norm_epsilon)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        local = jnp.array([kind == "local" for kind in self.config.kinds])
        return Shared(
            inputs.mask(), inputs.mask(window=self.config.window_size), local, inputs.start
        )


inputs = token_inputs
from_tensors = config_alone
PREFIX = "transformer."
# What transformers once wrote into every GPT's config.json; this family has no such head.
SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}
FIXED = SUMMARY | {"is_encoder_decoder": False}
IGNORED = (r"\.attn\.attention\.(bias|masked_bias)$",)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}h.{{i}}", "layers_{i}"
    attention = f"{layer}.attn.attention"
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return [
        Rule("params/embed/word/embedding", f"{body}wte.weight", aliases=tied),
        Rule("params/embed/position/embedding", f"{body}wpe.weight"),
        *norm_rules("final_norm", f"{body}ln_f"),
        *norm_rules(f"{here}/norm_1", f"{layer}.ln_1"),
        *norm_rules(f"{here}/norm_2", f"{layer}.ln_2"),
        *dense_rules(f"{here}/attn/query", f"{attention}.q_proj", bias=False),
        *dense_rules(f"{here}/attn/key", f"{attention}.k_proj", bias=False),
        *dense_rules(f"{here}/attn/value", f"{attention}.v_proj", bias=False),
        *dense_rules(f"{here}/attn/out", f"{attention}.out_proj"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.c_fc"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.c_proj"),
        *decoder_head_rules(head, tied=config.tie_word_embeddings),
    ]
