"""Any encoder of sounds with any decoder that cross-attends: transcripts and translations of speech
(Wang et al. 2021, arXiv:2104.06678; XLS-R, Babu et al. 2021, arXiv:2111.09296). HF
"speech-encoder-decoder".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fmjax.models import (
    PART,
    bert,
    encoder_decoder,
    family_for,
    fields_of,
    mbart,
    wav2vec2,
    width_of,
)
from fmjax.models.encoder_decoder import from_tensors, rules
from fmjax.nn.seq2seq import check_source
from fmjax.nn.sides import Flags
from fmjax.types import Output, PyTree

__all__ = ["from_tensors", "rules"]


@dataclasses.dataclass(frozen=True)
class Config(encoder_decoder.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        encoder: the Config of any family whose head "model" reads ``input_values``.
        decoder, pad_token_id, decoder_start_token_id: see `fmjax.models.encoder_decoder.Config`.
    """

    encoder: Any = dataclasses.field(default=wav2vec2.Config(), metadata=PART)

    reads: ClassVar[str] = "input_values"

    @property
    def widths(self) -> tuple[int, int]:
        encoder = fields_of(self.encoder).get("output_hidden_size", width_of(self.encoder))
        return encoder, width_of(self.decoder)


MODEL_TYPE = "speech-encoder-decoder"
HEADS = {"model": "SpeechEncoderDecoderModel", "seq2seq_lm": "SpeechEncoderDecoderModel"}
VARIANTS = {
    "tiny": Config(
        wav2vec2.VARIANTS["tiny"], encoder_decoder.VARIANTS["tiny"].decoder,
        pad_token_id=0, decoder_start_token_id=1,
    ),
    # The pair that Hugging Face's documentation begins with.
    "wav2vec2-bert-base": Config(
        wav2vec2.VARIANTS["base"], bert.Config(is_decoder=True, add_cross_attention=True)
    ),
    # Babu et al. 2021, section 4.2: XLS-R and mBART's decoder, joined by three convolutions.
    "xls-r-mbart-large": Config(
        dataclasses.replace(
            wav2vec2.VARIANTS["large"], do_stable_layer_norm=True, feat_extract_norm="layer",
            conv_bias=True, add_adapter=True,
        ),
        mbart.VARIANTS["large-50"],
        pad_token_id=1, decoder_start_token_id=2,
    ),
}  # fmt: skip


class Model(encoder_decoder.Model):
    """Two models with one head; see `fmjax.models.encoder_decoder.Model`."""

    @property
    def side_positions(self) -> tuple[int | None, int | None]:
        decoder = self.make_part(self.config.decoder, "causal_lm", parent=None)
        return None, decoder.max_positions  # pyright: ignore[reportAttributeAccessIssue]

    def state_mask(self, attention_mask: Array, length: int) -> Array:
        encoder = self.make_part(self.config.encoder, "model", parent=None)
        return encoder.frame_mask(attention_mask, length)  # pyright: ignore[reportAttributeAccessIssue]

    def encode(
        self,
        input_values: Array,
        attention_mask: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """The encoder alone: ``last_hidden_state`` [B, S, D] and what else is asked for."""
        out = self.encoder(
            input_values=input_values,
            attention_mask=attention_mask,
            train=train,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return dataclasses.replace(out, pooler_output=None)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_values: Array | None = None,
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
            input_values: [B, T], samples as the encoder takes them.
            attention_mask: [B, T], 1 for samples and 0 for the padding after them; where no samples
                are given, [B, S] over the encoder's states.
            decoder_input_ids, decoder_attention_mask, encoder_outputs, decoder_inputs_embeds,
                cache, train, output_hidden_states, output_attentions, output_logits: see
                `fmjax.nn.seq2seq.EncoderDecoder`.

        Returns:
            As there, but that ``encoder_last_hidden_state`` is what the decoder sees, after a
            projection if there is one, as PyTorch's class has it (that of images has it before).

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        flags = Flags(train, output_hidden_states, output_attentions)
        check_source(cache, input_values=input_values, encoder_outputs=encoder_outputs)
        encoded = Output(last_hidden_state=encoder_outputs)
        if input_values is not None:
            encoded = self.encode(input_values, attention_mask, **flags._asdict())
            if attention_mask is not None:
                states = encoded.last_hidden_state
                assert states is not None  # every encoder has one
                attention_mask = self.state_mask(attention_mask, states.shape[1])
        out = self.decode(
            encoded, attention_mask, decoder_input_ids, decoder_attention_mask,
            decoder_inputs_embeds, cache, flags,
            output_logits=output_logits,
        )  # fmt: skip
        states = out.encoder_last_hidden_state
        if states is None or self.config.widths[0] == self.config.widths[1]:
            return out
        return dataclasses.replace(out, encoder_last_hidden_state=self.enc_to_dec_proj(states))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    sounds = family_for(config.encoder).inputs(config.encoder, "model")
    return {**sounds, "decoder_input_ids": jnp.zeros((1, 1), jnp.int32)}


PREFIX = ""
FIXED = encoder_decoder.FIXED
IGNORED = (*encoder_decoder.IGNORED, *wav2vec2.IGNORED)
