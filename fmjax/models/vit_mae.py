"""ViT-MAE (He et al. 2021, arXiv:2111.06377): a ViT that sees a quarter of the patches, and a small
decoder that fills in the rest. HF "vit_mae".

Which patches are seen is an input, ``noise``: those of its smallest values. The task
`fmjax.tasks.masked_autoencoding` draws it; without it the encoder sees them all, as for features.
(PyTorch draws it anew in every call.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, vit
from fmjax.models.vit import IGNORED
from fmjax.nn.linear import Dense
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.stack import run_stack
from fmjax.nn.vision import PatchEmbed, VisionEncoder, grid_of, pair, resize_grid
from fmjax.types import Output, Remat
from fmjax.weights import Rule, dense_rules, norm_rules

__all__ = ["IGNORED"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

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
    qkv_bias: bool = True
    decoder_num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.mask_ratio < 1:
            problems.append(f"mask_ratio={self.mask_ratio} must be at least 0 and below 1")
        if self.decoder_hidden_size % self.decoder_num_attention_heads:
            problems.append(
                f"decoder_hidden_size={self.decoder_hidden_size} is not a multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}"
            )
        for name in ("hidden_size", "decoder_hidden_size"):
            if getattr(self, name) % 4:
                problems.append(f"{name}={getattr(self, name)} must divide by 4, for its sinusoids")
        vit.check_config(self, problems)

    def of_decoder(self) -> Config:
        """The same names for the decoder's sizes."""
        return dataclasses.replace(
            self,
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
        )


MODEL_TYPE = "vit_mae"
HEADS = {"model": "ViTMAEModel", "pretraining": "ViTMAEForPreTraining"}


def _published(width: int, layers: int, heads: int, patch: int = 16) -> Config:
    return Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
    )


VARIANTS = {
    "tiny": Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    ),
    # He et al. 2021, section 4, "ViT backbones", with the decoder of table 1.
    "b16": _published(768, 12, 12),
    "l16": _published(1024, 24, 16),
    "h14": _published(1280, 32, 16, 14),
}  # fmt: skip


