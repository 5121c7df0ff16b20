"""Any encoder with any decoder that cross-attends (Rothe et al. 2020, arXiv:1907.12461): BERT and
GPT-2, two BERTs, ... HF "encoder-decoder"; parent of vision_encoder_decoder and
speech_encoder_decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import (
    PART,
    arguments_of,
    bart,
    bert,
    family_for,
    fields_of,
    gpt2,
    trocr,
    width_of,
)
from fmjax.nn.checks import refuse
from fmjax.nn.linear import Dense
from fmjax.nn.seq2seq import EncoderDecoder
from fmjax.nn.sides import Tokens
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, dense_rules, nested_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        encoder: the Config of any family whose head "model" reads ``input_ids``.
        decoder: of any whose head "causal_lm" cross-attends, with ``add_cross_attention=True``.
        pad_token_id, decoder_start_token_id: for whoever makes the decoder's inputs.
    """

    encoder: Any = dataclasses.field(default=bert.Config(), metadata=PART)
    decoder: Any = dataclasses.field(
        default=bert.Config(is_decoder=True, add_cross_attention=True), metadata=PART
    )
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    reads: ClassVar[str] = "input_ids"
    """What the encoder is given."""

    def __post_init__(self) -> None:
        problems = []
        for side in ("encoder", "decoder"):
            config = getattr(self, side)
            family = family_for(config)
            if not isinstance(config, family.Config):
                problems.append(f"{side}={config!r} is no family's Config")
        encoder, decoder = family_for(self.encoder), family_for(self.decoder)
        always = isinstance(self.decoder, bart.PairConfig | trocr.Config)
        attends = {"add_cross_attention": always}
        attends |= fields_of(self.decoder)
        if "causal_lm" not in decoder.HEADS:
            problems.append(f"{decoder.MODEL_TYPE} has no head causal_lm to decode with")
        elif not attends["add_cross_attention"]:
            problems.append("the decoder's config must have add_cross_attention=True")
        if fields_of(self.encoder).get("is_decoder", False):
            problems.append("the encoder's config must have is_decoder=False")
        if isinstance(self.encoder, bart.PairConfig) or "encoder" in encoder.HEADS:
            problems.append(f"{encoder.MODEL_TYPE} has a decoder of its own")
        elif self.reads not in arguments_of(encoder):
            problems.append(f"{encoder.MODEL_TYPE} reads no {self.reads}")
        if not problems and self.read_width not in (None, self.widths[0]):
            problems.append(
                f"the decoder's cross_attention_hidden_size={self.read_width} must be the "
                f"encoder's width, {self.widths[0]}"
            )
        refuse(self, problems)

    @property
    def vocab_size(self) -> int:
        """V of the decoder."""
        return self.decoder.vocab_size

    @property
    def widths(self) -> tuple[int, int]:
        """D of the encoder and of the decoder."""
        return width_of(self.encoder), width_of(self.decoder)

    @property
    def read_width(self) -> int | None:
        """D of the states that the decoder says it reads as they are; None where it does not."""
        return fields_of(self.decoder).get("cross_attention_hidden_size")

    @property
    def projected(self) -> bool:
        """Whether a dense layer brings the encoder's states to the decoder's width."""
        return self.read_width is None and self.widths[0] != self.widths[1]


MODEL_TYPE = "encoder-decoder"
# Files name one class, which is read as the last head that it is.
HEADS = {"model": "EncoderDecoderModel", "seq2seq_lm": "EncoderDecoderModel"}


def _bert_pair(layers: int, width: int, **fields: Any) -> Config:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        **fields,
    }
    decoder = bert.Config(**sizes, is_decoder=True, add_cross_attention=True)
    return Config(bert.Config(**sizes), decoder, pad_token_id=0)


VARIANTS = {
    "tiny": Config(
        bert.Config(
            vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        ),
        gpt2.Config(
            vocab_size=99, n_positions=32, n_embd=36, n_layer=2, n_head=3, add_cross_attention=True,
        ),
        pad_token_id=0, decoder_start_token_id=1,
    ),
    # Rothe et al. 2020, section 3: BERT2BERT.
    "bert2bert-base": _bert_pair(12, 768),
    "bert2bert-large": _bert_pair(24, 1024),
    # BERT-base and GPT-2 small, whose cross-attention is new.
    "bert2gpt2-base": Config(bert.Config(), gpt2.Config(add_cross_attention=True)),
}  # fmt: skip


