"""DETR (Carion et al. 2020, arXiv:2005.12872): a ResNet's features, a Transformer, and a decoder
whose queries become the objects of an image. HF "detr".

The backbone's batch normalisation is frozen. A model cloned with ``moving=True`` has its statistics
move in training, as one from random weights needs; what is saved is the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, resnet
from fmjax.nn.activation import ACTIVATIONS
from fmjax.nn.attention import Attention
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import FrozenBatchNorm, LayerNorm, layer_norm
from fmjax.nn.parameter import parameter
from fmjax.nn.stack import LayerOutput, StackOutput, run_stack
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, PyTree, Remat
from fmjax.weights import (
    CONV2D,
    Rule,
    dense_rules,
    nested_rules,
    norm_rules,
)

EPSILON = 1e-5  # of every layer norm; no config.json names it
MOST_ROWS = 50  # and columns, of learned positions
TEMPERATURE = 10_000


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        backbone_config: a `resnet.Config` or a `resnet.TimmBackbone`; None is timm's that
            `backbone` names, dilated with `dilation`.
        dilation: of the last stage of a timm backbone ("DC5").
        auxiliary_loss: as in transformers, whether the decoder's last norm stands between its
            layers too, which changes what the model computes. To train with losses of all layers
            (Carion et al. 2020, section 3.2) it need not be set: see
            `fmjax.tasks.object_detection.loss`.
    """

    backbone_config: Any = dataclasses.field(
        default=None, metadata={"read": resnet.read_backbone, "write": resnet.write_backbone}
    )
    backbone: str | None = dataclasses.field(default=None, metadata={"saved": False})
    num_channels: int = 3
    num_queries: int = 100
    encoder_layers: int = dataclasses.field(default=6, metadata={"also": ("num_hidden_layers",)})
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = dataclasses.field(
        default=8, metadata={"also": ("num_attention_heads",)}
    )
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    activation_function: str = "relu"
    d_model: int = dataclasses.field(default=256, metadata={"also": ("hidden_size",)})
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    init_xavier_std: float = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: str = "sine"
    dilation: bool | None = False
    class_cost: int = 1
    bbox_cost: int = 5
    giou_cost: int = 2
    mask_loss_coefficient: int = 1
    dice_loss_coefficient: int = 1
    bbox_loss_coefficient: int = 5
    giou_loss_coefficient: int = 2
    eos_coefficient: float = 0.1
    problem_type: str | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if self.backbone_config is None:
            stride = 16 if self.dilation else None
            made = resnet.TimmBackbone(self.backbone or "resnet50", self.num_channels, stride)
            object.__setattr__(self, "backbone_config", made)
        object.__setattr__(self, "backbone", None)  # said by backbone_config
        problems = resnet.backbone_problems(self.backbone_config, bool(self.dilation))
        if self.activation_function not in ACTIVATIONS:
            problems.append(
                f"activation_function={self.activation_function!r} is not known; use one of "
                f"{list(ACTIVATIONS)}"
            )
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if (number := getattr(self, heads)) < 1 or self.d_model % number:
                problems.append(f"d_model={self.d_model} is not a multiple of {heads}={number}")
        if self.position_embedding_type not in ("sine", "learned"):
            problems.append(
                f"position_embedding_type={self.position_embedding_type!r} must be 'sine' or "
                "'learned'"
            )
        if self.d_model % 4:
            problems.append(f"d_model={self.d_model} must divide by 4, for the positions")
        for name in ("num_queries", "encoder_layers", "decoder_layers", "d_model"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        refuse(self, problems)

    @property
    def resnet(self) -> resnet.Config:
        """The backbone's sizes."""
        return resnet.sizes_of(self.backbone_config)


MODEL_TYPE = "detr"
HEADS = {"model": "DetrModel", "object_detection": "DetrForObjectDetection"}
VARIANTS = {
    "tiny": Config(
        backbone_config=resnet.Config(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 2)),
        num_queries=5, encoder_layers=2, encoder_ffn_dim=24, encoder_attention_heads=2,
        decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=4, d_model=16,
    ),
    # Carion et al. 2020, table 1 and section 4.
    "resnet-50": Config(),
    "resnet-101": Config(backbone="resnet101"),
    "resnet-50-dc5": Config(dilation=True),
    "resnet-101-dc5": Config(backbone="resnet101", dilation=True),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B, 1, 1, S], which places are of the image.
        positions: [B, S, D], of the places.
        encoder: [B, S, D], the encoder's states, for the decoder.
        queries: [1, N, D], positions of the decoder's queries.
        norm: scale and bias [D] of a norm behind every block, or None.
    """

    mask: Array
    positions: Array
    encoder: Array | None = None
    queries: Array | None = None
    norm: tuple[Array, Array] | None = None


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward; each with residual and norm.

    Queries and keys have positions, values have none.
    """

    config: Config
    decoder: bool
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: PyTree, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        heads, width = (
            (config.decoder_attention_heads, config.decoder_ffn_dim)
            if self.decoder
            else (config.encoder_attention_heads, config.encoder_ffn_dim)
        )

        def attend(name: str, x: Array, keys: Array, values: Array, mask: Array | None) -> Any:
            layer = Attention(
                heads,
                dropout_rate=config.attention_dropout,
                train=self.train,
                with_probabilities=self.output_attentions,
                kernel_init=xavier(config),
                name=name,
            )
            update, probabilities, _ = layer(x, keys=keys, others=values, mask=mask)
            return update, probabilities

        def leave(name: str, hidden: Array, update: Array) -> Array:
            update = Dropout(config.dropout)(update, self.train)
            return LayerNorm(EPSILON, name=name)(hidden + update)

        own = shared.positions if shared.queries is None else shared.queries
        placed = hidden + own
        mask = None if self.decoder else shared.mask
        update, probabilities = attend("attn", placed, placed, hidden, mask)
        hidden = leave("norm_1", hidden, update)
        crossed = None
        if shared.encoder is not None:
            update, crossed = attend(
                "cross_attn",
                hidden + own,
                shared.encoder + shared.positions,
                shared.encoder,
                shared.mask,
            )
            hidden = leave("norm_cross", hidden, update)
        mlp = Mlp(
            width,
            config.activation_function,
            xavier(config),
            dropout_rate=config.activation_dropout,
            train=self.train,
            name="mlp",
        )
        hidden = leave("norm_2", hidden, mlp(hidden))
        copy = hidden if self.output_hidden_states else None
        if shared.norm is not None:
            hidden = layer_norm(hidden, *shared.norm, EPSILON)
        return hidden, LayerOutput(None, copy, probabilities, crossed)


