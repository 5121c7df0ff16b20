"""Whisper (Radford et al. 2022, arXiv:2212.04356): an encoder of log-mel frames and a decoder of
text, in BART's layers with the norms before them. HF "whisper".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import bart, config_alone, mbart
from fmjax.nn.activation import gelu
from fmjax.nn.conv1d import windows
from fmjax.nn.decoder import config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.nn.position import sinusoids_of
from fmjax.nn.product import affine
from fmjax.nn.sides import Shared, Tokens, Words
from fmjax.nn.spans import draw_spans
from fmjax.types import Output, PyTree
from fmjax.weights import CONV1D, TRANSPOSE, Rule, dense_rules

WINDOW = 3  # frames of either convolution; the second one takes every other


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = dataclasses.field(default=384, metadata={"also": ("hidden_size",)})
    encoder_layers: int = dataclasses.field(default=4, metadata={"also": ("num_hidden_layers",)})
    encoder_attention_heads: int = dataclasses.field(
        default=6, metadata={"also": ("num_attention_heads",)}
    )
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    max_source_positions: int = 1500
    max_target_positions: int = 448
    pad_token_id: int | None = 50256
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    decoder_start_token_id: int = 50257
    tie_word_embeddings: bool = True
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    apply_spec_augment: bool = False
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = [
            problem
            for problem in config_problems(
                self, width="d_model", heads="encoder_attention_heads", act="activation_function"
            )
            if "_min_masks=0 " not in problem
        ]
        if self.decoder_attention_heads > 0 and self.d_model % self.decoder_attention_heads:
            problems.append(
                f"d_model={self.d_model} is not a multiple of "
                f"decoder_attention_heads={self.decoder_attention_heads}"
            )
        if self.d_model % 2 or self.d_model < 4:
            problems.append(f"d_model={self.d_model} must be even and at least 4 for sinusoids")
        for axis, size in (("time", self.frames), ("feature", self.num_mel_bins)):
            share, span = (vars(self)[f"mask_{axis}_{name}"] for name in ("prob", "length"))
            if not 0 <= share <= 1:
                problems.append(f"mask_{axis}_prob={share} must be from 0 to 1")
            if self.apply_spec_augment and share > 0 and span > size:
                problems.append(f"mask_{axis}_length={span} is more than the {size} there are")
        if problems:
            raise ValueError("whisper config: " + "; ".join(problems))

    @property
    def frames(self) -> int:
        """T of ``input_features``."""
        return 2 * self.max_source_positions


MODEL_TYPE = "whisper"
HEADS = {
    "model": "WhisperModel",
    "seq2seq_lm": "WhisperForConditionalGeneration",
    "causal_lm": "WhisperForCausalLM",
    "audio_classification": "WhisperForAudioClassification",
}


def _sized(layers: int, width: int, heads: int, *, english: bool = False, **others: Any) -> Config:
    end = 50256 if english else 50257
    sizes: dict[str, Any] = {
        "encoder_layers": layers, "decoder_layers": layers, "d_model": width,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width,
        "vocab_size": 51864 if english else 51865, "decoder_start_token_id": end + 1,
        "pad_token_id": end, "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip
    return Config(**(sizes | others))


VARIANTS = {
    "tiny": Config(
        vocab_size=99, num_mel_bins=10, d_model=24, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_layers=2, decoder_attention_heads=3, decoder_ffn_dim=28,
        dropout=0.1, max_source_positions=12, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, use_weighted_layer_sum=True,
        classifier_proj_size=14, apply_spec_augment=True, mask_time_length=4, mask_feature_prob=0.1,
        mask_feature_length=2,
    ),
    # Radford et al. 2022, table 1, by the names of their files; the larger ones' of 2023 and 2024.
    "whisper-tiny": _sized(4, 384, 6),
    "whisper-tiny.en": _sized(4, 384, 6, english=True),
    "whisper-base": _sized(6, 512, 8),
    "whisper-base.en": _sized(6, 512, 8, english=True),
    "whisper-small": _sized(12, 768, 12),
    "whisper-small.en": _sized(12, 768, 12, english=True),
    "whisper-medium": _sized(24, 1024, 16),
    "whisper-medium.en": _sized(24, 1024, 16, english=True),
    "whisper-large": _sized(32, 1280, 20),
    "whisper-large-v2": _sized(32, 1280, 20),
    "whisper-large-v3": _sized(32, 1280, 20, num_mel_bins=128, vocab_size=51866),
    "whisper-large-v3-turbo": _sized(
        32, 1280, 20, num_mel_bins=128, vocab_size=51866, decoder_layers=4
    ),
}  # fmt: skip


class FrameConv(nn.Module):
    """A convolution over time, in its kernel's dtype, with a frame of zeros at either end.

    Args:
        features: O.
        stride: frames between windows.
        init_std: deviation of the initial kernel [X, I, O].
    """

    features: int
    stride: int
    init_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, I] -> [B, T / stride, O]
        shape = (WINDOW, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.normal(self.init_std), shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        x = jnp.pad(x.astype(kernel.dtype), ((0, 0), (1, 1), (0, 0)))
        # Frames of a window side by side and one product: XLA's CPU convolutions are slow.
        seen = windows(x, WINDOW, stride=self.stride)
        return affine(seen, kernel.reshape(-1, self.features), bias)


class Frames(nn.Module):
    """The encoder's front end: two convolutions, the second of half the rate, and sinusoids."""

    config: Config

    @nn.compact
    def __call__(self, features: Array, positions: Array, train: bool) -> Array:
        config = self.config  # [B, T, M] -> [B, S, D]
        x = gelu(FrameConv(config.d_model, 1, config.init_std, name="conv_1")(features))
        x = gelu(FrameConv(config.d_model, 2, config.init_std, name="conv_2")(x))
        # A constant of the file, no parameter: PyTorch does not train it either.
        places = jnp.arange(config.max_source_positions)
        table = self.variable("buffers", "sinusoids", lambda: sinusoids_of(places, config.d_model))
        x = x + jax.lax.stop_gradient(table.value).astype(x.dtype)
        return Dropout(config.dropout)(x, train)


