"""HuBERT (Hsu et al. 2021, arXiv:2106.07447): wav2vec 2.0's encoder, taught by clusters. HF
"hubert".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from fmjax.models import wav2vec2
from fmjax.models.wav2vec2 import STABLE, check_config, from_tensors, inputs, sized
from fmjax.nn.norm import BatchNorm
from fmjax.nn.speech import PositionConv, SpeechEmbeddings
from fmjax.types import Output
from fmjax.weights import CONV1D, Rule, batch_norm_rules, norm_rules

__all__ = ["from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_layer_norm: bool = True
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False
    do_stable_layer_norm: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    # Read by the task of CTC, not by the model.
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    pad_token_id: int | None = 0  # the blank of CTC
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What wav2vec 2.0 has besides; none of these are keys of config.json.
    add_adapter = False
    adapter_attn_dim = None

    def __post_init__(self) -> None:
        check_config(self)


MODEL_TYPE = "hubert"
HEADS = {
    "model": "HubertModel",
    "ctc": "HubertForCTC",
    "sequence_classification": "HubertForSequenceClassification",
}
VARIANTS = {
    "tiny": sized(
        Config, 2, 12, 3, vocab_size=11, conv_dim=(5, 7), conv_kernel=(4, 3), conv_stride=(3, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, conv_pos_batch_norm=True,
        feat_proj_layer_norm=False, mask_time_length=2, classifier_proj_size=5,
    ),
    # Hsu et al. 2021, table 1: 95, 317 and 964 million parameters.
    "base": sized(Config, 12, 768, 12),
    "large": sized(Config, 24, 1024, 16, **STABLE),
    "xlarge": sized(Config, 48, 1280, 16, **STABLE),
}  # fmt: skip


class Embeddings(SpeechEmbeddings):
    """As wav2vec 2.0's, but features need no norm, and batch normalisation before the positions'
    convolution may stand for the norm of its kernel.
    """

    def norm_features(self, features: Array) -> Array:
        return super().norm_features(features) if self.config.feat_proj_layer_norm else features

    def positions(self, x: Array, train: bool) -> Array:
        if not self.config.conv_pos_batch_norm:
            return super().positions(x, train)
        x = BatchNorm(train, name="position_batch_norm")(x)
        return PositionConv(self.config, normed=False, name="position")(x)


class Model(wav2vec2.Model):
    """HuBERT with one head; see `fmjax.nn.speech.SpeechEncoder`."""

    heads = HEADS
    embeddings = Embeddings

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
        if self.head == "model":
            return Output(last_hidden_state=hidden)
        return super().outputs(hidden, states, features, keep, masked, temperature, train)


PREFIX = "hubert."
FIXED = wav2vec2.FIXED
IGNORED = wav2vec2.IGNORED


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = wav2vec2.body_rules(config, body)
    if config.feat_proj_layer_norm:
        table += norm_rules("embed/norm", f"{body}feature_projection.layer_norm")
    place = f"{body}encoder.pos_conv_embed"
    if config.conv_pos_batch_norm:
        table += batch_norm_rules("embed/position_batch_norm", f"{place}.batch_norm")
        table.append(Rule("params/embed/position/kernel", f"{place}.conv.weight", CONV1D))
    else:
        table += wav2vec2.kernel_rules(f"{place}.conv")
    return table + wav2vec2.head_rules(config, head)
