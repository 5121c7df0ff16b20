"""wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477): a transformer over convolutions of samples.

HF "wav2vec2". Also XLS-R (Babu et al. 2021, arXiv:2111.09296) and, with attention adapters, MMS
(Pratap et al. 2023, arXiv:2305.13516).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention
from fmjax.nn.checks import refuse
from fmjax.nn.conv1d import Conv1d, windows
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.quantizer import GumbelQuantizer
from fmjax.nn.speech import (
    EPSILON,
    TORCH_INIT,
    SpeechEncoder,
    frames_of,
    has_mask,
    least_samples,
    mean_over,
    statistics_over,
    until,
)
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output
from fmjax.weights import CONV1D, Rule, conv1d_rules, dense_rules, norm_rules


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
    feat_proj_dropout: float = 0.0
    feat_quantizer_dropout: float = 0.0
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
    do_stable_layer_norm: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    num_codevectors_per_group: int = 320
    num_codevector_groups: int = 2
    # The next three are read by the task of pretraining, not by the model.
    contrastive_logits_temperature: float = 0.1
    num_negatives: int = 100
    diversity_loss_weight: float = 0.1
    codevector_dim: int = 256
    proj_codevector_dim: int = 256
    # Read by the task of CTC.
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    pad_token_id: int | None = 0  # the blank of CTC
    add_adapter: bool = False
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None
    adapter_attn_dim: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if self.output_hidden_size is None:
            object.__setattr__(self, "output_hidden_size", self.hidden_size)
        problems = []
        if self.codevector_dim % self.num_codevector_groups:
            problems.append(
                f"codevector_dim={self.codevector_dim} is not a multiple of "
                f"num_codevector_groups={self.num_codevector_groups}"
            )
        if len({len(self.tdnn_dim), len(self.tdnn_kernel), len(self.tdnn_dilation)}) != 1:
            problems.append(
                f"tdnn_dim={self.tdnn_dim}, tdnn_kernel={self.tdnn_kernel} and "
                f"tdnn_dilation={self.tdnn_dilation} must have one number a layer each"
            )
        if self.adapter_attn_dim is not None and not self.do_stable_layer_norm:
            problems.append(
                f"adapter_attn_dim={self.adapter_attn_dim} needs do_stable_layer_norm=True"
            )
        if self.num_adapter_layers < 1 or self.adapter_stride < 1 or self.adapter_kernel_size < 1:
            problems.append(
                f"num_adapter_layers={self.num_adapter_layers}, adapter_stride="
                f"{self.adapter_stride} and adapter_kernel_size={self.adapter_kernel_size} must "
                "be positive"
            )
        check_config(self, problems)


def check_config(config: Any, problems: Sequence[str] = ()) -> None:
    """Refuses values that no encoder of this kind can have.

    Args:
        config: with wav2vec 2.0's names.
        problems: what the family has found besides.

    Raises:
        ValueError: all that is wrong.
    """
    problems = list(problems)
    convolutions = (config.conv_dim, config.conv_kernel, config.conv_stride)
    if len(set(map(len, convolutions))) != 1 or any(min(x, default=0) < 1 for x in convolutions):
        problems.append(
            f"conv_dim={config.conv_dim}, conv_kernel={config.conv_kernel} and conv_stride="
            f"{config.conv_stride} must have one positive number a layer each"
        )
    for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
        if config.hidden_size % getattr(config, name):
            problems.append(
                f"hidden_size={config.hidden_size} is not a multiple of "
                f"{name}={getattr(config, name)}"
            )
    if config.feat_extract_norm not in ("group", "layer"):
        problems.append(f"feat_extract_norm={config.feat_extract_norm!r} must be group or layer")
    if config.ctc_loss_reduction not in ("sum", "mean"):
        problems.append(f"ctc_loss_reduction={config.ctc_loss_reduction!r} must be sum or mean")
    for name in ("mask_time_prob", "mask_feature_prob"):
        if not 0 <= getattr(config, name) <= 1:
            problems.append(f"{name}={getattr(config, name)} must be from 0 to 1")
    for name in ("mask_time_length", "mask_feature_length"):
        if getattr(config, name) < 1:
            problems.append(f"{name}={getattr(config, name)} must be positive")
    refuse(config, problems)


MODEL_TYPE = "wav2vec2"
HEADS = {
    "model": "Wav2Vec2Model",
    "pretraining": "Wav2Vec2ForPreTraining",
    "ctc": "Wav2Vec2ForCTC",
    "sequence_classification": "Wav2Vec2ForSequenceClassification",
    "audio_frame_classification": "Wav2Vec2ForAudioFrameClassification",
    "xvector": "Wav2Vec2ForXVector",
}
# Heads that may read all layers' states.
WEIGHED = ("sequence_classification", "audio_frame_classification", "xvector")
# What the large models have in common.
STABLE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}


def sized(cls: Any, layers: int, width: int, heads: int, **rest: Any) -> Any:
    """A config of a family by its published sizes."""
    return cls(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        **rest,
    )


VARIANTS = {
    "tiny": sized(
        Config, 2, 12, 3, vocab_size=11, conv_dim=(5, 7), conv_kernel=(4, 3), conv_stride=(3, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_length=2,
        mask_feature_prob=0.2, mask_feature_length=2, num_codevectors_per_group=5,
        codevector_dim=6, proj_codevector_dim=4, num_negatives=3, classifier_proj_size=5,
        tdnn_dim=(6, 7), tdnn_kernel=(3, 1), tdnn_dilation=(2, 1), xvector_output_dim=5,
        output_hidden_size=12,
    ),
    # Baevski et al. 2020, section 4.2: 95 and 317 million parameters with the pretraining head.
    # (The released base model has 12 heads, where the paper says 8.)
    "base": sized(Config, 12, 768, 12),
    "large": sized(Config, 24, 1024, 16, codevector_dim=768, proj_codevector_dim=768),
    "large_lv60": sized(
        Config, 24, 1024, 16, codevector_dim=768, proj_codevector_dim=768, **STABLE
    ),
    # Babu et al. 2021, table 2.
    "xls_r_300m": sized(
        Config, 24, 1024, 16, codevector_dim=768, proj_codevector_dim=768, **STABLE
    ),
    "xls_r_1b": sized(
        Config, 48, 1280, 16, codevector_dim=1024, proj_codevector_dim=1024, **STABLE
    ),
    "xls_r_2b": sized(
        Config, 48, 1920, 16, codevector_dim=1024, proj_codevector_dim=1024, **STABLE
    ),
    # Pratap et al. 2023, section 4: 1 billion, and adapters of 16 features for each language.
    "mms_1b": sized(
        Config, 48, 1280, 16, codevector_dim=1024, proj_codevector_dim=1024, adapter_attn_dim=16,
        **STABLE,
    ),
}  # fmt: skip


class Block(nn.Module):
    """Attention and feed-forward, with norms after them or, stable, before."""

    config: Any
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: Mask | None
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config, before = self.config, hidden
        stable = config.do_stable_layer_norm
        norm_1, norm_2 = (
            LayerNorm(config.layer_norm_eps, name=name) for name in ("norm_1", "norm_2")
        )
        update, probabilities, _ = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=self.kernel_init,
            name="attn",
        )(norm_1(hidden) if stable else hidden, mask=shared)
        hidden = hidden + self.drop(update)
        if stable:
            hidden = self.adapt(hidden + self.feed_forward(norm_2(hidden)))
        else:
            hidden = norm_1(hidden)
            hidden = norm_2(hidden + self.feed_forward(hidden))
        if self.train and config.layerdrop > 0.0:  # Fan et al. 2019, arXiv:1909.11556
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - config.layerdrop)
            hidden = jnp.where(keep, hidden, before)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(hidden_state=copy, attentions=probabilities)

    @property
    def kernel_init(self) -> Any:
        """Initializer of kernels."""
        return nn.initializers.normal(self.config.initializer_range)

    def drop(self, x: Array) -> Array:
        """The dropout of residual updates."""
        return Dropout(self.config.hidden_dropout)(x, self.train)

    def feed_forward(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        config = self.config
        mlp = Mlp(
            config.intermediate_size,
            config.hidden_act,
            self.kernel_init,
            dropout_rate=config.activation_dropout,
            train=self.train,
            name="mlp",
        )
        return self.drop(mlp(x))

    def adapt(self, hidden: Array) -> Array:
        """The states after a language's adapter, if there is one (Pratap et al. 2023, sec. 4.1)."""
        width = self.config.adapter_attn_dim
        if width is None:
            return hidden
        x = LayerNorm(EPSILON, name="adapter_norm")(hidden)
        return hidden + Mlp(width, "relu", self.kernel_init, name="adapter")(x)


