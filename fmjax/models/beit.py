"""BEiT (Bao et al. 2021, arXiv:2106.08254): ViT with relative positions, layer scale and stochastic
depth, taught to name the visual tokens of masked patches. HF "beit".

Tables of relative positions are resampled for images of another size, as PyTorch does, in every
call. (For a config whose ``image_size`` is not square PyTorch takes the table of rows by columns
for one of columns by rows; we do not.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import vit
from fmjax.models.vit import inputs
from fmjax.nn.attention import Attention
from fmjax.nn.dropout import Dropout, DropPath, layer_rate
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.segmentation import FcnHead, Pyramid, UperHead
from fmjax.nn.stack import LayerOutput
from fmjax.nn.vision import Grid, ImageEmbeddings, grid_of, grid_offsets, pair, resize
from fmjax.types import Output
from fmjax.weights import (
    Rule,
    batch_norm_rules,
    conv_rules,
    dense_rules,
    norm_rules,
    permute,
)

__all__ = ["inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 8192
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4  # read by the task, not by the model
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255  # read by the task, not by the model
    # Which layers' outputs are segmented; None is the last one's, as for a backbone.
    out_indices: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"also": ("segmentation_indices",)}
    )
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if self.out_indices is None:
            object.__setattr__(self, "out_indices", (layers,))
        problems = []
        if self.auxiliary_num_convs < 1:
            problems.append(f"auxiliary_num_convs={self.auxiliary_num_convs} must be positive")
        if any(not -layers <= index <= layers for index in self.places):
            problems.append(f"out_indices={self.out_indices} must be of {layers} layers")
        vit.check_config(self, problems)

    @property
    def places(self) -> tuple[int, ...]:
        """`out_indices`, which are never None."""
        assert self.out_indices is not None
        return self.out_indices


MODEL_TYPE = "beit"
HEADS = {
    "model": "BeitModel",
    "masked_image_modeling": "BeitForMaskedImageModeling",
    "image_classification": "BeitForImageClassification",
    "semantic_segmentation": "BeitForSemanticSegmentation",
}


def _published(size: str, image_size: int = 224, **fields: Any) -> Config:
    if size == "large":
        fields |= {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096,
        }  # fmt: skip
    return Config(image_size=image_size, **fields)


OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
VARIANTS = {
    "tiny": Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4, use_mask_token=True, use_absolute_position_embeddings=True,
        use_relative_position_bias=True, use_shared_relative_position_bias=True,
        out_indices=(1, 2, 3, 4), pool_scales=(1, 2), auxiliary_channels=8,
        auxiliary_concat_input=True,
    ),
    # Bao et al. 2021, section 3 and appendix: ViT's base and large, pretrained with one table of
    # relative positions for all layers and fine-tuned with one each (Hugging Face's configs).
    "b16-pt22k": _published("base", use_mask_token=True, **SHARED),
    "l16-pt22k": _published("large", use_mask_token=True, **SHARED),
    "b16": _published("base", **OWN),
    "b16-384": _published("base", 384, **OWN),
    "l16": _published("large", **OWN),
    "l16-384": _published("large", 384, **OWN),
    "l16-512": _published("large", 512, **OWN),
    # Fine-tuned for ADE20k, from layers that are a third of the depth apart.
    "b16-640": _published("base", 640, out_indices=(3, 5, 7, 11), **OWN),
    "l16-640": _published("large", 640, out_indices=(7, 11, 15, 23), **OWN),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        grid: of the images' patches.
        bias: of the scores, [1, H, T, T], or None.
    """

    grid: Grid
    bias: Array | None


