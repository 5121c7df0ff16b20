"""Speech-Transformer (Dong, Xu & Xu 2018, "Speech-Transformer: a no-recurrence sequence-to-sequence
model for speech recognition"): convolutions over frames of sound, and the Transformer.

With the head "ctc" its encoder alone scores symbols at each frame, with "seq2seq_ctc" the decoder
does besides (Watanabe et al. 2017, "Hybrid CTC/attention architecture for end-to-end speech
recognition"). The paper's attention along time and frequency, between convolutions and encoder, is
left out.

Hugging Face has no such class: ``model_type`` "speech_transformer" is ours. Tensors are named as
those of torch.nn.Transformer; see `fmjax.models.transformer`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, transformer
from fmjax.nn.conv import Conv
from fmjax.nn.linear import Dense
from fmjax.nn.speech import until
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, conv_rules, dense_rules

STRIDE = 2  # of each convolution, along both axes
CONVOLUTIONS = 2


@dataclasses.dataclass(frozen=True)
class Config(transformer.Config):
    """The Transformer's fields and, of the convolutions, ours.

    Attributes:
      num_mel_bins: M, of a frame.
      conv_channels: of both convolutions, 3 x 3.
      max_position_embeddings: positions that either side has; of the encoder they are of four
        frames each.
    """

    vocab_size: int = 32
    num_mel_bins: int = 80
    conv_channels: int = 64
    max_position_embeddings: int = 2048
    d_model: int = dataclasses.field(default=256, metadata={"also": ("hidden_size",)})
    encoder_layers: int = dataclasses.field(default=12, metadata={"also": ("num_hidden_layers",)})
    encoder_attention_heads: int = dataclasses.field(
        default=4, metadata={"also": ("num_attention_heads",)}
    )
    decoder_attention_heads: int = 4
    ctc_loss_reduction: str = "sum"  # these two are read by the task, not by the model
    ctc_zero_infinity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("num_mel_bins", "conv_channels")
            if getattr(self, name) < 1
        ]
        if not self.tie_word_embeddings:
            problems.append("tie_word_embeddings=False is not supported: one matrix is the output")
        if problems:
            raise ValueError("speech_transformer config: " + "; ".join(problems))


MODEL_TYPE = "speech_transformer"
HEADS = {
    "model": "SpeechTransformerModel",
    "seq2seq_lm": "SpeechTransformerForConditionalGeneration",
    "ctc": "SpeechTransformerForCTC",
    "seq2seq_ctc": "SpeechTransformerForJointCTCAttention",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=19, num_mel_bins=10, conv_channels=3, max_position_embeddings=32, d_model=24,
        encoder_layers=2, encoder_ffn_dim=32, encoder_attention_heads=2, decoder_layers=2,
        decoder_ffn_dim=28, decoder_attention_heads=3,
    ),
    "base": Config(encoder_layers=6, encoder_ffn_dim=1024, decoder_ffn_dim=1024),
    "big": Config(),
}  # fmt: skip


def output_lengths(lengths: Any) -> Any:
    """How many states so many frames have, an int or an array of them."""
    for _ in range(CONVOLUTIONS):
        lengths = -(-lengths // STRIDE)  # rounded up
    return lengths


class Front(nn.Module):
    """Two convolutions that leave a quarter of the frames, as vectors: [B, T, M] -> [B, S, D]."""

    config: Config

    @nn.compact
    def __call__(self, features: Array, lengths: Array) -> Array:
        x = features[..., None]
        for number in range(CONVOLUTIONS):
            x = jnp.where(until(lengths, x.shape[1])[..., None, None], x, 0)
            conv = Conv(self.config.conv_channels, 3, STRIDE, use_bias=True, name=f"conv_{number}")
            x, lengths = jax.nn.relu(conv(x)), -(-lengths // STRIDE)
        batch, frames = x.shape[:2]
        x = jnp.swapaxes(x, 2, 3).reshape(batch, frames, -1)  # [B, S, C * M'], PyTorch's order
        init = nn.initializers.xavier_uniform()
        return Dense(self.config.d_model, True, init, name="projection")(x)


class Model(transformer.Model):
    """Speech-Transformer with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""

    @property
    def shared_words(self) -> bool:
        return True  # there is but one table, the decoder's

    @property
    def encoder_alone(self) -> bool:
        return self.head == "ctc"

    def setup(self) -> None:
        super().setup()
        self.front = Front(self.config)
        if self.head in ("ctc", "seq2seq_ctc"):
            self.ctc_head = Dense(self.config.vocab_size, True, self.head_init)

    def unembed(self, hidden: Array) -> Array:
        """Logits of the decoder's last hidden states: [..., D] -> [..., V] float32."""
        return self.word.attend(hidden)

    def frames(self, lengths: Any) -> Any:
        """How many states so many frames have; see `output_lengths`."""
        return output_lengths(lengths)

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_features: Array,
        attention_mask: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """The encoder alone: ``last_hidden_state`` [B, S, D] and what else is asked for.

        Args:
            input_features: [B, T, M].
            attention_mask: [B, T], 1 = sound, then 0 = padding; None keeps everything.

        Raises:
            ValueError: frames or a mask of another shape.
        """
        bins = self.config.num_mel_bins
        if input_features.ndim != 3 or input_features.shape[-1] != bins:
            raise ValueError(
                f"input_features have the shape {input_features.shape}; they must be [B, T, {bins}]"
            )
        batch, frames = input_features.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, frames):
            raise ValueError(
                f"attention_mask has the shape {attention_mask.shape}; it must be {(batch, frames)}"
            )
        lengths = lengths_of(attention_mask, batch, frames)
        states = self.front(input_features, lengths)
        mask = None
        if attention_mask is not None:
            mask = self.state_mask(attention_mask, states.shape[1])
        return super().encode(
            None, mask, states, train=train, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )  # fmt: skip

    def state_mask(self, attention_mask: Array, length: int) -> Array:
        lengths = output_lengths(lengths_of(attention_mask, *attention_mask.shape))
        return until(lengths, length).astype(jnp.int32)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_features: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        encoder_outputs: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; the decoder's arguments are those of `fmjax.nn.seq2seq.EncoderDecoder`.

        Args:
            input_features: [B, T, M], frames of sound.
            attention_mask: [B, T] of the frames, 1 = sound, then 0 = padding; where no frames are
                given, [B, S] over the encoder's states.

        Returns:
            Of the head "ctc" ``logits`` [B, S, V] and ``logit_lengths`` [B]; of "seq2seq_ctc" the
            decoder's ``logits`` [B, T, V], the encoder's ``ctc_logits`` [B, S, V] and
            ``logit_lengths``.

        Raises:
            ValueError: inputs that contradict each other, the head or the config.
        """
        flags: dict[str, Any] = {
            "train": train, "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }  # fmt: skip
        of_decoder: dict[str, Any] = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "cache": cache,
        }
        if self.encoder_alone:
            if names := [name for name, value in of_decoder.items() if value is not None]:
                raise ValueError(f"the head 'ctc' does not take {', '.join(names)}")
            if input_features is None:
                raise ValueError("give input_features")
            out = self.encode(input_features, attention_mask, **flags)
            return self.with_ctc(out, input_features, attention_mask, field="logits")
        if (input_features is not None) + (encoder_outputs is not None) != 1 and cache is None:
            raise ValueError("give exactly one of input_features and encoder_outputs")
        encoded = Output(last_hidden_state=encoder_outputs)
        if input_features is not None:
            encoded = self.encode(input_features, attention_mask, **flags)
        mask, states = attention_mask, encoded.last_hidden_state
        if attention_mask is not None and input_features is not None:
            assert states is not None  # the encoder has made them
            mask = self.state_mask(attention_mask, states.shape[1])
        out = super().__call__(
            attention_mask=mask, **of_decoder | {"encoder_outputs": states},
            **flags, output_logits=output_logits,
        )  # fmt: skip
        out = dataclasses.replace(
            out,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )
        if self.head == "seq2seq_ctc" and input_features is not None:
            joint = self.with_ctc(encoded, input_features, attention_mask, field="ctc_logits")
            out = dataclasses.replace(
                out, ctc_logits=joint.ctc_logits, logit_lengths=joint.logit_lengths
            )
        return out

    def with_ctc(
        self, encoded: Output, features: Array, attention_mask: Array | None, *, field: str
    ) -> Output:
        """The encoder's output with scores of a symbol at each state, in a field."""
        batch, frames = features.shape[:2]
        lengths = output_lengths(lengths_of(attention_mask, batch, frames))
        hidden = encoded.last_hidden_state
        assert hidden is not None  # every encoder has one
        logits = {field: self.ctc_head(hidden).astype(jnp.float32)}
        mask = None if attention_mask is None else until(lengths, hidden.shape[1])
        return dataclasses.replace(
            encoded, last_hidden_state=None, state_mask=mask, logit_lengths=lengths, **logits
        )

    def head_output(
        self,
        decoded: Output,
        input_ids: Array | None,
        attention_mask: Array | None,
        train: bool,
        output_logits: bool,
    ) -> Output:
        hidden = decoded.last_hidden_state
        assert hidden is not None  # every decoder has one
        if self.head == "model" or not output_logits:
            return Output(last_hidden_state=hidden)
        return Output(logits=self.unembed(hidden))


def lengths_of(attention_mask: Array | None, batch: int, frames: int) -> Array:
    """int32 [B]: frames that are no padding."""
    if attention_mask is None:
        return jnp.full(batch, frames, jnp.int32)
    return attention_mask.astype(jnp.int32).sum(axis=-1)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    given = {"input_features": jnp.zeros((1, 8, config.num_mel_bins))}
    return given if head == "ctc" else given | {"decoder_input_ids": jnp.zeros((1, 1), jnp.int32)}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = transformer.rules(config, head)
    if head == "ctc":
        table = [rule for rule in table if rule.params[0].startswith("params/encoder/")]
    for number in range(CONVOLUTIONS):
        table += conv_rules(f"front/conv_{number}", f"front.conv.{number}", bias=True)
    table += dense_rules("front/projection", "front.projection")
    return table + (dense_rules("ctc_head", "ctc_head") if head in ("ctc", "seq2seq_ctc") else [])