class LengthAdapter(nn.Module):
    """Gated convolutions that make the last states fewer: [B, T, D] -> [B, T', D'].

    PyTorch's layer drop in training leaves out whole layers of it, which changes lengths; here none
    is.
    """

    config: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        width = config.output_hidden_size
        if width != config.hidden_size:
            init = nn.initializers.normal(config.initializer_range)
            x = Dense(width, kernel_init=init, name="projection")(x)
            x = LayerNorm(EPSILON, name="norm")(x)
        for i in range(config.num_adapter_layers):
            size, stride = config.adapter_kernel_size, config.adapter_stride
            x = Conv1d(2 * width, size, stride, around=(1, 1), name=f"conv_{i}")(x)
            x, gate = jnp.split(x, 2, axis=-1)
            x = x * jax.nn.sigmoid(gate)
        return x


class Head(nn.Module):
    """What each head makes of the last hidden states."""

    config: Any
    head: str

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        states: Sequence[Array],
        features: Array,
        keep: Array | None,
        masked: Array | None,
        temperature: Array | float,
        train: bool,
    ) -> Output:
        """Called by `Model`.

        Args:
            hidden: [B, T, D], the last ones.
            states: the embeddings' and each block's, where the layers' sum is weighed.
            features: [B, T, C].
            keep: bool [B, T], frames that are no padding; None for all.
            masked: bool [B, T] or None.
            temperature: of the quantiser.
            train: whether dropout is on.
        """
        config = self.config
        if self.head == "pretraining":
            return self.pretraining(hidden, features, masked, temperature, train)
        if self.head == "ctc":
            hidden = Dropout(config.final_dropout)(hidden, train)
            logits = self.dense("classifier", config.vocab_size, hidden).astype(jnp.float32)
            lengths = jnp.full(len(hidden), hidden.shape[1]) if keep is None else keep.sum(axis=1)
            return Output(logits=logits, logit_lengths=lengths)
        if config.use_weighted_layer_sum:
            count = len(states)
            layers = parameter(self, "layers", nn.initializers.constant(1 / count), (count,))
            weights = jax.nn.softmax(layers.astype(jnp.float32))
            hidden = jnp.einsum("L,LBTD->BTD", weights.astype(hidden.dtype), jnp.stack(states))
        labels = len(config.id2label)
        if self.head == "audio_frame_classification":
            return Output(logits=self.dense("classifier", labels, hidden).astype(jnp.float32))
        if self.head == "xvector":
            return self.xvector(hidden, keep)
        hidden = self.dense("projector", config.classifier_proj_size, hidden)
        pooled = mean_over(hidden, keep)
        return Output(logits=self.dense("classifier", labels, pooled).astype(jnp.float32))

    def dense(self, name: str, features: int, x: Array) -> Array:
        """[..., D] -> [..., features]."""
        init = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, kernel_init=init, name=name)(x)

    def pretraining(
        self,
        hidden: Array,
        features: Array,
        masked: Array | None,
        temperature: Array | float,
        train: bool,
    ) -> Output:
        """The states and the quantised features they should tell apart from others."""
        config = self.config
        width = config.proj_codevector_dim
        features = Dropout(config.feat_quantizer_dropout)(features, train)
        quantised, perplexity = GumbelQuantizer(
            config.num_codevector_groups,
            config.num_codevectors_per_group,
            config.codevector_dim,
            name="quantizer",
        )(features, masked, temperature, train)
        return Output(
            projected_states=Dense(width, kernel_init=TORCH_INIT, name="states")(hidden),
            projected_quantized_states=Dense(width, kernel_init=TORCH_INIT, name="quantised")(
                quantised
            ),
            codevector_perplexity=perplexity,
        )

    def xvector(self, hidden: Array, keep: Array | None) -> Output:
        """A vector for the speaker (Snyder et al. 2018, "X-vectors", section 2)."""
        config = self.config
        x = self.dense("projector", config.tdnn_dim[0], hidden)
        layers = zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True)
        lost = 0
        for i, (features, size, dilation) in enumerate(layers):
            x = jax.nn.relu(self.dense(f"tdnn_{i}", features, windows(x, size, dilation=dilation)))
            lost += size - 1  # as PyTorch counts; with dilation it is more
        keep = None if keep is None else until(keep.sum(axis=1) - lost, x.shape[1])
        pooled = statistics_over(x, keep).astype(hidden.dtype)  # [B, 2 D]
        embeddings = self.dense("embedding", config.xvector_output_dim, pooled)
        logits = self.dense("classifier", config.xvector_output_dim, embeddings)
        logits = logits.astype(jnp.float32)
        shape = (config.xvector_output_dim, len(config.id2label))
        directions = parameter(self, "directions", nn.initializers.normal(1.0), shape)
        return Output(
            logits=logits,
            embeddings=embeddings,
            cosines=unit(logits, -1) @ unit(directions.astype(jnp.float32), 0),
        )


