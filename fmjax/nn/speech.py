"""What speech encoder families share: convolutions over samples, positions, the stack of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.checks import check_head
from fmjax.nn.conv1d import Conv1d, convolve
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.mask import make_attention_mask
from fmjax.nn.norm import GroupNorm, LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.product import add_bias
from fmjax.nn.spans import draw_spans
from fmjax.nn.stack import run_stack
from fmjax.types import Output, Remat

EPSILON = 1e-5  # of the norms for which there is no key
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of a PyTorch Linear


def frames_of(config: Any, samples: Any) -> Any:
    """How many frames the convolutions make of so many samples, an int or an array of them."""
    for size, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - size) // stride + 1
    return samples


def least_samples(config: Any, frames: int = 1) -> int:
    """How many samples so many frames take."""
    for size, stride in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        frames = (frames - 1) * stride + size
    return frames


class FeatureEncoder(nn.Module):
    """Convolutions over samples: [B, T] -> [B, T', C]."""

    config: Any

    @nn.compact
    def __call__(self, input_values: Array) -> Array:
        config = self.config
        x = input_values[..., None]  # [B, T, 1]
        layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        for i, (features, size, stride) in enumerate(layers):
            x = Conv1d(features, size, stride, use_bias=config.conv_bias, name=f"conv_{i}")(x)
            if config.feat_extract_norm == "layer":
                x = LayerNorm(EPSILON, name=f"norm_{i}")(x)
            elif i == 0:
                x = GroupNorm(features, EPSILON, name=f"norm_{i}")(x)  # over time
            x = activation(config.feat_extract_activation)(x)
        return x


class PositionConv(nn.Module):
    """Relative positions by a wide convolution whose kernel is its direction times its length
    (Salimans & Kingma 2016, arXiv:1602.07868), one length for each place of the window.
    """

    config: Any
    normed: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, D] -> [B, T, D]
        config = self.config
        size, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        width = x.shape[-1]
        init = nn.initializers.normal(2 / (size * width) ** 0.5)
        kernel = parameter(self, "kernel", init, (size, width // groups, width))
        if self.normed:
            wide = kernel.astype(jnp.float32)
            length = jnp.sqrt(jnp.square(wide).sum(axis=(1, 2), keepdims=True))  # [X, 1, 1]
            scale = parameter(self, "scale", lambda rng, shape: length, length.shape)
            kernel = (wide * (scale / length)).astype(x.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (width,))
        around = (size // 2, (size - 1) // 2)
        y = convolve(x, kernel, around=around, groups=groups)
        y = add_bias(y.astype(jnp.float32), bias).astype(x.dtype)
        return activation(config.feat_extract_activation)(y)


class SpeechEmbeddings(nn.Module):
    """Frames of samples, with positions: [B, T] -> [B, T', D]."""

    config: Any

    @nn.compact
    def __call__(
        self, input_values: Array, keep: Array | None, masked: Array | None, train: bool
    ) -> tuple[Array, Array]:
        """([B, T', D], [B, T', C]): the states, and the normed features they are made of.

        Args:
            input_values: [B, T].
            keep: bool [B, T'], frames that are no padding; None for all.
            masked: bool [B, T'], frames that the transformer does not see; None draws them in
                training as the config says.
            train: whether to drop and to mask.
        """
        config = self.config
        features = self.norm_features(FeatureEncoder(config, name="features")(input_values))
        x = Dense(config.hidden_size, kernel_init=TORCH_INIT, name="projection")(features)
        x = Dropout(config.feat_proj_dropout)(x, train)
        x = self.mask(x, keep, masked, train)
        if keep is not None:
            x = jnp.where(keep[..., None], x, jnp.zeros((), x.dtype))
        x = x + self.positions(x, train)
        if not config.do_stable_layer_norm:
            x = LayerNorm(config.layer_norm_eps, name="position_norm")(x)
        return Dropout(config.hidden_dropout)(x, train), features

    def norm_features(self, features: Array) -> Array:
        """What is projected: [B, T', C] -> [B, T', C]."""
        return LayerNorm(self.config.layer_norm_eps, name="norm")(features)

    def positions(self, x: Array, train: bool) -> Array:
        """What is added to the states: [B, T', D] -> [B, T', D]."""
        return PositionConv(self.config, name="position")(x)

    def mask(self, x: Array, keep: Array | None, masked: Array | None, train: bool) -> Array:
        """The states with spans of time replaced by one vector, and spans of features by zeros."""
        config = self.config
        if not has_mask(config):
            if masked is not None:
                raise ValueError(
                    "mask_time_indices needs a model with a vector for masked frames: one of "
                    "mask_time_prob and mask_feature_prob above 0"
                )
            return x
        rows, frames, width = x.shape
        vector = parameter(self, "mask", nn.initializers.uniform(1.0), (width,))
        if not config.apply_spec_augment:
            return x
        if masked is None and train and config.mask_time_prob > 0:
            lengths = jnp.full(rows, frames) if keep is None else keep.sum(axis=1)
            masked = draw_spans(
                self.make_rng("dropout"),
                lengths,
                frames,
                probability=config.mask_time_prob,
                length=config.mask_time_length,
                least=config.mask_time_min_masks,
            )
        if masked is not None:
            x = jnp.where(masked.astype(bool)[..., None], vector.astype(x.dtype), x)
        if train and config.mask_feature_prob > 0:
            dark = draw_spans(
                self.make_rng("dropout"),
                jnp.full(rows, width),
                width,
                probability=config.mask_feature_prob,
                length=config.mask_feature_length,
                least=config.mask_feature_min_masks,
            )
            x = jnp.where(dark[:, None], jnp.zeros((), x.dtype), x)
        return x


def has_mask(config: Any) -> bool:
    """Whether there is a vector for masked frames."""
    return config.mask_time_prob > 0 or config.mask_feature_prob > 0


def until(lengths: Array, size: int) -> Array:
    """bool [B, T]: the first of each row's T places, as many as its length says."""
    return jnp.arange(size) < lengths[:, None]


def mean_over(x: Array, keep: Array | None) -> Array:
    """The mean over time, of the frames that are kept: [B, T, D] -> [B, D]."""
    if keep is None:
        return jnp.mean(x, axis=1)
    kept = jnp.where(keep[..., None], x, jnp.zeros((), x.dtype))
    return kept.sum(axis=1) / jnp.maximum(keep.sum(axis=1), 1)[:, None].astype(x.dtype)


def statistics_over(x: Array, keep: Array | None) -> Array:
    """Mean and standard deviation over time, of the frames kept: [B, T, D] -> [B, 2 D] float32."""
    x = x.astype(jnp.float32)
    mean = mean_over(x, keep)
    count = jnp.float32(x.shape[1]) if keep is None else keep.sum(axis=1)[:, None]
    square = mean_over(jnp.square(x - mean[:, None]), keep)
    variance = square * count / jnp.maximum(count - 1, 1)
    # The gradient of a root at 0 is infinite; PyTorch takes 0.
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return jnp.concatenate([mean, deviation], axis=-1)


class SpeechEncoder(nn.Module):
    """A transformer over convolutions of samples, with one head.

    A family subclasses it as its ``Model``, gives `block`, `heads` and `outputs`, and overrides
    what differs. Its blocks are called ``(hidden, cache, index, shared)`` (see
    `fmjax.nn.stack.run_stack`).

    Args:
        config: the family's.
        head: a key of the family's ``HEADS``.
        scan: weights stacked over layers (``layers/...`` [L, ...]) and one compiled block.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    heads: ClassVar[Mapping[str, str]]
    block: ClassVar[type[nn.Module]]
    embeddings: ClassVar[type[nn.Module]] = SpeechEmbeddings

    @property
    def weighs_layers(self) -> bool:
        """Whether the head reads all layers' states."""
        return False

    @property
    def least_frames(self) -> int:
        """How many frames the head needs."""
        return 1

    def frames(self, samples: Any) -> Any:
        """How many frames the last states have for so many samples, an int or an array of them."""
        return frames_of(self.config, samples)

    def shorten(self, hidden: Array) -> Array:
        """The last states, made fewer: [B, T, D] -> [B, T', D']; called in a compact method."""
        return hidden

    def frame_mask(self, attention_mask: Array | None, size: int) -> Array | None:
        """bool [B, T']: which of the last states are no padding; None for all.

        Args:
            attention_mask: [B, T] over samples, 1 at each row's first ones; or None.
            size: T'.
        """
        if attention_mask is None:
            return None
        return until(self.frames(attention_mask.sum(axis=-1)), size)

    def check(self, samples: Array, mask: Array | None, masked: Array | None) -> int:
        """How many frames these samples make.

        Raises:
            ValueError: an unknown head, or arrays of the wrong shape.
        """
        config = self.config
        check_head(self, self.heads)
        if samples.ndim != 2:
            raise ValueError(f"input_values have the shape {samples.shape}; they must be [B, T]")
        least = least_samples(config, self.least_frames)
        if samples.shape[1] < least:
            raise ValueError(
                f"input_values have {samples.shape[1]} samples; this model needs at least {least}: "
                "pad shorter ones with zeros"
            )
        if mask is not None and mask.shape != samples.shape:
            raise ValueError(
                f"attention_mask has the shape {mask.shape}; it must be that of input_values, "
                f"{samples.shape}: 1 for samples, 0 for the padding after them"
            )
        frames = frames_of(config, samples.shape[1])
        if masked is not None and masked.shape != (len(samples), frames):
            raise ValueError(
                f"mask_time_indices have the shape {masked.shape}; these samples make {frames} "
                f"frames each: they must be {(len(samples), frames)}"
            )
        return frames

    @nn.compact
    def __call__(
        self,
        input_values: Array,
        attention_mask: Array | None = None,
        mask_time_indices: Array | None = None,
        gumbel_temperature: Array | float = 2.0,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            input_values: [B, T], samples at 16 kHz of mean 0 and variance 1.
            attention_mask: [B, T], 1 for samples and 0 for the padding after them. Models with
                ``feat_extract_norm="group"`` were trained without it, on zeros.
            mask_time_indices: [B, T'], 1 for frames that the transformer does not see. None draws
                them in training (SpecAugment) as the config says.
            gumbel_temperature: of the head "pretraining" in training: a number, or [B].
            train: whether dropout, layer drop, masks and the quantiser's draws are on; they need
                ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` is returned: the embeddings and each
                block's output, the last one normed.
            output_attentions: whether ``attentions`` is returned.

        Raises:
            ValueError: an unknown head, too few samples, or arrays of the wrong shape.
        """
        config = self.config
        frames = self.check(input_values, attention_mask, mask_time_indices)
        keep = None
        if attention_mask is not None:
            keep = until(frames_of(config, attention_mask.sum(axis=-1)), frames)
        masked = None if mask_time_indices is None else mask_time_indices.astype(bool)
        embedded, features = self.embeddings(config, name="embed")(  # pyright: ignore[reportCallIssue]
            input_values, keep, masked, train
        )
        weighed = self.weighs_layers
        hidden, layers, _ = run_stack(
            self.block,
            {
                "config": config,
                "train": train,
                "output_hidden_states": output_hidden_states or weighed,
                "output_attentions": output_attentions,
            },
            embedded,
            make_attention_mask(keep, query_length=frames, key_length=frames, causal=False),
            num_layers=config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
        )
        if config.do_stable_layer_norm:
            hidden = LayerNorm(config.layer_norm_eps, name="final_norm")(hidden)
        states: tuple[Any, ...] = ()
        if output_hidden_states or weighed:
            states = (embedded, *(layer.hidden_state for layer in layers[:-1]), hidden)
        hidden = self.shorten(hidden)
        keep = self.frame_mask(attention_mask, hidden.shape[1])
        out = self.outputs(hidden, states, features, keep, masked, gumbel_temperature, train)
        out = dataclasses.replace(out, state_mask=keep)
        if output_hidden_states:
            out = dataclasses.replace(out, hidden_states=states)
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        return out

    def outputs(
        self,
        hidden: Array,
        states: Sequence[Array],
        features: Array,
        keep: Array | None,
        masked: Array | None,
        temperature: Array | float,
        train: bool,
    ) -> Output:
        """What the head makes of the last states; called in a compact method.

        Args:
            hidden: [B, T, D], the last ones.
            states: the embeddings' and each block's, if they were asked for or are weighed.
            features: [B, T, C], of the convolutions.
            keep: bool [B, T], frames that are no padding; None for all.
            masked: bool [B, T], frames that the transformer did not see, or None.
            temperature: of a quantiser.
            train: whether dropout is on.
        """
        raise NotImplementedError