class Positions(nn.Module):
    """The decoder's learned positions, added to word vectors."""

    config: Config

    @nn.compact
    def __call__(self, words: Array, positions: Array, train: bool) -> Array:  # [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.init_std)
        table = Embed(config.max_target_positions, config.d_model, init, name="position")
        return Dropout(config.dropout)(words + table(positions), train)


class Block(mbart.Block):
    """mBART's layers; keys have no bias."""

    key_bias = False


class ClassHead(nn.Module):
    """Scores of a recording: states, perhaps of all layers, projected, averaged over time, dense.

    Args:
        config: the family's.
    """

    config: Config

    @nn.compact
    def __call__(self, out: Output) -> Array:  # [B, S, D] -> [B, C] float32
        config, hidden = self.config, out.last_hidden_state
        init = nn.initializers.normal(config.init_std)
        if config.use_weighted_layer_sum:
            assert out.hidden_states is not None  # `Model.__call__` has asked for them
            count = len(out.hidden_states)
            even = nn.initializers.constant(1.0 / count)
            weights = jax.nn.softmax(parameter(self, "layer_weights", even, (count,)))
            hidden = jnp.einsum("L,LBSD->BSD", weights, jnp.stack(out.hidden_states))
        assert hidden is not None  # every encoder has one
        x = Dense(config.classifier_proj_size, True, init, name="projector")(hidden)
        x = jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)  # [B, P]
        return Dense(len(config.id2label), True, init, name="out")(x).astype(jnp.float32)