def unit(x: Array, axis: int) -> Array:
    """Vectors along an axis, scaled to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 1e-12)


class Model(SpeechEncoder):
    """wav2vec 2.0 with one head; see `fmjax.nn.speech.SpeechEncoder`."""

    config: Any
    block = Block
    heads = HEADS

    @property
    def weighs_layers(self) -> bool:
        return self.config.use_weighted_layer_sum and self.head in WEIGHED

    @property
    def least_frames(self) -> int:
        return frames_needed(self.config, self.head)

    def frames(self, samples: Any) -> Any:
        config = self.config
        count = frames_of(config, samples)
        for _ in range(config.num_adapter_layers if config.add_adapter else 0):
            count = (count - 1) // config.adapter_stride + 1
        return count

    def shorten(self, hidden: Array) -> Array:
        if not self.config.add_adapter:
            return hidden
        return LengthAdapter(self.config, name="adapter")(hidden)

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
            return Output(last_hidden_state=hidden, extract_features=features)
        head = Head(self.config, self.head, name="head")
        return head(hidden, states, features, keep, masked, temperature, train)


def frames_needed(config: Any, head: str) -> int:
    """How many frames a head needs."""
    if head != "xvector":
        return 1
    seen = zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
    return 1 + sum((size - 1) * step for size, step in seen)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"input_values": jnp.zeros((1, least_samples(config, frames_needed(config, head))))}


PREFIX = "wav2vec2."
# What files of the hub list and nobody reads, and in transformers 5 whether the last of the hidden
# states is normed, as those were that weighted sums of layers were trained on.
FIXED: dict[str, Any] = {"tie_last_hidden_states": True} | dict.fromkeys(
    """
    feat_extract_dropout freeze_feat_extract_train mask_channel_length mask_channel_min_space
    mask_channel_other mask_channel_prob mask_channel_selection mask_time_min_space
    mask_time_other mask_time_selection no_mask_channel_overlap no_mask_time_overlap
    num_feat_extract_layers
    """.split(),
    ...,
)
IGNORED = (r"(^|\.)masked_spec_embed$",)


def from_tensors(config: Any, head: str, names: Collection[str]) -> Any:
    """The config as it is: tensors' names tell nothing more."""
    return config


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = body_rules(config, body) + head_rules(config, head)
    table += norm_rules("embed/norm", f"{body}feature_projection.layer_norm")
    table += kernel_rules(f"{body}encoder.pos_conv_embed.conv")
    if config.adapter_attn_dim is not None:
        here, there = "layers_{i}", f"{body}encoder.layers.{{i}}.adapter_layer"
        table += norm_rules(f"{here}/adapter_norm", f"{there}.norm")
        table += dense_rules(f"{here}/adapter/up", f"{there}.linear_1")
        table += dense_rules(f"{here}/adapter/down", f"{there}.linear_2")
    if config.add_adapter:
        if config.output_hidden_size != config.hidden_size:
            table += dense_rules("adapter/projection", f"{body}adapter.proj")
            table += norm_rules("adapter/norm", f"{body}adapter.proj_layer_norm")
        table += conv1d_rules("adapter/conv_{i}", f"{body}adapter.layers.{{i}}.conv")
    return table


