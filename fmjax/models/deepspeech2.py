"""Deep Speech 2 (Amodei et al. 2015, arXiv:1512.02595): convolutions over a spectrogram, recurrent
layers and CTC.

Hugging Face has no such class: ``model_type`` "deepspeech2" is ours, and so are the tensors' names.
Where the paper leaves something open: batch normalisation counts what is no padding, padding is
zero before every convolution, and the recurrent layers' biases are the norms'.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.norm import BatchNorm
from fmjax.nn.recurrent import GRU, LSTM, Cell, Recurrence, State
from fmjax.nn.remat import recomputed
from fmjax.nn.speech import until
from fmjax.types import Output, Remat
from fmjax.weights import (
    CONV2D,
    TRANSPOSE,
    Rule,
    batch_norm_rules,
    conv_norm_rules,
    dense_rules,
)

Sizes = tuple[tuple[int, int], ...]
CELLS = ("relu", "gru", "lstm")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own; the defaults are the paper's model of 70 million
    parameters with plain recurrent layers (table 11).

    Attributes:
      num_features: M, bins of a frame of the spectrogram; 161 are those of 20 ms at 16 kHz.
      conv_channels: of each convolution (section 3.5).
      conv_sizes, conv_strides: of each, along time and along frequency.
      cell: "relu" for plain recurrent layers with the clipped ReLU (section 3.1), "gru" (3.4) or
        "lstm".
      hidden_size: H, of a recurrent layer; its two directions are summed.
      num_hidden_layers: recurrent layers.
      bidirectional: whether they have both directions.
      lookahead: frames that are looked ahead at behind layers of one direction (section 3.7: its
        row convolution); 0 for none.
      dense_sizes: of the layers behind them.
      clip: of the ReLU, min(max(x, 0), clip).
      hidden_dropout: of what every recurrent and dense layer gets.
      batch_norm_eps, batch_norm_momentum: of the normalisations (section 3.2).
      vocab_size: V, symbols with the blank one.
      pad_token_id: the blank symbol.
    """

    num_features: int = 161
    conv_channels: tuple[int, ...] = (32, 32, 96)
    conv_sizes: Sizes = ((11, 41), (11, 21), (11, 21))
    conv_strides: Sizes = ((2, 2), (1, 2), (1, 2))
    cell: str = "relu"
    hidden_size: int = 1760
    num_hidden_layers: int = 7
    bidirectional: bool = True
    lookahead: int = 0
    dense_sizes: tuple[int, ...] = (1760,)
    clip: float = 20.0
    hidden_dropout: float = 0.0
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float = 0.1
    vocab_size: int = 29
    pad_token_id: int = 0
    ctc_loss_reduction: str = "sum"  # read by the task, not by the model
    ctc_zero_infinity: bool = False

    def __post_init__(self) -> None:
        problems = []
        counts = {len(self.conv_channels), len(self.conv_sizes), len(self.conv_strides)}
        if len(counts) > 1:
            problems.append(
                f"conv_channels={self.conv_channels}, conv_sizes={self.conv_sizes} and "
                f"conv_strides={self.conv_strides} must have as many entries"
            )
        for name in ("conv_sizes", "conv_strides"):
            if any(len(size) != 2 or min(size) < 1 for size in getattr(self, name)):
                problems.append(
                    f"{name}={getattr(self, name)} must be positive pairs, of time and frequency"
                )
        if any(side % 2 == 0 for size in self.conv_sizes for side in size):
            problems.append(f"conv_sizes={self.conv_sizes} must be odd, to have a middle")
        for name in ("conv_channels", "dense_sizes"):
            if any(size < 1 for size in getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)} must be positive")
        for name in ("num_features", "hidden_size", "num_hidden_layers", "vocab_size", "clip"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        if self.cell not in CELLS:
            problems.append(f"cell={self.cell!r} must be one of {CELLS}")
        if self.lookahead < 0 or (self.lookahead and self.bidirectional):
            problems.append(
                f"lookahead={self.lookahead} must be 0 with bidirectional=True, which hear the "
                "rest already, and at least 0"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            problems.append(
                f"pad_token_id={self.pad_token_id}, the blank symbol, must be one of the "
                f"vocab_size={self.vocab_size}"
            )
        refuse(self, problems)


MODEL_TYPE = "deepspeech2"
HEADS = {"model": "DeepSpeech2Model", "ctc": "DeepSpeech2ForCTC"}
VARIANTS = {
    "tiny": Config(
        num_features=13, conv_channels=(3, 2), conv_sizes=((5, 7), (3, 5)),
        conv_strides=((2, 2), (1, 2)), hidden_size=8, num_hidden_layers=2, dense_sizes=(7,),
        vocab_size=11, hidden_dropout=0.1,
    ),
    # Amodei et al. 2015: seven plain layers of both directions behind three convolutions or two,
    # with about 70 and 68 million parameters.
    "70m": Config(),
    "68m": Config(
        conv_channels=(32, 32), conv_sizes=((11, 41), (11, 21)), conv_strides=((2, 2), (1, 2)),
    ),
}  # fmt: skip


def output_lengths(config: Config, lengths: Any) -> Any:
    """How many frames of logits so many frames of input have, an int or an array of them."""
    for stride, _ in config.conv_strides:
        lengths = -(-lengths // stride)  # rounded up
    return lengths


def _clipped(x: Array, clip: float) -> Array:
    return jnp.clip(x, 0.0, clip)


def _clipped_step(clip: float, given: Array, product: Array, state: State) -> State:
    return (_clipped(given + product, clip),)


@functools.cache
def cell_of(config: Config) -> Cell:
    """What the recurrent layers compute."""
    cells = {"gru": GRU, "lstm": LSTM}
    return cells.get(config.cell) or Cell(1, 1, functools.partial(_clipped_step, config.clip))


def _norm(config: Config, train: bool, name: str) -> BatchNorm:
    return BatchNorm(train, config.batch_norm_eps, config.batch_norm_momentum, name=name)


class ConvLayer(nn.Module):
    """A convolution over time and frequency, normed and clipped; padding stays 0."""

    config: Config
    number: int
    train: bool

    @nn.compact
    def __call__(self, x: Array, keep: Array) -> Array:  # [B, T, M, I] -> [B, T', M', O]
        config, number = self.config, self.number
        conv = Conv(
            config.conv_channels[number],
            config.conv_sizes[number],
            config.conv_strides[number],
            name="conv",
        )
        x = _norm(config, self.train, "norm")(conv(x), keep)
        return jnp.where(keep[..., None, None], _clipped(x, config.clip), 0)


class RecurrentLayer(nn.Module):
    """A sum of directions that share their inputs' product, which is normed (section 3.2)."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array, keep: Array) -> Array:  # [B, T, I] -> [B, T, H]
        config, cell = self.config, cell_of(self.config)
        given = Dense(cell.gates * config.hidden_size, False, name="input")(x)
        given = _norm(config, self.train, "norm")(given, keep)
        total = None
        for number, name in enumerate(("forward", "backward")[: 1 + config.bidirectional]):
            y, _ = Recurrence(cell, config.hidden_size, bool(number), False, name=name)(given, keep)
            total = y if total is None else total + y
        assert total is not None  # there is a direction
        return total


class Lookahead(nn.Module):
    """Each feature from its values now and in the next frames (section 3.7)."""

    frames: int

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, H] -> [B, T, H]
        width, around = x.shape[-1], ((0, self.frames), (0, 0))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        size = self.frames + 1, 1
        conv = Conv(width, size, 1, init, around=around, groups=width, name="conv")
        return conv(x[:, :, None])[:, :, 0]


class DenseLayer(nn.Module):
    """A dense layer, normed and clipped."""

    config: Config
    features: int
    train: bool

    @nn.compact
    def __call__(self, x: Array, keep: Array) -> Array:  # [B, T, I] -> [B, T, O]
        y = _norm(self.config, self.train, "norm")(
            Dense(self.features, False, name="dense")(x), keep
        )
        return _clipped(y, self.config.clip)


class Model(nn.Module):
    """Deep Speech 2 with one head.

    Args:
        config: the family's.
        head: "model" or "ctc".
        scan: has no effect: the layers differ in shape.
        remat: what is recomputed of the recurrent layers, as `fmjax.types.Remat` says.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    def frames(self, lengths: Any) -> Any:
        """How many frames of logits so many frames of input have; see `output_lengths`."""
        return output_lengths(self.config, lengths)

    @nn.compact
    def __call__(
        self,
        input_features: Array,
        attention_mask: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            input_features: [B, T, M], frames of a spectrogram.
            attention_mask: [B, T], 1 = sound, then 0 = padding; None keeps everything.
            train: whether dropout is on, which needs ``rngs={"dropout": key}``, and batch
                normalisation uses the batch's own statistics and moves the running ones, which
                needs ``mutable=["batch_stats"]``.
            output_hidden_states: whether ``hidden_states`` is returned: what the convolutions
                make, and each recurrent layer's output.
            output_attentions: has no effect: there are none.

        Returns:
            ``last_hidden_state`` [B, T', H], or ``logits`` [B, T', V] float32; and
            ``logit_lengths`` int [B], how many of the T' frames are no padding (`output_lengths`).

        Raises:
            ValueError: an unknown head, or inputs of the wrong shape.
        """
        config = self.config
        check_head(self, HEADS)
        if input_features.ndim != 3 or input_features.shape[-1] != config.num_features:
            raise ValueError(
                f"input_features have the shape {input_features.shape}; they must be [B, T, "
                f"{config.num_features}]"
            )
        batch, frames = input_features.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, frames):
            raise ValueError(
                f"attention_mask has the shape {attention_mask.shape}; it must be {(batch, frames)}"
            )
        lengths = jnp.full(batch, frames)
        if attention_mask is not None:
            lengths = attention_mask.astype(jnp.int32).sum(axis=-1)
        x = jnp.where(until(lengths, frames)[..., None], input_features, 0)[..., None]
        for number, (stride, _) in enumerate(config.conv_strides):
            lengths, frames = -(-lengths // stride), -(-frames // stride)
            x = ConvLayer(config, number, train, name=f"conv_{number}")(x, until(lengths, frames))
        keep = until(lengths, frames)
        x = jnp.swapaxes(x, 2, 3).reshape(batch, frames, -1)  # [B, T', C * M'], PyTorch's order
        states = [x]
        layer = recomputed(RecurrentLayer, self.remat)
        for number in range(config.num_hidden_layers):
            x = Dropout(config.hidden_dropout)(x, train)
            x = layer(config, train, name=f"recurrent_{number}")(x, keep)
            states.append(x)
        if config.lookahead:
            x = Lookahead(config.lookahead, name="lookahead")(x)
        for number, features in enumerate(config.dense_sizes):
            x = Dropout(config.hidden_dropout)(x, train)
            x = DenseLayer(config, features, train, name=f"dense_{number}")(x, keep)
        out = Output(logit_lengths=lengths, state_mask=keep)
        if output_hidden_states:
            out = dataclasses.replace(out, hidden_states=tuple(states))
        if self.head == "model":
            return dataclasses.replace(out, last_hidden_state=x)
        x = Dropout(config.hidden_dropout)(x, train)
        logits = Dense(config.vocab_size, name="head")(x)
        return dataclasses.replace(out, logits=logits.astype(jnp.float32))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"input_features": jnp.zeros((1, 4, config.num_features))}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table: list[Rule] = []
    for i in range(len(config.conv_channels)):
        table += conv_norm_rules(f"conv_{i}", f"conv.{i}.conv", f"conv.{i}.norm")
    for i in range(config.num_hidden_layers):
        here, there = f"recurrent_{i}", f"recurrent.{i}"
        for name in ("input", "forward", "backward")[: 2 + config.bidirectional]:
            table.append(Rule(f"params/{here}/{name}/kernel", f"{there}.{name}.weight", TRANSPOSE))
        table += batch_norm_rules(f"{here}/norm", f"{there}.norm")
    if config.lookahead:
        table.append(Rule("params/lookahead/conv/kernel", "lookahead.weight", CONV2D))
    for i in range(len(config.dense_sizes)):
        table += dense_rules(f"dense_{i}/dense", f"dense.{i}.dense", bias=False)
        table += batch_norm_rules(f"dense_{i}/norm", f"dense.{i}.norm")
    return table + (dense_rules("head", "head") if head == "ctc" else [])