class RelativeBias(nn.Module):
    """A number a head for each offset of two patches, and three for pairs with the class token.

    Args:
        config: whose ``image_size`` the table is made for.
    """

    config: Config

    @nn.compact
    def __call__(self, grid: Grid) -> Array:  # -> [1, H, T, T]
        config, new = self.config, grid.size
        old = grid_of(pair(config.image_size), pair(config.patch_size))
        before, after = (((2 * rows - 1), (2 * columns - 1)) for rows, columns in (old, new))
        shape = (before[0] * before[1] + 3, config.num_attention_heads)
        table = parameter(self, "embedding", nn.initializers.zeros, shape)
        patches = resize(table[:-3].reshape(1, *before, -1), after)  # [1, rows, columns, H]
        table = jnp.concatenate([patches.reshape(-1, shape[1]), table[-3:]])
        index = np.pad(grid_offsets(new, new), ((1, 0), (1, 0)))  # [T, T]
        # The last three: the class token's view of patches, theirs of it, its own of itself.
        index[0, 1:], index[1:, 0], index[0, 0] = (len(table) - i for i in (3, 2, 1))
        return table[index].transpose(2, 0, 1)[None]


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm), each residual scaled."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        path = DropPath(layer_rate(config.drop_path_rate, index, config.num_hidden_layers))

        def leave(hidden: Array, update: Array, sublayer: int) -> Array:
            update = Dropout(config.hidden_dropout_prob)(update, self.train)
            if config.layer_scale_init_value > 0:
                ones = nn.initializers.constant(config.layer_scale_init_value)
                scale = parameter(self, f"scale_{sublayer}", ones, (config.hidden_size,))
                update = update * scale.astype(update.dtype)
            return hidden + path(update, self.train)

        bias = shared.bias
        if config.use_relative_position_bias:
            own = RelativeBias(config, name="relative_bias")(shared.grid)
            bias = own if bias is None else bias + own
        update, probabilities, _ = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_probs_dropout_prob,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            key_bias=False,
            name="attn",
        )(LayerNorm(config.layer_norm_eps, name="norm_1")(hidden), mask=None, bias=bias)
        hidden = leave(hidden, update, 1)
        x = LayerNorm(config.layer_norm_eps, name="norm_2")(hidden)
        update = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")(x)
        hidden = leave(hidden, update, 2)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(hidden_state=copy, attentions=probabilities)