def sinusoids(grid: tuple[int, int], width: int) -> np.ndarray:
    """Positions of a grid after one of zeros for the class token: float32 [1, N + 1, D].

    A quarter of the features each: sine and cosine of the column, sine and cosine of the row. (The
    paper's code meant the row first, and its weights have learned this order.)
    """
    quarter = width // 4
    omega = 1.0 / 10_000 ** (np.arange(quarter) / quarter)
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [np.outer(axis.ravel(), omega) for axis in (columns, rows)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


def positions(config: Config, width: int) -> np.ndarray:
    """What the buffers of positions hold at first."""
    return sinusoids(grid_of(pair(config.image_size), pair(config.patch_size)), width)


def spread(config: Config, table: Array, grid: tuple[int, int]) -> Array:
    """The positions of images of another size: [1, N + 1, D] -> [1, N' + 1, D]."""
    table = jax.lax.stop_gradient(table)
    old = grid_of(pair(config.image_size), pair(config.patch_size))
    return jnp.concatenate([table[:, :1], resize_grid(table[:, 1:], old, grid)], axis=1)


class Embeddings(nn.Module):
    """The class token and the patches that are seen, with their positions."""

    config: Config

    @nn.compact
    def __call__(
        self, pixel_values: Array, noise: Array | None, grid: tuple[int, int]
    ) -> tuple[Array, Array, Array]:
        """([B, T, D], mask [B, N], ids_restore [B, N]); without noise all patches are seen."""
        config = self.config
        patch, width = pair(config.patch_size), config.hidden_size
        # As a dense layer's: xavier over what a patch has and what it becomes (section A.1).
        xavier = nn.initializers.xavier_uniform()

        def kernel_init(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return xavier(rng, (int(np.prod(shape[:-1])), shape[-1]), dtype).reshape(shape)

        x = PatchEmbed(width, patch, kernel_init, name="patch")(pixel_values)
        buffer = self.variable("buffers", "position", lambda: jnp.asarray(positions(config, width)))
        table = spread(config, buffer.value, grid).astype(x.dtype)
        x = x + table[:, 1:]
        batch, length = x.shape[:2]
        order = jnp.broadcast_to(jnp.arange(length), (batch, length))
        seen = length
        if noise is not None:
            seen = int(length * (1 - config.mask_ratio))
            order = jnp.argsort(noise, axis=1)
            x = jnp.take_along_axis(x, order[:, :seen, None], axis=1)
        restore = jnp.argsort(order, axis=1)
        mask = (restore >= seen).astype(jnp.float32)
        init = nn.initializers.normal(config.initializer_range)
        cls = parameter(self, "cls", init, (1, 1, width)).astype(x.dtype) + table[:, :1]
        cls = jnp.broadcast_to(cls, (batch, 1, width))
        return jnp.concatenate([cls, x], axis=1), mask, restore


class Decoder(nn.Module):
    """Pixels of all patches from the states of those that were seen.

    Args:
        config: the model's.
        scan, remat: as the model's.
    """

    config: Config
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(
        self, hidden: Array, restore: Array, grid: tuple[int, int], train: bool
    ) -> Array:  # [B, T, D] -> [B, N, P * Q * C]
        whole, config = self.config, self.config.of_decoder()
        init = nn.initializers.normal(config.initializer_range)
        x = Dense(config.hidden_size, kernel_init=init, name="embed")(hidden)
        mask = parameter(self, "mask", init, (1, 1, config.hidden_size)).astype(x.dtype)
        batch, length = restore.shape
        unseen = jnp.broadcast_to(mask, (batch, length + 1 - x.shape[1], config.hidden_size))
        patches = jnp.concatenate([x[:, 1:], unseen], axis=1)
        patches = jnp.take_along_axis(patches, restore[:, :, None], axis=1)
        buffer = self.variable(
            "buffers", "position", lambda: jnp.asarray(positions(whole, config.hidden_size))
        )
        table = spread(whole, buffer.value, grid).astype(x.dtype)
        x = jnp.concatenate([x[:, :1], patches], axis=1) + table
        fields = {
            "config": config,
            "train": train,
            "output_hidden_states": False,
            "output_attentions": False,
        }
        x, _, _ = run_stack(
            vit.Block, fields, x, None, num_layers=config.num_hidden_layers,
            scan=self.scan, remat=self.remat,
        )  # fmt: skip
        x = LayerNorm(config.layer_norm_eps, name="norm")(x)
        rows, columns = pair(config.patch_size)
        features = rows * columns * config.num_channels
        return Dense(features, kernel_init=init, name="pixels")(x)[:, 1:].astype(jnp.float32)


class Model(VisionEncoder):
    """ViT-MAE with one head; see `fmjax.nn.vision.VisionEncoder`."""

    block = vit.Block
    heads = HEADS

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        return Output(last_hidden_state=hidden)

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        noise: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised; of any size, whose positions are resampled from
                those of the config's ``image_size``.
            noise: [B, N]; the patches where it is smallest are seen, a share of
                ``1 - mask_ratio``. None shows the encoder all patches, in order.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` of the encoder is returned.
            output_attentions: whether ``attentions`` of the encoder is returned.

        Returns:
            ``mask`` and ``ids_restore`` [B, N], and ``last_hidden_state`` [B, T, D] or, of the head
            "pretraining", ``logits`` [B, N, P * Q * C], the patches' pixels (normalised patch by
            patch if the config has ``norm_pix_loss``).

        Raises:
            ValueError: images or noise of the wrong shape.
        """
        grid = self.check(pixel_values, noise)
        embedded, mask, restore = Embeddings(self.config, name="embed")(pixel_values, noise, grid)
        out = self.run(
            embedded,
            grid,
            train=train,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        out = dataclasses.replace(out, mask=mask, ids_restore=restore)
        if self.head == "model":
            return out
        decoder = Decoder(self.config, self.scan, self.remat, name="decoder")
        assert out.last_hidden_state is not None
        logits = decoder(out.last_hidden_state, restore, grid, train)
        return dataclasses.replace(out, last_hidden_state=None, logits=logits)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    rows, columns = grid_of(pair(config.image_size), pair(config.patch_size))
    return vit.inputs(config, head) | {"noise": jnp.zeros((1, rows * columns))}


PREFIX = "vit."
FIXED = {"problem_type": None}
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = [_buffered(rule) for rule in vit.body_rules(config, head, body)]
    if head == "model":
        return table
    layer = vit.layer_rules(
        "decoder/layers_{i}", "decoder.decoder_encoder.layer.{i}", qkv_bias=config.qkv_bias
    )
    return [
        *table,
        *dense_rules("decoder/embed", "decoder.decoder_embed"),
        Rule("params/decoder/mask", "decoder.mask_token"),
        Rule("buffers/decoder/position", "decoder.decoder_pos_embed"),
        # Version 4's files, which are the hub's, have the shorter name.
        *(_also_short(rule) for rule in layer),
        *norm_rules("decoder/norm", "decoder.decoder_norm"),
        *dense_rules("decoder/pixels", "decoder.decoder_pred"),
    ]


def _buffered(rule: Rule) -> Rule:
    """The rule of the positions, which nothing trains."""
    if rule.param != "params/embed/position":
        return rule
    return dataclasses.replace(rule, param="buffers/embed/position")


def _also_short(rule: Rule) -> Rule:
    """The rule with the other name of its one tensor."""
    (name,) = rule.tensors
    short = name.replace("decoder_encoder.layer", "decoder_layers")
    return dataclasses.replace(rule, aliases=(short,))
