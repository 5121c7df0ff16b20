"""DeBERTa's second and third version (He et al. 2021, arXiv:2006.03654, appendix; He et al. 2023,
arXiv:2111.09543): logarithmic buckets of positions, projections shared by content and position, a
convolution beside the first layer. HF "deberta-v2".
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import deberta
from fmjax.models.deberta import FIXED, IGNORED, PREFIX, UNSAVED, from_tensors, inputs
from fmjax.nn.activation import activation
from fmjax.nn.dropout import Dropout
from fmjax.nn.encoder import Inputs, Shared
from fmjax.nn.mask import keep_of
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.weights import CONV1D, Rule, dense_rules, norm_rules

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(deberta.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    position_buckets: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    # It can only be hidden_size / num_attention_heads; PyTorch's default when it is not written.
    attention_head_size: int | None = dataclasses.field(default=None, metadata=UNSAVED)

    def complete(self) -> list[str]:
        problems = super().complete()
        if self.attention_head_size not in (None, self.hidden_size // self.num_attention_heads):
            problems.append(
                f"attention_head_size={self.attention_head_size} must be hidden_size / "
                f"num_attention_heads = {self.hidden_size}/{self.num_attention_heads}"
            )
        object.__setattr__(self, "attention_head_size", None)
        norms = {part.strip() for part in self.norm_rel_ebd.lower().split("|")}
        if not norms <= {"none", "layer_norm"}:
            problems.append(f"norm_rel_ebd={self.norm_rel_ebd!r} must be 'none' or 'layer_norm'")
        if "layer_norm" in norms and not self.relative_attention:
            problems.append("norm_rel_ebd='layer_norm' needs relative_attention=True")
        # Buckets grow from half their number to the last distance, which must lie beyond it.
        if self.position_buckets > 0 and not 4 <= self.position_buckets < 2 * self.max_distance - 2:
            problems.append(
                f"position_buckets={self.position_buckets} must be at least 4 and less than twice "
                f"the largest distance, {self.max_distance - 1}"
            )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            problems.append(f"conv_kernel_size={self.conv_kernel_size} must be odd")
        if self.conv_kernel_size > 0 and self.hidden_size % self.conv_groups:
            problems.append(f"conv_groups={self.conv_groups} must divide {self.hidden_size}")
        return problems

    @property
    def max_distance(self) -> int:
        """Relative positions, before they are put in buckets."""
        return super().relative_span

    @property
    def relative_span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets if self.position_buckets > 0 else self.max_distance

    @property
    def norm_relative(self) -> bool:
        """Whether the table of relative positions is normed."""
        return "layer_norm" in self.norm_rel_ebd.lower()


MODEL_TYPE = "deberta-v2"
HEADS = {
    **{head: name.replace("Deberta", "DebertaV2") for head, name in deberta.HEADS.items()},
    "multiple_choice": "DebertaV2ForMultipleChoice",
}
_SECOND = {
    "relative_attention": True, "pos_att_type": ("p2c", "c2p"), "position_biased_input": False,
    "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
_CONV = {"conv_kernel_size": 3, "conv_act": "gelu"}


def _sized(width: int, layers: int, vocabulary: int = 128100) -> Config:
    """Version 3 with heads of 64."""
    return Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        **_SECOND,
    )


# The sizes of microsoft's models on the hub; He et al. 2023, section 5 and table 2.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=32, type_vocab_size=2, conv_groups=2,
        **_SECOND | _CONV | {"position_buckets": 8, "position_biased_input": True},
    ),
    "xlarge": Config(**_SECOND, **_CONV),
    "xxlarge": Config(num_hidden_layers=48, **_SECOND, **_CONV),
    "v3-xsmall": _sized(384, 12),
    "v3-small": _sized(768, 6),
    "v3-base": _sized(768, 12),
    "v3-large": _sized(1024, 24),
    "mdeberta-v3-base": _sized(768, 12, 251000),
}  # fmt: skip


def log_buckets(length: int, buckets: int, max_position: int) -> np.ndarray:
    """Buckets of the distances -(length - 1) to length - 1, exact up to half of `buckets` and
    logarithmic beyond: int32 [2 * length - 1].

    In float32, as PyTorch has it, for where a distance lies on a border.
    """
    distance = np.arange(1 - length, length)
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
    slope = np.log(np.float32((max_position - 1) / middle))
    logarithm = np.ceil(np.log(far) / slope * np.float32(middle - 1)) + middle
    bucket = np.where(np.abs(distance) <= middle, distance, logarithm * np.sign(distance))
    return bucket.astype(np.int32)


class Block(deberta.Block):
    """DeBERTa's block; the first one adds the convolution of the embeddings."""

    def attend(
        self, x: Array, cache: None, index: Array | int, shared: Shared
    ) -> tuple[Array, Array | None, None]:
        attention = deberta.Disentangled(
            self.config,
            self.train,
            self.output_attentions,
            key_bias=True,
            position_key_bias=True,
            share=self.config.share_att_key,
            name="attn",
        )
        return *attention(x, keep_of(shared.mask), shared.extra["relative"]), None

    def close(self, hidden: Array, index: Array | int, shared: Shared) -> Array:
        if shared.extra["conv"] is None:
            return hidden
        update, scale, bias, keep = shared.extra["conv"]
        plain = LayerNorm(self.config.layer_norm_eps, use_scale=False, use_bias=False)
        # Scale and bias lie outside the layers, so they come as arrays.
        first = plain(hidden + update) * scale.astype(hidden.dtype) + bias.astype(hidden.dtype)
        return jnp.where(index == 0, first if keep is None else first * keep, hidden)