def xavier(config: Config) -> Callable[..., Array]:
    """Initializer of the Transformer's kernels (Carion et al. 2020, section 4)."""
    return nn.initializers.variance_scaling(config.init_xavier_std**2, "fan_avg", "uniform")


class Side(nn.Module):
    """The encoder, or the decoder with its last norm.

    Args:
        config, scan, remat: see `Model`.
        decoder: whether it is the decoder.
        train, output_hidden_states, output_attentions: of the call.
    """

    config: Config
    decoder: bool
    scan: bool
    remat: Remat
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(self, hidden: Array, shared: Shared) -> tuple[StackOutput, Any]:
        """[B, T, D] -> the blocks' outputs and, of the decoder, its norm: [.., D] -> [.., D]."""
        config = self.config
        norm = None
        if self.decoder:
            init = nn.initializers
            scale = parameter(self, "norm_scale", init.ones, (config.d_model,))
            bias = parameter(self, "norm_bias", init.zeros, (config.d_model,))
            norm = partial(layer_norm, scale=scale, bias=bias, epsilon=EPSILON)
            if config.auxiliary_loss:
                shared = shared._replace(norm=(scale, bias))
        stack = run_stack(
            Block,
            {
                "config": config,
                "decoder": self.decoder,
                "train": self.train,
                "output_hidden_states": self.output_hidden_states,
                "output_attentions": self.output_attentions,
            },
            hidden,
            shared,
            num_layers=config.decoder_layers if self.decoder else config.encoder_layers,
            scan=self.scan,
            remat=self.remat,
        )
        return stack, norm


