"""DALL-E's transformer (Ramesh et al. 2021, arXiv:2102.12092, section 2.2 and appendix B): one
causal decoder over the tokens of a text and then those of an image, most layers of which see only a
part of the image. Our own names: no weights were published.

Token ids are in one space: the text's, then a padding token for each position of the text, then
the image's (`image_start` + code). A row has `text_length` ids of the first two kinds and after
them the image's, row by row. So `fmjax.generate` continues a text by an image; see
`fmjax.tasks.text_to_image`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.nn.attention import Attention
from fmjax.nn.checks import refuse
from fmjax.nn.decoder import Decoder, Inputs
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output, PyTree
from fmjax.weights import TRANSPOSE, Rule, dense_rules, norm_rules

PATTERNS = ("full", "row", "column", "conv")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      text_vocab_size: kinds of tokens of texts.
      text_length: positions of a text, shorter ones padded.
      image_vocab_size: codes of the image's tokenizer.
      grid_size: rows and columns of an image's tokens.
      attention_pattern: of each layer in turn, over again, what an image's token sees of the
        earlier ones: "full", all; "row", those up to the one above it; "column", those above it;
        "conv", those around it.
      last_attention: of the last layer.
      window: rows and columns of "conv".
    """

    text_vocab_size: int = 16384
    text_length: int = 256
    image_vocab_size: int = 8192
    grid_size: int = 32
    hidden_size: int = 3968
    num_hidden_layers: int = 64
    num_attention_heads: int = 62
    intermediate_size: int = 15872
    hidden_act: str = "gelu"
    attention_pattern: tuple[str, ...] = ("row", "column", "row", "row")
    last_attention: str = "conv"
    window: int = 11
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                problems.append(f"{field.name}={value} must be positive")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        kinds = (*self.attention_pattern, self.last_attention)
        if not self.attention_pattern or (unknown := sorted(set(kinds) - set(PATTERNS))):
            problems.append(
                f"attention_pattern={self.attention_pattern}, last_attention="
                f"{self.last_attention!r}: each is one of {PATTERNS}"
                + (f", not {unknown}" if self.attention_pattern else "")
            )
        if self.window % 2 == 0:
            problems.append(f"window={self.window} must be odd, with a token in its middle")
        refuse(self, problems)

    @property
    def image_start(self) -> int:
        """The id of the image's code 0."""
        return self.text_vocab_size + self.text_length

    @property
    def image_length(self) -> int:
        """Tokens of an image."""
        return self.grid_size**2

    @property
    def vocab_size(self) -> int:
        """Ids there are: texts', paddings' and images'."""
        return self.image_start + self.image_vocab_size

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each layer, the place of its pattern in `PATTERNS`."""
        pattern = self.attention_pattern
        names = [pattern[i % len(pattern)] for i in range(self.num_hidden_layers - 1)]
        return tuple(PATTERNS.index(name) for name in (*names, self.last_attention))


MODEL_TYPE = "dalle"
HEADS = {"model": "DalleModel", "causal_lm": "DalleForCausalLM"}
VARIANTS = {
    "tiny": Config(
        text_vocab_size=60, text_length=4, image_vocab_size=7, grid_size=3, hidden_size=12,
        num_hidden_layers=4, num_attention_heads=3, intermediate_size=20,
        attention_pattern=("row", "column", "full"), window=3,
    ),
    "12b": Config(),  # Ramesh et al. 2021, appendix B.1
}  # fmt: skip


def padded_ids(config: Config, texts: list[list[int]]) -> np.ndarray:
    """Texts' ids as the model takes them: int32 [B, text_length], each position's own padding.

    Args:
        config: the model's.
        texts: ids below ``text_vocab_size``; longer ones are cut.

    Raises:
        ValueError: an id outside the texts' vocabulary, or an empty text.
    """
    wrong = [
        number
        for number, ids in enumerate(texts)
        if not ids or min(ids) < 0 or max(ids) >= config.text_vocab_size
    ]
    if wrong:
        raise ValueError(
            f"the texts {wrong[:10]} are empty or have ids outside the {config.text_vocab_size} "
            "of texts"
        )
    places = config.text_vocab_size + np.arange(config.text_length, dtype=np.int32)
    rows = np.tile(places, (len(texts), 1))
    for row, ids in zip(rows, texts, strict=True):
        kept = ids[: config.text_length]
        row[: len(kept)] = kept
    return rows


class Shared(NamedTuple):
    """What every block reads.

    Args:
        masks: bool [4, B | 1, 1, T, S], one for each of `PATTERNS`.
        kinds: int [L], which of them is each layer's.
        start: positions already in the cache.
    """

    masks: Array
    kinds: Array
    start: Array | int


def sees(config: Config, query: Array, key: Array) -> Array:
    """Which positions see which: bool [4, ...], one for each of `PATTERNS` (figure 11).

    Texts see the texts before them and images the whole text, in every pattern.

    Args:
        config: the model's.
        query, key: positions int, broadcastable.
    """
    side, half = config.grid_size, config.window // 2
    distance = query - key  # of two tokens of the image, row by row
    earlier = distance >= 0
    text = key < config.text_length
    # Of the convolution, at most so many rows above and columns aside, around the edge too.
    rows, columns = (distance + half) // side, (distance + half) % side
    near = (columns <= 2 * half) & (rows <= half)
    patterns = (jnp.ones_like(earlier), distance <= side, distance % side == 0, near)
    return jnp.stack([earlier & (text | pattern) for pattern in patterns])


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
        last = nn.initializers.normal(
            config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        )

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(config.layer_norm_eps, name=name)(x)

        update, probabilities, cache = Attention(
            config.num_attention_heads,
            dropout_rate=config.dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            out_init=last,
            name="attn",
        )(
            norm("norm_1", hidden),
            mask=shared.masks[shared.kinds[index]],
            cache=cache,
            start=shared.start,
        )
        hidden = hidden + Dropout(config.dropout)(update, self.train)
        mlp = Mlp(config.intermediate_size, config.hidden_act, init, out_init=last, name="mlp")
        update = mlp(norm("norm_2", hidden))
        hidden = hidden + Dropout(config.dropout)(update, self.train)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(cache, copy, probabilities)


class Embeddings(nn.Module):
    """Tokens' vectors, and those of a text's positions or of an image's rows and columns."""

    config: Config

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(self.config.initializer_range)
        self.word = Embed(config.vocab_size, config.hidden_size, init)
        self.position = Embed(config.text_length, config.hidden_size, init)
        self.row = Embed(config.grid_size, config.hidden_size, init)
        self.column = Embed(config.grid_size, config.hidden_size, init)
        self.dropout = Dropout(config.dropout)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        config, places = self.config, inputs.position_ids
        place = jnp.clip(places - config.text_length, 0, config.image_length - 1)
        of_text = self.position(jnp.minimum(places, config.text_length - 1))
        of_image = self.row(place // config.grid_size) + self.column(place % config.grid_size)
        x = inputs.embedded(self.word)
        x = x + jnp.where((places < config.text_length)[..., None], of_text, of_image)
        return self.dropout(x, inputs.train)


class Model(Decoder):
    """DALL-E's transformer with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def max_positions(self) -> int:
        return self.config.text_length + self.config.image_length

    @property
    def cache_shape(self) -> tuple[int, int]:
        heads = self.config.num_attention_heads
        return heads, self.config.hidden_size // heads

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(self.config.layer_norm_eps)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> PyTree:
        config, mask = self.config, inputs.attention_mask
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {mask.shape}; this model takes [B, S]")
        keys = jnp.arange(inputs.capacity)[None]
        if mask is not None:  # with padding on the left, columns are not positions
            keys = jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1
        masks = sees(config, inputs.position_ids[:, :, None], keys[:, None, :])  # [4, B, T, S]
        if mask is not None:
            masks = masks & mask.astype(bool)[:, None, :]
        return Shared(masks[:, :, None], jnp.array(config.kinds), inputs.start)

    def head_output(self, hidden: Array, inputs: Inputs, output_logits: bool) -> Output:
        if self.head not in HEADS:
            raise ValueError(f"dalle has no head {self.head!r}; it has {list(HEADS)}")
        return super().head_output(hidden, inputs, output_logits)


PREFIX = "model."
FIXED: dict[str, Any] = {}
IGNORED = ()
inputs = token_inputs
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = [
        Rule(f"params/embed/{name}/embedding", f"{body}embed.{name}.weight")
        for name in ("word", "position", "row", "column")
    ]
    layer, tensor = "layers_{i}", f"{body}layers.{{i}}"
    for name in ("query", "key", "value", "out"):
        table += dense_rules(f"{layer}/attn/{name}", f"{tensor}.attn.{name}")
    for name in ("up", "down"):
        table += dense_rules(f"{layer}/mlp/{name}", f"{tensor}.mlp.{name}")
    for name in ("norm_1", "norm_2"):
        table += norm_rules(f"{layer}/{name}", f"{tensor}.{name}")
    table += norm_rules("final_norm", f"{body}final_norm")
    if head == "causal_lm" and not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "lm_head.weight", TRANSPOSE))
    return table