class Model(EncoderDecoder):
    """Two models with one head; see `fmjax.nn.seq2seq.EncoderDecoder`.

    Where their widths differ, a dense layer brings the encoder's states to the decoder's.
    """

    def make_part(self, config: Any, head: str, **fields: Any) -> nn.Module:
        """One of the two models."""
        return family_for(config).Model(
            config, head=head, scan=self.scan, remat=self.remat, **fields
        )

    @property
    def side_positions(self) -> tuple[int | None, int | None]:
        encoder = self.make_part(self.config.encoder, "model", parent=None)
        decoder = self.make_part(self.config.decoder, "causal_lm", parent=None)
        return encoder.max_positions, decoder.max_positions  # pyright: ignore[reportAttributeAccessIssue]

    def setup(self) -> None:
        self.encoder = self.make_part(self.config.encoder, "model")
        self.decoder = self.make_part(self.config.decoder, "causal_lm")
        if self.config.projected:
            width = self.config.widths[1]
            self.enc_to_dec_proj = Dense(width, kernel_init=nn.initializers.normal(0.02))

    def run_encoder(self, side: Tokens) -> Output:
        out = self.encoder(
            input_ids=side.ids,
            attention_mask=side.attention_mask,
            inputs_embeds=side.embeds,
            train=side.train,
            output_hidden_states=side.output_hidden_states,
            output_attentions=side.output_attentions,
        )
        return dataclasses.replace(out, pooler_output=None)

    def run_decoder(
        self, side: Tokens, encoder: Array | None, encoder_mask: Array | None, cache: PyTree
    ) -> Output:
        if encoder is not None and self.config.projected:
            encoder = self.enc_to_dec_proj(encoder)
        return self.decoder(
            input_ids=side.ids,
            attention_mask=side.attention_mask,
            inputs_embeds=side.embeds,
            encoder_hidden_states=encoder,
            encoder_attention_mask=None if encoder_mask is None else encoder_mask[:, 0, 0],
            cache=cache,
            train=side.train,
            output_hidden_states=side.output_hidden_states,
            output_attentions=side.output_attentions,
            output_logits=False,
        )

    def unembed(self, hidden: Array) -> Array:
        return self.decoder.unembed(hidden)

    def head_output(
        self,
        decoded: Output,
        input_ids: Array | None,
        attention_mask: Array | None,
        train: bool,
        output_logits: bool,
    ) -> Output:
        out = super().head_output(decoded, input_ids, attention_mask, train, output_logits)
        if self.is_initializing() and out.logits is None:
            # The bare model has the output matrix too, as PyTorch's one class.
            self.unembed(out.last_hidden_state)  # pyright: ignore[reportArgumentType]
        return out

    def init_cache(
        self, batch_size: int, length: int, encoder_length: int, dtype: Any = jnp.float32
    ) -> PyTree:
        decoder = self.make_part(self.config.decoder, "causal_lm", parent=None)
        return decoder.init_cache(  # pyright: ignore[reportAttributeAccessIssue]
            batch_size, length, encoder_length, dtype=dtype
        )


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    token = jnp.zeros((1, 1), jnp.int32)
    return {"input_ids": token, "decoder_input_ids": token}


PREFIX = ""
FIXED: dict[str, Any] = {"is_encoder_decoder": True, "vocab_size": ..., "tie_word_embeddings": ...}
# Of the parts, as their own files have them.
IGNORED = (*(bert.IGNORED), *(gpt2.IGNORED))


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell of its parts."""

    def told(side: str, head: str) -> Any:
        place = f"{side}."
        own = [name.removeprefix(place) for name in names if name.startswith(place)]
        part = getattr(config, side)
        return family_for(part).from_tensors(part, head, own)

    return dataclasses.replace(
        config, encoder=told("encoder", "model"), decoder=told("decoder", "causal_lm")
    )


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    encoder = family_for(config.encoder).rules(config.encoder, "model")
    decoder = family_for(config.decoder).rules(config.decoder, "causal_lm")
    table = nested_rules(encoder, "encoder") + nested_rules(decoder, "decoder")
    if config.projected:
        table += dense_rules("enc_to_dec_proj", "enc_to_dec_proj")
    return table
