"""LongT5 (Guo et al. 2022, arXiv:2112.07916): T5 v1.1 whose encoder attends to near tokens, and
perhaps to the sums of blocks of tokens (transient-global attention). HF "longt5".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import t5
from fmjax.nn.attention import attend
from fmjax.nn.linear import Dense
from fmjax.nn.norm import RMSNorm
from fmjax.nn.position import relative_position_buckets
from fmjax.nn.sides import Shared, Tokens
from fmjax.types import PyTree
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(t5.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    local_radius: int = 127
    global_block_size: int = 16
    encoder_attention_type: str = "local"
    scale_decoder_outputs: bool | None = dataclasses.field(default=None, metadata={"saved": "set"})

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.encoder_attention_type not in ATTENTIONS:
            problems.append(
                f"encoder_attention_type={self.encoder_attention_type!r} must be one of "
                f"{list(ATTENTIONS)}"
            )
        return problems

    @property
    def scaled(self) -> bool:
        scale = self.scale_decoder_outputs
        return self.tie_word_embeddings if scale is None else scale

    @property
    def has_globals(self) -> bool:
        """Whether the encoder attends to sums of blocks too."""
        return self.encoder_attention_type == "transient-global"


# What PyTorch calls the encoder's attention.
ATTENTIONS = {"local": "LocalSelfAttention", "transient-global": "TransientGlobalSelfAttention"}
MODEL_TYPE = "longt5"
HEADS = {
    "model": "LongT5Model",
    "seq2seq_lm": "LongT5ForConditionalGeneration",
    "encoder": "LongT5EncoderModel",
}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
        local_radius=2, global_block_size=2, encoder_attention_type="transient-global",
    ),
    # Guo et al. 2022, section 4.1: T5 v1.1's sizes.
    **{
        f"{short}-{size}": config
        for short, kind in (("local", "local"), ("tglobal", "transient-global"))
        for size, config in t5.gated_sizes(Config, encoder_attention_type=kind).items()
        if size in ("base", "large") or (size, short) == ("xl", "tglobal")
    },
}  # fmt: skip


class Near(NamedTuple):
    """What every block of the encoder reads; N blocks of P tokens, G sums.

    Args:
        bias: of local scores, [1, H, P, 3P].
        mask: bool [B * N, 1, P, 3P].
        sum_bias: of scores of the sums, [B * N, H, P, G], or None.
        sum_mask: bool [B * N, 1, P, G], or None.
        members: which block each token is added to, [B, S, G], or None.
    """

    bias: Array
    mask: Array
    sum_bias: Array | None = None
    sum_mask: Array | None = None
    members: Array | None = None


def split(x: Array, size: int) -> Array:
    """[B, S, ...] -> [B, N, P, ...]: blocks of `size`, the last filled up with zeros."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def neighbours(x: Array) -> Array:
    """[B, N, P, ...] -> [B, N, 3P, ...]: each block with those before and behind it."""
    padded = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2))
    count = x.shape[1]
    return jnp.concatenate([padded[:, i : i + count] for i in range(3)], axis=2)


class NearAttention(nn.Module):
    """Attention to the tokens at most `local_radius` away, and to the sums of blocks.

    Args:
        config: LongT5's.
        fields: those of `fmjax.nn.attention.Attention` that it has in common.
    """

    config: Any
    fields: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, near: Near) -> tuple[Array, Array | None]:
        """[B, S, D] -> ([B, S, D], probabilities [B, N, H, P, 3P + G] or None)."""
        config, fields = self.config, self.fields
        batch, length, width = x.shape
        heads, size = config.num_heads, config.d_kv
        layers = {
            name: Dense(heads * size, False, fields[init], name=name)
            for name, init in (
                ("query", "query_init"), ("key", "kernel_init"), ("value", "kernel_init")
            )
        }  # fmt: skip

        def project(states: Array, name: str) -> Array:
            y = layers[name](states)
            return y.reshape(*y.shape[:-1], heads, size)  # [B, S, H, K]

        block = config.local_radius + 1
        query = split(project(x, "query"), block)  # [B, N, P, H, K]
        blocks = query.shape[1]
        keys = [neighbours(split(project(x, name), block)) for name in ("key", "value")]
        mask = near.mask
        bias = jnp.broadcast_to(near.bias, (batch * blocks, *near.bias.shape[1:]))
        if near.members is not None:
            assert near.sum_mask is not None  # they come together
            assert near.sum_bias is not None
            sums = jnp.einsum("BSG,BSD->BGD", near.members.astype(x.dtype), x)
            sums = RMSNorm(config.layer_norm_epsilon, name="sum_norm")(sums)
            wide = (batch, blocks, sums.shape[1], heads, size)
            keys = [
                jnp.concatenate(
                    [local, jnp.broadcast_to(project(sums, name)[:, None], wide)], axis=2
                )
                for local, name in zip(keys, ("key", "value"), strict=True)
            ]  # [B, N, 3P + G, H, K] each
            mask = jnp.concatenate([mask, near.sum_mask], axis=-1)
            bias = jnp.concatenate([bias, near.sum_bias], axis=-1)
        rate = fields["dropout_rate"]
        key, value = (jnp.swapaxes(_flat(states), 1, 2) for states in keys)  # [B * N, H, ., K]
        out, probabilities = attend(
            _flat(query),
            key,
            value,
            mask=mask,
            bias=bias,
            scale=1.0,
            rng=self.make_rng("dropout") if fields["train"] and rate > 0.0 else None,
            dropout_rate=rate,
            with_probabilities=fields["with_probabilities"],
        )  # [B * N, P, H, K]
        out = out.reshape(batch, blocks * block, heads * size)[:, :length]
        out = Dense(width, False, fields["kernel_init"], name="out")(out)  # [B, S, D]
        if probabilities is not None:
            probabilities = probabilities.reshape(batch, blocks, *probabilities.shape[1:])
        return out, probabilities