class Model(vit.Model):
    """BEiT with one head; see `fmjax.nn.vision.VisionEncoder`.

    The head "semantic_segmentation" gives ``logits`` and, of the auxiliary head if there is one,
    ``auxiliary_logits``, [B, X, Y, C] of 4 times and once as many rows and columns as patches.
    """

    block = Block
    heads = HEADS

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        config = self.config
        return ImageEmbeddings(
            config.hidden_size,
            pair(config.image_size),
            pair(config.patch_size),
            self.kernel_init,
            nn.initializers.zeros,
            positions=config.use_absolute_position_embeddings,
            mask_shape=(1, 1) if config.use_mask_token else None,
            dropout_rate=config.hidden_dropout_prob,
            name="embed",
        )(pixel_values, masked, train)

    def shared(self, grid: tuple[int, int]) -> Shared:
        if not self.config.use_shared_relative_position_bias:
            return Shared(Grid(grid), None)
        bias = RelativeBias(self.config, name="relative_bias")(Grid(grid))
        return Shared(Grid(grid), bias)

    def finish(self, hidden: Array) -> Array:
        return hidden if self.config.use_mean_pooling else super().finish(hidden)

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        config = self.config
        if self.head == "semantic_segmentation":
            return Output()  # what it reads lies further down
        if self.head == "masked_image_modeling":
            x = LayerNorm(config.layer_norm_eps, name="head_norm")(hidden[:, 1:])
            logits = Dense(config.vocab_size, kernel_init=self.kernel_init, name="head")(x)
            return Output(logits=logits.astype(jnp.float32))
        if self.head == "image_classification":
            return Output(logits=self.classify("head", self.pool(hidden)))
        pooled = self.pool(hidden) if config.add_pooling_layer else None
        return Output(last_hidden_state=hidden, pooler_output=pooled)

    def pool(self, hidden: Array) -> Array:
        """The patches' mean, normed, or the class token: [B, T, D] -> [B, D]."""
        if not self.config.use_mean_pooling:
            return hidden[:, 0]
        mean = jnp.mean(hidden[:, 1:].astype(jnp.float32), axis=1).astype(hidden.dtype)
        return LayerNorm(self.config.layer_norm_eps, name="pooler_norm")(mean)

    def run(
        self,
        embedded: Array,
        grid: tuple[int, int],
        *,
        train: bool,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> Output:
        segments = self.head == "semantic_segmentation"
        out = super().run(
            embedded,
            grid,
            train=train,
            output_hidden_states=output_hidden_states or segments,
            output_attentions=output_attentions,
        )
        if not segments:
            return out
        assert out.hidden_states is not None
        logits, auxiliary = self.segment(out.hidden_states, grid, train)
        states = out.hidden_states if output_hidden_states else None
        return dataclasses.replace(
            out, logits=logits, auxiliary_logits=auxiliary, hidden_states=states
        )

    def segment(
        self, states: tuple[Array, ...], grid: tuple[int, int], train: bool
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """What the head, and the auxiliary ones if there are any, say of each pixel."""
        config, classes = self.config, len(self.config.id2label)
        if len(config.places) != 4:
            raise ValueError(
                f"beit's head 'semantic_segmentation' reads four layers, and the config has "
                f"out_indices={config.out_indices}; give four, such as (3, 5, 7, 11)"
            )
        # Index 1 is the embeddings, as PyTorch counts here.
        maps = [
            states[index - 1][:, 1:].reshape(-1, *grid, config.hidden_size)
            for index in config.places
        ]
        options = {"kernel_init": self.kernel_init, "train": train}
        maps = Pyramid(name="pyramid", **options)(maps)
        head = UperHead(config.hidden_size, classes, config.pool_scales, name="head", **options)
        if not config.use_auxiliary_head:
            return head(maps), None
        auxiliary = FcnHead(
            config.auxiliary_channels,
            classes,
            config.auxiliary_num_convs,
            config.auxiliary_concat_input,
            name="auxiliary_head",
            **options,
        )
        return head(maps), (auxiliary(maps[2]),)


PREFIX = "beit."
# What a backbone would give to another model.
BACKBONE = ("add_fpn", "out_features", "reshape_hidden_states", "stage_names")
FIXED = dict.fromkeys(BACKBONE, ...)
IGNORED = (r"relative_position_index$",)  # a constant that version 4 saved


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    if not config.use_mean_pooling:
        return config  # its pooler has no weights
    return vit.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    here, layer = "layers_{i}", f"{body}encoder.layer.{{i}}"
    embed, bias = f"{body}embeddings", "relative_position_bias.relative_position_bias_table"
    table = [
        Rule("params/embed/cls", f"{embed}.cls_token"),
        *conv_rules("embed/patch", f"{embed}.patch_embeddings.projection", bias=True),
        *(
            rule
            for rule in vit.layer_rules(here, layer, qkv_bias=True)
            if rule.param != f"params/{here}/attn/key/bias"
        ),
    ]
    if config.use_mask_token:
        table.append(Rule("params/embed/mask", f"{embed}.mask_token"))
    if config.use_absolute_position_embeddings:
        table.append(Rule("params/embed/position", f"{embed}.position_embeddings"))
    if config.use_shared_relative_position_bias:
        table.append(Rule("params/relative_bias/embedding", f"{body}encoder.{bias}"))
    if config.use_relative_position_bias:
        table.append(
            Rule(f"params/{here}/relative_bias/embedding", f"{layer}.attention.attention.{bias}")
        )
    if config.layer_scale_init_value > 0:
        table += [Rule(f"params/{here}/scale_{i}", f"{layer}.lambda_{i}") for i in (1, 2)]
    if not config.use_mean_pooling:
        table += norm_rules("final_norm", f"{body}layernorm")
    match head:
        case "masked_image_modeling":
            return table + norm_rules("head_norm", "layernorm") + dense_rules("head", "lm_head")
        case "semantic_segmentation":
            return table + segmentation_rules(config)
        case "image_classification":
            table += dense_rules("head", "classifier")
    if config.use_mean_pooling and config.add_pooling_layer:
        table += norm_rules("pooler_norm", f"{body}pooler.layernorm")
    return table


def segmentation_rules(config: Config) -> list[Rule]:
    """The pyramid and the two heads."""

    def layer(param: str, tensor: str) -> list[Rule]:
        return [
            *conv_rules(f"{param}/conv", f"{tensor}.conv"),
            *batch_norm_rules(f"{param}/norm", f"{tensor}.bn"),
        ]

    table = batch_norm_rules("pyramid/first_norm", "fpn1.1")
    for enlarge, tensor in (("first_1", "fpn1.0"), ("first_2", "fpn1.3"), ("second", "fpn2.0")):
        place = f"params/pyramid/{enlarge}"
        # A transposed convolution's [I, O, X, Y].
        table.append(Rule(f"{place}/kernel", f"{tensor}.weight", permute(2, 3, 0, 1)))
        table.append(Rule(f"{place}/bias", f"{tensor}.bias"))
    table += layer("head/pooled_out", "decode_head.bottleneck")
    table += layer("head/out", "decode_head.fpn_bottleneck")
    table += layer("head/pooled_{i}", "decode_head.psp_modules.{i}.1")
    table += layer("head/lateral_{i}", "decode_head.lateral_convs.{i}")
    table += layer("head/level_{i}", "decode_head.fpn_convs.{i}")
    table += conv_rules("head/classes", "decode_head.classifier", bias=True)
    if config.use_auxiliary_head:
        table += layer("auxiliary_head/layer_{i}", "auxiliary_head.convs.{i}")
        table += conv_rules("auxiliary_head/classes", "auxiliary_head.classifier", bias=True)
        if config.auxiliary_concat_input:
            table += layer("auxiliary_head/joined", "auxiliary_head.conv_cat")
    return table
