"""What convolutional networks share: features of an image, their average, one head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.checks import check_head
from fmjax.nn.conv import average
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.remat import recomputed
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, Remat


def stage_problems(config: Any) -> list[str]:
    """What is wrong with a config's ``depths`` and ``hidden_sizes``."""
    problems = []
    if not config.depths or len(config.depths) != len(config.hidden_sizes):
        problems.append(
            f"depths={config.depths} and hidden_sizes={config.hidden_sizes} must have one number "
            "a stage each"
        )
    for name in ("depths", "hidden_sizes"):
        if any(size < 1 for size in getattr(config, name)):
            problems.append(f"{name}={getattr(config, name)} must be positive")
    return problems


def divisible(width: float, divisor: int, least: int) -> int:
    """The multiple of `divisor` next to `width` that is at least `least` and 90 % of it."""
    size = max(least, int(width + divisor / 2) // divisor * divisor)
    return size + divisor if size < 0.9 * width else size


class ConvNet(nn.Module):
    """Convolutions, a pooling, and one head.

    A family subclasses it as its ``Model``, gives `heads` and `features`, and overrides what
    differs. All of these are called in a compact method.

    Args:
        config: the family's.
        head: a key of the family's ``HEADS``.
        scan: has no effect: blocks differ in shape.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    heads: ClassVar[Mapping[str, str]]

    @property
    def kernel_init(self) -> Callable[..., Array]:
        """Initializer of the head's kernel."""
        return nn.initializers.normal(self.config.initializer_range)

    @property
    def least(self) -> tuple[int, int]:
        """Rows and columns of the smallest image that has a last feature map."""
        return 1, 1

    @property
    def head_dropout(self) -> float:
        """Of what the classifier reads."""
        return 0.0

    def recomputed(self, block: type[nn.Module]) -> Any:
        """The module, or the one that `remat` asks for instead."""
        return recomputed(block, self.remat)

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        """The last feature map [B, X, Y, C], and the hidden states."""
        raise NotImplementedError

    def pool(self, x: Array, train: bool) -> Array:
        """What the classifier reads: [B, X, Y, C] -> [B, D]."""
        return average(x)

    def outputs(self, x: Array, states: Sequence[Array], train: bool) -> Output:
        """What the head makes of the last feature map [B, X, Y, C] and the hidden states."""
        pooled = self.pool(x, train)
        if self.head == "model":
            return Output(last_hidden_state=x, pooler_output=pooled)
        pooled = Dropout(self.head_dropout)(pooled, train)
        count = len(self.config.id2label)
        logits = Dense(count, kernel_init=self.kernel_init, name="head")(pooled)
        return Output(logits=logits.astype(jnp.float32))

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised.
            train: whether dropout and stochastic depth are on, which need
                ``rngs={"dropout": key}``, and batch normalisation uses the batch's own statistics
                and moves the running ones, which needs ``mutable=["batch_stats"]``.
            output_hidden_states: whether ``hidden_states`` is returned, [B, X, Y, C] each; the
                family says which.
            output_attentions: has no effect: there are none.

        Returns:
            ``last_hidden_state`` [B, X, Y, C] and ``pooler_output`` [B, D]; or ``logits``.

        Raises:
            ValueError: an unknown head, or images of the wrong shape.
        """
        check_head(self, self.heads)
        check_pixels(pixel_values, self.config.num_channels)
        size, least = pixel_values.shape[1:3], self.least
        if size[0] < least[0] or size[1] < least[1]:
            raise ValueError(
                f"images of {size} are too small for this model; they need {least[0]} rows and "
                f"{least[1]} columns"
            )
        x, states = self.features(pixel_values, train)
        out = self.outputs(x, states, train)
        return (
            dataclasses.replace(out, hidden_states=tuple(states)) if output_hidden_states else out
        )
