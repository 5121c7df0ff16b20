"""Any image family over the frames of a video, and pooling over time: the average of the frames
(Wang et al. 2016, arXiv:1608.00859), their maximum, or a transformer (Arnab et al. 2021,
arXiv:2103.15691, model 2: the "factorised encoder"). Hugging Face has no such model.

Variables of an image model are those of the encoder as they are:
``variables["params"]["encoder"] = image_variables["params"]``, and so for ``batch_stats``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import PART, cnn, family_for, fields_of, resnet, vit
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.linear import Dense
from fmjax.nn.mask import make_attention_mask
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.stack import run_stack
from fmjax.types import Output, Remat
from fmjax.weights import Rule, dense_rules, nested_rules, norm_rules

POOLINGS = ("mean", "max", "transformer")
FRAMES = ("pooler", "cls", "mean")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json.

    Args:
        encoder: the Config of any family whose head "model" reads ``pixel_values``.
        frame_vector: what of the encoder's output stands for a frame: its pooled output, its first
            token, or the mean over its last hidden states.
        pooling: over frames.
        num_frames: for how many the transformer has positions; shorter videos take the first.
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout_prob,
            attention_probs_dropout_prob, layer_norm_eps, qkv_bias, initializer_range: of the
            transformer, as ViT's.
        problem_type: read by the task, not by the model.
        id2label: the classes.
    """

    encoder: Any = dataclasses.field(default=resnet.VARIANTS["50"], metadata=PART)
    frame_vector: str = "pooler"
    pooling: str = "mean"
    num_frames: int = 16
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    initializer_range: float = 0.02
    problem_type: str | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        family = family_for(self.encoder)
        if not isinstance(self.encoder, family.Config):
            problems.append(f"encoder={self.encoder!r} is no family's Config")
        elif "num_channels" not in fields_of(self.encoder):
            problems.append(f"encoder: {family.MODEL_TYPE} reads no pixel_values")
        for name, known in (("pooling", POOLINGS), ("frame_vector", FRAMES)):
            if getattr(self, name) not in known:
                problems.append(f"{name}={getattr(self, name)!r} must be one of {known}")
        for name in ("num_frames", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        refuse(self, problems)

    @property
    def num_channels(self) -> int:
        """C of the frames."""
        return self.encoder.num_channels


MODEL_TYPE = "video-encoder"
HEADS = {"model": "VideoEncoderModel", "video_classification": "VideoEncoderForClassification"}


def _frames_alone(variant: str) -> vit.Config:
    return dataclasses.replace(vit.VARIANTS[variant], add_pooling_layer=False)


VARIANTS = {
    "tiny": Config(
        _frames_alone("tiny"), "cls", "transformer", num_frames=3, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24,
    ),
    "tiny-cnn": Config(cnn.VARIANTS["tiny"], num_frames=3),
    # Wang et al. 2016, section 3: averaged consensus of segments; 8 of them and a ResNet-50 as in
    # the later literature.
    "tsn-resnet50": Config(num_frames=8),
    # Arnab et al. 2021, section 4.1: ViT-B/16 and four layers over time, frames sampled uniformly.
    "factorised-b16": Config(_frames_alone("b16"), "cls", "transformer"),
}  # fmt: skip


class Model(nn.Module):
    """A video encoder with one head.

    Args:
        config: the parts.
        head: a key of `HEADS`.
        scan, remat: of the encoder's blocks and of the transformer's.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        frame_mask: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, T, X, Y, C], normalised; the encoder sees all frames as one batch.
            frame_mask: [B, T], 0 for frames that only fill a batch up, which come last: nothing
                that follows the encoder sees them.
            train: see the encoder's family.
            output_hidden_states, output_attentions: whether the transformer's are returned,
                [B, 1 + T, D] and [B, H, 1 + T, 1 + T], a class token before the frames.

        Returns:
            ``last_hidden_state`` [B, T, D], the frames' vectors; ``pooler_output`` [B, D] of the
            whole; or ``logits`` [B, C].

        Raises:
            ValueError: an unknown head, frames or a mask of the wrong shape, too many frames.
        """
        config = self.config
        check_head(self, HEADS)
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values have the shape {pixel_values.shape}; those of a video must be "
                "[B, T, X, Y, C], channels last"
            )
        batch, frames = pixel_values.shape[:2]
        if frame_mask is not None and frame_mask.shape != (batch, frames):
            raise ValueError(f"frame_mask has the shape {frame_mask.shape}, not {(batch, frames)}")
        if config.pooling == "transformer" and frames > config.num_frames:
            raise ValueError(f"{frames} frames are more than num_frames={config.num_frames}")
        encoder = family_for(config.encoder).Model(
            config.encoder, scan=self.scan, remat=self.remat, name="encoder"
        )
        out = encoder(pixel_values.reshape(-1, *pixel_values.shape[2:]), train=train)
        vectors = self.frame_vectors(out).reshape(batch, frames, -1)  # [B, T, D]
        result = Output(last_hidden_state=vectors)
        if config.pooling == "transformer":
            pooled, result = self.over_time(
                vectors, frame_mask, train, output_hidden_states, output_attentions
            )
        else:
            keep = jnp.ones((batch, frames), bool) if frame_mask is None else frame_mask > 0
            pooled = pool(vectors, keep, config.pooling)
        if self.head == "model":
            return dataclasses.replace(result, pooler_output=pooled)
        init = nn.initializers.normal(config.initializer_range)
        logits = Dense(len(config.id2label), kernel_init=init, name="head")(pooled)
        return dataclasses.replace(
            result, logits=logits.astype(jnp.float32), last_hidden_state=None
        )

    def frame_vectors(self, out: Output) -> Array:
        """One vector a frame, of the encoder's output: [B * T, D]."""
        hidden = out.last_hidden_state
        assert hidden is not None
        if self.config.frame_vector == "pooler":
            if out.pooler_output is None:
                raise ValueError(
                    "frame_vector='pooler': the encoder has no pooled output; use 'cls' or 'mean'"
                )
            return out.pooler_output
        tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])  # a grid is tokens, too
        if self.config.frame_vector == "cls":
            return tokens[:, 0]
        return jnp.mean(tokens.astype(jnp.float32), axis=1).astype(hidden.dtype)

    def over_time(
        self,
        vectors: Array,
        frame_mask: Array | None,
        train: bool,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[Array, Output]:
        """A class token and the frames pass the transformer: [B, T, D] -> [B, D]."""
        config = self.config
        batch, frames, width = vectors.shape
        if width % config.num_attention_heads:
            raise ValueError(
                f"frames have {width} features, no multiple of num_attention_heads="
                f"{config.num_attention_heads}"
            )
        init = nn.initializers.normal(config.initializer_range)
        token = parameter(self, "cls", init, (1, 1, width)).astype(vectors.dtype)
        table = parameter(self, "position", init, (1, 1 + config.num_frames, width))
        hidden = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), vectors], axis=1)
        embedded = hidden + table[:, : 1 + frames].astype(hidden.dtype)
        keep = None
        if frame_mask is not None:
            keep = jnp.concatenate([jnp.ones_like(frame_mask[:, :1]), frame_mask], axis=1)
        length = 1 + frames
        mask = make_attention_mask(keep, query_length=length, key_length=length, causal=False)
        hidden, layers, _ = run_stack(
            vit.Block,
            {
                "config": config,
                "train": train,
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
            },
            embedded,
            mask,
            num_layers=config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
        )
        hidden = LayerNorm(config.layer_norm_eps, name="final_norm")(hidden)
        out = Output(last_hidden_state=hidden[:, 1:])
        if output_hidden_states:
            states = (embedded, *(layer.hidden_state for layer in layers))
            out = dataclasses.replace(out, hidden_states=states)
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        return hidden[:, 0], out


