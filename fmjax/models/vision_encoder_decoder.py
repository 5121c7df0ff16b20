"""Any encoder of images with any decoder that cross-attends: captions (Vinyals et al. 2015,
arXiv:1411.4555; Xu et al. 2015, arXiv:1502.03044) and text recognition (TrOCR, Li et al. 2021,
arXiv:2109.10282; Donut, Kim et al. 2022, arXiv:2111.15664). HF "vision-encoder-decoder".

The encoder may be a convolutional network too, whose last feature map [B, X, Y, D] the decoder
reads row by row; PyTorch's class takes transformers alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fmjax.models import PART, bert, encoder_decoder, family_for, gpt2, swin, vit
from fmjax.models.encoder_decoder import from_tensors, rules
from fmjax.nn.seq2seq import check_source
from fmjax.nn.sides import Flags
from fmjax.types import Output, PyTree

__all__ = ["from_tensors", "rules"]


@dataclasses.dataclass(frozen=True)
class Config(encoder_decoder.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        encoder: the Config of any family whose head "model" reads ``pixel_values``.
        decoder, pad_token_id, decoder_start_token_id: see `fmjax.models.encoder_decoder.Config`.
    """

    encoder: Any = dataclasses.field(default=vit.Config(), metadata=PART)

    reads: ClassVar[str] = "pixel_values"

    @property
    def num_channels(self) -> int:
        """C of the pictures."""
        return self.encoder.num_channels


MODEL_TYPE = "vision-encoder-decoder"
HEADS = {"model": "VisionEncoderDecoderModel", "seq2seq_lm": "VisionEncoderDecoderModel"}

GPT2 = gpt2.Config(add_cross_attention=True)
VARIANTS = {
    "tiny": Config(
        vit.Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            patch_size=4, image_size=8, encoder_stride=4,
        ),
        encoder_decoder.VARIANTS["tiny"].decoder,
        pad_token_id=0, decoder_start_token_id=1,
    ),
    # The pairs that Hugging Face's documentation begins with.
    "vit-bert-base": Config(),
    "vit-gpt2-base": Config(vit.Config(), GPT2, pad_token_id=50256, decoder_start_token_id=50256),
    "swin-bert-base": Config(
        swin.VARIANTS["b4-w7"], bert.Config(is_decoder=True, add_cross_attention=True)
    ),
}  # fmt: skip


class Model(encoder_decoder.Model):
    """Two models with one head; see `fmjax.models.encoder_decoder.Model`."""

    @property
    def side_positions(self) -> tuple[int | None, int | None]:
        decoder = self.make_part(self.config.decoder, "causal_lm", parent=None)
        return None, decoder.max_positions  # pyright: ignore[reportAttributeAccessIssue]

    def encode(
        self,
        pixel_values: Array,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """The encoder alone: ``last_hidden_state`` [B, S, D] and what else is asked for."""
        out = self.encoder(
            pixel_values=pixel_values,
            train=train,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        states = out.last_hidden_state
        states = states.reshape(states.shape[0], -1, states.shape[-1])  # of maps, row by row
        return dataclasses.replace(out, last_hidden_state=states, pooler_output=None)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        pixel_values: Array | None = None,
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
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], as the encoder takes them.
            attention_mask: [B, S], 1 for the encoder's states that the decoder sees; None is all,
                PyTorch's only way.
            decoder_input_ids, decoder_attention_mask, encoder_outputs, decoder_inputs_embeds,
                cache, train, output_hidden_states, output_attentions, output_logits: see
                `fmjax.nn.seq2seq.EncoderDecoder`.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        flags = Flags(train, output_hidden_states, output_attentions)
        check_source(cache, pixel_values=pixel_values, encoder_outputs=encoder_outputs)
        encoded = Output(last_hidden_state=encoder_outputs)
        if pixel_values is not None:
            encoded = self.encode(pixel_values, **flags._asdict())
        return self.decode(
            encoded, attention_mask, decoder_input_ids, decoder_attention_mask,
            decoder_inputs_embeds, cache, flags,
            output_logits=output_logits,
        )  # fmt: skip


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    images = family_for(config.encoder).inputs(config.encoder, "model")
    return {**images, "decoder_input_ids": jnp.zeros((1, 1), jnp.int32)}


PREFIX = ""
FIXED = encoder_decoder.FIXED
IGNORED = (*encoder_decoder.IGNORED, *swin.IGNORED)  # BEiT's are Swin's