def body_rules(config: Any, body: str) -> list[Rule]:
    """Embeddings, layers and norms, for wav2vec 2.0 and its relatives.

    Args:
        config: with wav2vec 2.0's names.
        body: what stands before the tensors' names.
    """
    features, layer = f"{body}feature_extractor.conv_layers.{{i}}", f"{body}encoder.layers.{{i}}"
    norm = "final_norm" if config.do_stable_layer_norm else "embed/position_norm"
    table = [
        *conv1d_rules("embed/features/conv_{i}", f"{features}.conv", bias=config.conv_bias),
        *norm_rules("embed/features/norm_{i}", f"{features}.layer_norm"),
        *dense_rules("embed/projection", f"{body}feature_projection.projection"),
        Rule("params/embed/position/bias", f"{body}encoder.pos_conv_embed.conv.bias"),
        *norm_rules(norm, f"{body}encoder.layer_norm"),
        *norm_rules("layers_{i}/norm_1", f"{layer}.layer_norm"),
        *norm_rules("layers_{i}/norm_2", f"{layer}.final_layer_norm"),
        *dense_rules("layers_{i}/mlp/up", f"{layer}.feed_forward.intermediate_dense"),
        *dense_rules("layers_{i}/mlp/down", f"{layer}.feed_forward.output_dense"),
    ]
    for name, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        table += dense_rules(f"layers_{{i}}/attn/{name}", f"{layer}.attention.{theirs}_proj")
    if has_mask(config):
        # Models fine-tuned elsewhere lack it; what it is matters in training alone.
        zeros = functools.partial(np.zeros, config.hidden_size, np.float32)
        table.append(Rule("params/embed/mask", f"{body}masked_spec_embed", default=zeros))
    return table