def pool(vectors: Array, keep: Array, pooling: str) -> Array:
    """The mean or the maximum of the frames to keep [B, T]: [B, T, D] -> [B, D]."""
    floats, keep = vectors.astype(jnp.float32), keep[..., None]
    if pooling == "max":
        return jnp.where(keep, floats, -jnp.inf).max(axis=1).astype(vectors.dtype)
    total = jnp.where(keep, floats, 0.0).sum(axis=1)
    return (total / jnp.maximum(keep.sum(axis=1), 1)).astype(vectors.dtype)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    frame = family_for(config.encoder).inputs(config.encoder, "model")["pixel_values"]
    return {"pixel_values": frame[:, None]}


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = ()


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell of the encoder."""
    own = [name.removeprefix("encoder.") for name in names if name.startswith("encoder.")]
    encoder = family_for(config.encoder).from_tensors(config.encoder, "model", own)
    return dataclasses.replace(config, encoder=encoder)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are, for one head: the encoder's by its family's names, the
    transformer's by ViT's.
    """
    encoder = family_for(config.encoder).rules(config.encoder, "model")
    table = nested_rules(encoder, "encoder")
    if config.pooling == "transformer":
        table += [
            Rule("params/cls", "temporal.cls_token"),
            Rule("params/position", "temporal.position_embeddings"),
            *vit.layer_rules("layers_{i}", "temporal.layer.{i}", qkv_bias=config.qkv_bias),
            *norm_rules("final_norm", "temporal.layernorm"),
        ]
    return table + (dense_rules("head", "classifier") if head != "model" else [])