class BoxHead(nn.Module):
    """A box of each query's state: [..., D] -> [..., 4], from 0 to 1."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.config.init_std)
        for number in range(2):
            x = jax.nn.relu(Dense(x.shape[-1], kernel_init=init, name=f"dense_{number}")(x))
        x = Dense(4, kernel_init=init, name="out")(x)
        return jax.nn.sigmoid(x.astype(jnp.float32))


class Model(nn.Module):
    """DETR with one head.

    Args:
        config: the sizes.
        head: a key of `HEADS`.
        scan: blocks' weights stacked over layers and one compiled block for each of the two stacks.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
        moving: whether the backbone's batch normalisation uses the batch's own statistics in
            training and moves the running ones, which needs ``mutable=["batch_stats"]``.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"
    moving: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        pixel_mask: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_intermediate: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised.
            pixel_mask: [B, X, Y], 1 = pixel, 0 = padding around an image; None for no padding.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether hidden states of both sides are returned.
            output_attentions: whether attentions of both sides are returned.
            output_intermediate: whether what every layer of the decoder knows is returned:
                ``intermediate_hidden_states``, or from the head "object_detection"
                ``auxiliary_logits`` and ``auxiliary_boxes``.

        Raises:
            ValueError: an unknown head, or images or masks of the wrong shape.
        """
        config = self.config
        check_head(self, HEADS)
        check_pixels(pixel_values, config.resnet.num_channels)
        batch, *size = pixel_values.shape[:3]
        if pixel_mask is not None and pixel_mask.shape != (batch, *size):
            raise ValueError(
                f"pixel_mask has the shape {pixel_mask.shape}; it must be {(batch, *size)}"
            )
        backbone = resnet.Model(
            config.resnet,
            remat=self.remat,
            norm=partial(FrozenBatchNorm, moving=self.moving),
            dilated=bool(config.dilation),
            name="backbone",
        )
        features = backbone(pixel_values, train=train).last_hidden_state
        assert features is not None
        rows, columns = features.shape[1:3]
        mask = jnp.ones((batch, rows, columns), bool)
        if pixel_mask is not None:
            mask = nearest(pixel_mask.astype(bool), (rows, columns))
        positions = self.positions(mask).astype(features.dtype)  # [B, rows, columns, D]
        init = nn.initializers.normal(config.init_std)
        projected = Conv(
            config.d_model, 1, kernel_init=xavier(config), use_bias=True, name="project"
        )(features)
        shared = Shared(mask.reshape(batch, 1, 1, -1), positions.reshape(batch, -1, config.d_model))
        embedded = projected.reshape(batch, -1, config.d_model)
        encoder = Side(
            config, False, self.scan, self.remat, train, output_hidden_states, output_attentions,
            name="encoder",
        )  # fmt: skip
        encoded, _ = encoder(Dropout(config.dropout)(embedded, train), shared)
        # Unit variance: queries that start alike would take long to part.
        shape = (config.num_queries, config.d_model)
        queries = parameter(self, "queries", nn.initializers.normal(1.0), shape).astype(
            features.dtype
        )
        shared = shared._replace(encoder=encoded.hidden, queries=queries[None])
        intermediate = output_intermediate or (config.auxiliary_loss and self.head == "model")
        decoder = Side(
            config, True, self.scan, self.remat, train, output_hidden_states or intermediate,
            output_attentions, name="decoder",
        )  # fmt: skip
        start = jnp.zeros((batch, *shape), features.dtype)
        decoded, norm = decoder(start, shared)
        hidden = norm(decoded.hidden)  # [B, N, D]
        out = Output(encoder_last_hidden_state=encoded.hidden)
        layers = None
        if intermediate:
            states = [jnp.asarray(layer.hidden_state) for layer in decoded.layers]
            layers = norm(jnp.stack(states))  # [L, B, N, D]
        if output_hidden_states:
            out = dataclasses.replace(
                out,
                encoder_hidden_states=(embedded, *(one.hidden_state for one in encoded.layers)),
                hidden_states=(start, *(one.hidden_state for one in decoded.layers[:-1]), hidden),
            )
        if output_attentions:
            out = dataclasses.replace(
                out,
                encoder_attentions=tuple(layer.attentions for layer in encoded.layers),
                attentions=tuple(layer.attentions for layer in decoded.layers),
                cross_attentions=tuple(layer.cross_attentions for layer in decoded.layers),
            )
        if self.head == "model":
            return dataclasses.replace(
                out, last_hidden_state=hidden, intermediate_hidden_states=layers
            )
        # One class more than there are: none.
        classes = Dense(len(config.id2label) + 1, kernel_init=init, name="head_classes")
        boxes = BoxHead(config, name="head_boxes")
        out = dataclasses.replace(
            out,
            last_hidden_state=hidden,
            logits=classes(hidden).astype(jnp.float32),
            pred_boxes=boxes(hidden),
        )
        if layers is None:
            return out
        return dataclasses.replace(
            out,
            auxiliary_logits=tuple(classes(layers[:-1]).astype(jnp.float32)),
            auxiliary_boxes=tuple(boxes(layers[:-1])),
        )

    def positions(self, mask: Array) -> Array:
        """Of the places of a mask [B, X, Y]: [B, X, Y, D]."""
        config = self.config
        if config.position_embedding_type == "sine":
            return sinusoids(mask, config.d_model // 2)
        rows, columns = mask.shape[1:]
        if max(rows, columns) > MOST_ROWS:
            raise ValueError(
                f"features of {rows} x {columns} have more than the {MOST_ROWS} learned positions"
            )
        init, shape = nn.initializers.uniform(1.0), (MOST_ROWS, config.d_model // 2)
        of_row = parameter(self, "position_rows", init, shape)[:rows, None]
        of_column = parameter(self, "position_columns", init, shape)[None, :columns]
        pairs = jnp.broadcast_arrays(of_column, of_row)
        return jnp.broadcast_to(jnp.concatenate(pairs, axis=-1), (*mask.shape, config.d_model))


def nearest(mask: Array, size: tuple[int, int]) -> Array:
    """A mask [B, X, Y] at another size, without averages: [B, *size]."""
    for axis, new in zip((1, 2), size, strict=True):
        # In float32 and rounded down, as PyTorch counts.
        step = np.float32(mask.shape[axis]) / np.float32(new)
        places = np.floor(np.arange(new, dtype=np.float32) * step).astype(np.int32)
        mask = jnp.take(mask, np.minimum(places, mask.shape[axis] - 1), axis=axis)
    return mask


def sinusoids(mask: Array, width: int) -> Array:
    """Sines and cosines of each place's row and column (Parmar et al. 2018, arXiv:1802.05751).

    Args:
        mask: [B, X, Y], True for places of the image, which fill 0 to 2 pi in each direction.
        width: of each half; even.

    Returns:
        float32 [B, X, Y, 2 * width], rows' half first.
    """
    powers = jnp.asarray(TEMPERATURE ** (2 * (np.arange(width) // 2) / width), jnp.float32)
    halves = []
    for axis in (1, 2):
        place = jnp.cumsum(mask.astype(jnp.float32), axis=axis)
        last = jax.lax.index_in_dim(place, -1, axis)
        angles = (place / (last + 1e-6) * 2 * math.pi)[..., None] / powers  # [B, X, Y, width]
        pairs = jnp.stack([jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])], axis=-1)
        halves.append(pairs.reshape(angles.shape))
    return jnp.concatenate(halves, axis=-1)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 32, 32, config.resnet.num_channels))}


PREFIX = "model."
FIXED = {
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "scale_embedding": False,
    # What backbone_config says, or is read by nobody.
    **dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone", "classifier_dropout"), ...),
    "backbone_kwargs": frozenset({None}),
    "max_position_embeddings": ...,
}
IGNORED = (r"\.num_batches_tracked$",)
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    backbone = resnet.backbone_rules(config.backbone_config)
    table = [_placed(rule) for rule in nested_rules(backbone, "backbone")]
    table += [
        Rule("params/project/kernel", "input_projection.weight", CONV2D),
        Rule("params/project/bias", "input_projection.bias"),
        Rule("params/queries", "query_position_embeddings.weight"),
    ]
    if config.position_embedding_type == "learned":
        table += [
            Rule(f"params/position_{name}s", f"position_embedding.{name}_embeddings.weight")
            for name in ("row", "column")
        ]
    for side in ("encoder", "decoder"):
        here, there = f"{side}/layers_{{i}}", f"{side}.layers.{{i}}"
        attentions = {"attn": "self_attn"} | (
            {"cross_attn": "encoder_attn"} if side == "decoder" else {}
        )
        for ours, theirs in attentions.items():
            for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
                table += dense_rules(f"{here}/{ours}/{name}", f"{there}.{theirs}.{letter}_proj")
            table += also(
                dense_rules(f"{here}/{ours}/out", f"{there}.{theirs}.out_proj"),
                "out_proj",
                "o_proj",
            )
        norms = {"norm_1": "self_attn_layer_norm", "norm_2": "final_layer_norm"}
        if side == "decoder":
            norms["norm_cross"] = "encoder_attn_layer_norm"
        for ours, theirs in norms.items():
            table += norm_rules(f"{here}/{ours}", f"{there}.{theirs}")
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            table += also(
                dense_rules(f"{here}/mlp/{ours}", f"{there}.{theirs}"), theirs, f"mlp.{theirs}"
            )
    table += [
        Rule("params/decoder/norm_scale", "decoder.layernorm.weight"),
        Rule("params/decoder/norm_bias", "decoder.layernorm.bias"),
    ]
    table = [
        dataclasses.replace(
            rule,
            tensor=tuple(body + name for name in rule.tensors),
            aliases=tuple(body + name for name in rule.aliases),
        )
        for rule in table
    ]
    if head == "object_detection":
        table += dense_rules("head_classes", "class_labels_classifier")
        for number, name in enumerate(("dense_0", "dense_1", "out")):
            table += dense_rules(f"head_boxes/{name}", f"bbox_predictor.layers.{number}")
    return table


def _placed(rule: Rule) -> Rule:
    """A rule of the backbone, "backbone.x", whose tensors' places differ between versions."""
    names = [name.removeprefix("backbone.") for name in (*rule.tensors, *rule.aliases)]
    places = ("backbone.conv_encoder.model.", "backbone.model.")
    first, *rest = (place + name for place in places for name in names)
    return dataclasses.replace(rule, tensor=first, aliases=tuple(rest))


def also(table: list[Rule], old: str, new: str) -> list[Rule]:
    """The rules, whose tensors some files have under another module's name."""
    return [
        dataclasses.replace(rule, aliases=(rule.tensors[0].replace(f".{old}.", f".{new}."),))
        for rule in table
    ]