def kernel_rules(conv: str) -> list[Rule]:
    """The kernel of the positions' convolution, its two parts under their new or old names."""
    new = f"{conv}.parametrizations.weight.original"
    return [
        Rule("params/embed/position/scale", f"{new}0", CONV1D, aliases=(f"{conv}.weight_g",)),
        Rule("params/embed/position/kernel", f"{new}1", CONV1D, aliases=(f"{conv}.weight_v",)),
    ]


def head_rules(config: Any, head: str) -> list[Rule]:
    """What stands after the last states."""
    table = []
    if head in WEIGHED and config.use_weighted_layer_sum:
        table.append(Rule("params/head/layers", "layer_weights"))
    match head:
        case "pretraining":
            return [
                Rule("params/head/quantizer/codevectors", "quantizer.codevectors"),
                *dense_rules("head/quantizer/scores", "quantizer.weight_proj"),
                *dense_rules("head/states", "project_hid"),
                *dense_rules("head/quantised", "project_q"),
            ]
        case "ctc":
            return dense_rules("head/classifier", "lm_head")
        case "sequence_classification":
            table += dense_rules("head/projector", "projector")
            return table + dense_rules("head/classifier", "classifier")
        case "audio_frame_classification":
            return table + dense_rules("head/classifier", "classifier")
        case "xvector":
            return [
                *table,
                *dense_rules("head/projector", "projector"),
                *dense_rules("head/tdnn_{i}", "tdnn.{i}.kernel"),
                *dense_rules("head/embedding", "feature_extractor"),
                *dense_rules("head/classifier", "classifier"),
                Rule("params/head/directions", "objective.weight"),
            ]
    return table