class Model(mbart.Model):
    """Whisper with one head; see `fmjax.nn.seq2seq.WithDecoderAlone`."""

    block = Block
    embeddings = Frames
    decoder_embeddings = Positions
    has_logits_bias = False

    @property
    def max_positions(self) -> int:
        return self.config.max_target_positions

    @property
    def side_positions(self) -> tuple[int, int]:
        return self.config.max_source_positions, self.config.max_target_positions

    @property
    def shared_words(self) -> bool:
        return True  # there is but one table, the decoder's

    def make_words(self, vocab_size: int) -> Words:
        return Words(vocab_size, self.config.d_model, self.word_init, self.config.pad_token_id)

    @property
    def encoder_alone(self) -> bool:
        return self.head == "audio_classification"

    def setup(self) -> None:
        super().setup()
        if self.encoder_alone:
            self.classifier = ClassHead(self.config, name="head")

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
            input_features: [B, T, M] log-mel frames, T twice ``max_source_positions``.
            attention_mask: [B, T], 1 = sound, 0 = padding: which frames SpecAugment counts. The
                encoder hears padding as silence.

        Raises:
            ValueError: frames of another shape.
        """
        config = self.config
        wanted = (config.frames, config.num_mel_bins)
        if input_features.ndim != 3 or input_features.shape[1:] != wanted:
            raise ValueError(
                f"input_features has shape {input_features.shape}; it must be [B, {wanted[0]}, "
                f"{wanted[1]}]: frames in time, then mel bins, padded with silence "
                "(PyTorch's have the last two axes the other way round)"
            )
        if train and config.apply_spec_augment and not self.encoder_alone:
            input_features = self.augment(input_features, attention_mask)
        side = Tokens(
            None, input_features, config.max_source_positions, config.max_source_positions, 0, None,
            train, output_hidden_states, output_attentions,
        )  # fmt: skip
        return self.run_encoder(side)

    def augment(self, features: Array, mask: Array | None) -> Array:
        """SpecAugment (Park et al. 2019, arXiv:1904.08779, section 2): spans of frames, and of mel
        bins, are zero.
        """
        config = self.config
        batch, frames, bins = features.shape
        lengths = jnp.full(batch, frames) if mask is None else mask.sum(axis=-1)
        for axis, size, limits in (
            (1, frames, lengths), (2, bins, jnp.full(batch, bins)),
        ):  # fmt: skip
            kind = "time" if axis == 1 else "feature"
            share, span, least = (
                vars(config)[f"mask_{kind}_{name}"] for name in ("prob", "length", "min_masks")
            )
            if share > 0.0:
                key = self.make_rng("dropout")
                dropped = draw_spans(key, limits, size, probability=share, length=span, least=least)
                dropped = jnp.expand_dims(dropped, 3 - axis)  # [B, T, 1] or [B, 1, M]
                features = jnp.where(dropped, 0.0, features)
        return features

    def run_encoder(self, side: Tokens) -> Output:
        assert side.embeds is not None  # `encode` has the frames there
        return self.encoder(side.embeds, side.positions(), side, Shared(None), None)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        return None

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_features: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        encoder_outputs: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        input_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        position_ids: Array | None = None,
        encoder_hidden_states: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; the decoder's arguments are those of `fmjax.nn.seq2seq.EncoderDecoder`.

        The head "causal_lm" takes `input_ids` or `inputs_embeds`, `attention_mask` of these,
        `position_ids`, `encoder_hidden_states` and `cache`; "audio_classification" takes
        `input_features`.

        Args:
            input_features: [B, T, M] log-mel frames; see `encode`.
            attention_mask: [B, T], of the frames; see `encode`. The decoder hears all of them.

        Raises:
            ValueError: inputs that contradict each other, the head or the config.
        """
        flags: dict[str, Any] = {"train": train, "output_attentions": output_attentions}
        of_tokens: dict[str, Any] = {
            "input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids,
            "encoder_hidden_states": encoder_hidden_states,
        }  # fmt: skip
        of_decoder: dict[str, Any] = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "decoder_inputs_embeds": decoder_inputs_embeds,
        }
        if self.alone:
            if input_features is not None:
                raise ValueError("the head 'causal_lm' does not take input_features")
            return super().__call__(
                attention_mask=attention_mask, cache=cache, **of_tokens, **of_decoder, **flags,
                output_hidden_states=output_hidden_states, output_logits=output_logits,
            )  # fmt: skip
        foreign = of_tokens | (of_decoder | {"cache": cache} if self.encoder_alone else {})
        if names := [name for name, value in foreign.items() if value is not None]:
            raise ValueError(f"the head {self.head!r} does not take {', '.join(names)}")
        if self.encoder_alone:
            if input_features is None:
                raise ValueError("give input_features")
            summed = self.config.use_weighted_layer_sum
            out = self.encode(
                input_features, attention_mask, **flags,
                output_hidden_states=output_hidden_states or summed,
            )  # fmt: skip
            logits = self.classifier(out)
            hidden = out.hidden_states if output_hidden_states else None
            return Output(
                logits=logits,
                state_mask=self.heard(attention_mask),
                hidden_states=hidden,
                attentions=out.attentions,
            )
        if (input_features is not None) + (encoder_outputs is not None) != 1 and cache is None:
            raise ValueError("give exactly one of input_features and encoder_outputs")
        encoded = Output(last_hidden_state=encoder_outputs)
        if input_features is not None:
            encoded = self.encode(
                input_features, attention_mask, output_hidden_states=output_hidden_states, **flags
            )
        out = super().__call__(
            **of_decoder | {"encoder_outputs": encoded.last_hidden_state}, cache=cache, **flags,
            output_hidden_states=output_hidden_states, output_logits=output_logits,
        )  # fmt: skip
        return dataclasses.replace(
            out,
            state_mask=self.heard(attention_mask),
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def heard(self, attention_mask: Array | None) -> Array | None:
        """bool [B, S]: all states, which are half as many as frames; None without a mask."""
        if attention_mask is None:
            return None
        return jnp.ones((len(attention_mask), self.config.max_source_positions), bool)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    token = jnp.zeros((1, 1), jnp.int32)
    if head == "causal_lm":
        return {"input_ids": token, "encoder_hidden_states": jnp.zeros((1, 1, config.d_model))}
    frames = {"input_features": jnp.zeros((1, config.frames, config.num_mel_bins))}
    return frames if head == "audio_classification" else frames | {"decoder_input_ids": token}


PREFIX = "model."
# scale_embedding is read by no class of PyTorch's; the others are of generating, or of training.
FIXED: dict[str, Any] = dict.fromkeys(
    """
    add_cross_attention forced_decoder_ids is_decoder is_encoder_decoder median_filter_width
    problem_type scale_embedding
    """.split(),
    ...,
)
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = PREFIX if head in ("seq2seq_lm", "causal_lm") else ""
    table = []
    if head != "audio_classification":
        tied = ("proj_out.weight",) if config.tie_word_embeddings else ()
        words = f"{body}decoder.embed_tokens.weight"
        table.append(Rule("params/embed/word/embedding", words, aliases=tied))
        table += stack_rules("decoder", body)
    if head != "causal_lm":
        for number in (1, 2):
            conv = f"encoder/embed/conv_{number}"
            tensor = f"{body}encoder.conv{number}"
            table.append(Rule(f"params/{conv}/kernel", f"{tensor}.weight", CONV1D))
            table.append(Rule(f"params/{conv}/bias", f"{tensor}.bias"))
        table.append(
            Rule(
                "buffers/encoder/embed/sinusoids",
                f"{body}encoder.embed_positions.weight",
                default=partial(sinusoids, config),
            )
        )
        table += stack_rules("encoder", body)
    if head in ("seq2seq_lm", "causal_lm") and not config.tie_word_embeddings:
        table.append(Rule("params/head/kernel", "proj_out.weight", TRANSPOSE))
    if head == "audio_classification":
        if config.use_weighted_layer_sum:
            table.append(Rule("params/head/layer_weights", "layer_weights"))
        table += dense_rules("head/projector", "projector")
        table += dense_rules("head/out", "classifier")
    return table


def sinusoids(config: Config) -> np.ndarray:
    """float32 [S, D]: the encoder's positions, for files that leave them out."""
    return np.asarray(sinusoids_of(jnp.arange(config.max_source_positions), config.d_model))


def stack_rules(side: str, body: str) -> list[Rule]:
    """One side's layers: BART's, whose keys have no bias."""
    table = bart.stack_rules(
        side, f"{body}{side}", positions=side == "decoder", embedding_norm=False, final_norm=True
    )
    return [rule for rule in table if not rule.params[0].endswith("attn/key/bias")]