def _flat(x: Array) -> Array:
    """[B, N, ...] -> [B * N, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


class Block(t5.Block):
    """T5's block with the encoder's attention."""

    def attend(self, x: Array, cache: PyTree, shared: Any) -> tuple[Array, Any, Any]:
        attention = NearAttention(self.config, self.attention_fields(), name="attn")
        return *attention(x, shared), None


class Stack(t5.Stack):
    """The encoder."""

    block: ClassVar[type[nn.Module]] = Block

    def prepare(self, side: Tokens, shared: Shared) -> Any:
        config = self.config
        block = config.local_radius + 1
        real = jnp.ones((1, side.length), bool)
        if side.mask is not None:
            keep = side.mask.keep
            if keep.shape[2] != 1:
                raise ValueError("longt5's attention_mask must be [B, S]: its attention is local")
            real = keep[:, 0, 0]  # [B, S]
        words = side.ids if side.embeds is None else side.embeds
        assert words is not None  # `tokens` has checked that there is exactly one
        real = jnp.broadcast_to(real, (words.shape[0], side.length))
        near = jnp.arange(3 * block)[None, :] - block - jnp.arange(block)[:, None]  # [P, 3P]
        bias = jnp.moveaxis(self.bias_table()(self.buckets(near)), -1, 0)[None]  # [1, H, P, 3P]
        keys = neighbours(split(real, block))[:, :, None, :]  # [B, N, 1, 3P]
        mask = _flat((jnp.abs(near) < block)[None, None] & keys)[:, None]  # [B * N, 1, P, 3P]
        if not config.has_globals:
            return Near(bias, mask)
        ids, exists = sum_ids(real, config.global_block_size)
        count = exists.shape[1]
        members = ids[..., None] == jnp.arange(count)  # [B, S, G]
        relative = jnp.arange(count) - ids[..., None]  # [B, S, G]
        buckets = relative_position_buckets(
            relative,
            bidirectional=True,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        sum_bias = self.bias_table("sum_bias")(buckets)  # [B, S, G, H]
        sum_bias = jnp.moveaxis(_flat(split(sum_bias, block)), -1, 1)  # [B * N, H, P, G]
        visible = real[..., None] == exists[:, None, :]  # [B, S, G]
        visible = _flat(split(visible, block))[:, None]  # [B * N, 1, P, G]
        return Near(bias, mask, sum_bias, visible, members)


def sum_ids(real: Array, size: int) -> tuple[Array, Array]:
    """Which block's sum each token belongs to, and which sums there are.

    Blocks are counted by position; tokens behind the last whole block belong to that one.

    Args:
        real: bool [B, S], tokens that are no padding.
        size: tokens in a block.

    Returns:
        (int [B, S], -1 for padding and where there is no whole block; bool [B, S // size]).
    """
    positions = jnp.arange(real.shape[1])
    ids = jnp.where(real, positions // size, -1)
    ends = real & (positions % size == size - 1)
    ids = jnp.minimum(ids, ends.sum(axis=-1, keepdims=True) - 1)
    last = ids.max(axis=-1, keepdims=True)
    return ids, jnp.arange(real.shape[1] // size)[None] <= last


class Model(t5.Model):
    """LongT5 with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    encoder_stack = Stack


inputs = t5.inputs
PREFIX = t5.PREFIX
FIXED = {**t5.FIXED, "classifier_dropout": ..., "problem_type": ...}
IGNORED = t5.IGNORED


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether the output matrix is tied.

    Published files say untied, which means not scaled; some have a matrix and some have not.
    """
    if head == "seq2seq_lm" and not config.scaled:
        tied = "lm_head.weight" not in names
        scale = False if tied else None
        return dataclasses.replace(config, tie_word_embeddings=tied, scale_decoder_outputs=scale)
    return t5.from_tensors(config, head, names)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    attention = ATTENTIONS[config.encoder_attention_type]
    table = t5.outer_rules(config, head, "")
    table += t5.stack_rules(config, "encoder", "encoder", attention=attention)
    if config.has_globals:
        place = f"encoder.block.{{i}}.layer.0.{attention}"
        table += [
            Rule(
                "params/encoder/sum_bias/embedding",
                f"{place.format(i=0)}.global_relative_attention_bias.weight",
            ),
            Rule(
                "params/encoder/layers_{i}/attn/sum_norm/scale",
                f"{place}.global_input_layer_norm.weight",
            ),
        ]
    if head != "encoder":
        table += t5.stack_rules(config, "decoder", "decoder")
    return table