class Affine(nn.Module):
    """The scale and bias of a norm that is computed elsewhere, both [D]."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        scale = parameter(self, "scale", nn.initializers.ones, (self.width,))
        return scale, parameter(self, "bias", nn.initializers.zeros, (self.width,))


class Model(deberta.Model):
    """DeBERTa-v2 or -v3 with one head; see `fmjax.nn.encoder.Encoder`."""

    block = Block
    heads = HEADS

    def setup(self) -> None:
        super().setup()
        config = self.config
        if config.norm_relative:
            self.relative_norm = LayerNorm(config.layer_norm_eps)
        if config.conv_kernel_size > 0:
            self.conv = nn.Conv(
                config.hidden_size,
                (config.conv_kernel_size,),
                feature_group_count=config.conv_groups,
                kernel_init=nn.initializers.normal(config.initializer_range),
            )
            self.conv_norm = Affine(config.hidden_size)
            self.conv_dropout = Dropout(config.hidden_dropout_prob)

    def relative_rows(self, length: int) -> Array:
        config = self.config
        if config.position_buckets <= 0:
            return super().relative_rows(length)
        table = log_buckets(length, config.position_buckets, config.max_distance)
        place, span = jnp.arange(length), config.relative_span
        rows = jnp.asarray(np.clip(table + span, 0, 2 * span - 1))
        return rows[place[:, None] - place[None, :] + length - 1]

    def relative_vectors(self) -> Array:
        vectors = super().relative_vectors()
        return self.relative_norm(vectors) if self.config.norm_relative else vectors

    def shared(self, inputs: Inputs, embedded: Array) -> Shared:
        shared = super().shared(inputs, embedded)
        conv = None
        if self.config.conv_kernel_size > 0:
            keep = deberta.token_mask(inputs)
            keep = None if keep is None else keep[..., None].astype(embedded.dtype)  # [B, T, 1]
            x = self.conv(embedded)  # [B, T, D]
            x = x if keep is None else x * keep
            x = activation(self.config.conv_act)(self.conv_dropout(x, inputs.train))
            conv = (x, *self.conv_norm(), keep)
        return shared._replace(extra={**shared.extra, "conv": conv})


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    encoder = "encoder" if head == "model" else f"{PREFIX}encoder"
    layer, here = f"{encoder}.layer.{{i}}.attention.self", "layers_{i}/attn"
    table = deberta.body_rules(config, head)
    for name in ("query", "key", "value"):
        table += dense_rules(f"{here}/{name}", f"{layer}.{name}_proj")
    own = config.relative_attention and not config.share_att_key
    if own and "c2p" in config.kinds:
        table += dense_rules(f"{here}/position_key", f"{layer}.pos_key_proj")
    if own and "p2c" in config.kinds:
        table += dense_rules(f"{here}/position_query", f"{layer}.pos_query_proj")
    if config.norm_relative:
        table += norm_rules("relative_norm", f"{encoder}.LayerNorm")
    if config.conv_kernel_size > 0:
        table.append(Rule("params/conv/kernel", f"{encoder}.conv.conv.weight", CONV1D))
        table.append(Rule("params/conv/bias", f"{encoder}.conv.conv.bias"))
        table += norm_rules("conv_norm", f"{encoder}.conv.LayerNorm")
    return table + deberta.head_rules(config, head)
