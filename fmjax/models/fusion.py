"""Any encoders of one example's modalities (text, image, audio, rows of numbers), fused late, by
cross-attention, or by co-attention (ViLBERT, Lu et al. 2019, arXiv:1908.02265), and one head.

Our own family: Hugging Face has no such class. Examples may lack modalities: what then stands in
their place changes nothing. Variables of an encoder are those of its family as they are:
``variables["params"]["text"] = bert_variables["params"]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import (
    arguments_of,
    bert,
    efficientnet_lite,
    family_for,
    mlp,
    read_part,
    vit,
    write_part,
)
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.dropout import Dropout
from fmjax.nn.fusion import (
    COMBINATIONS,
    Layer,
    Lead,
    Shared,
    Stream,
    combine,
    masked_mean,
    only_present,
)
from fmjax.nn.linear import Dense
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import run_stack
from fmjax.types import Output, Remat
from fmjax.weights import Rule, dense_rules, nested_rules, norm_rules

FUSIONS = ("late", "cross_attention", "co_attention")
# What an encoder may be given. Masks and token types are of `input_ids`.
SOURCES = ("input_ids", "pixel_values", "input_values", "input_features", "features")
OF_TEXT = ("attention_mask", "token_type_ids")
# Which input is the mask of each source.
MASKS = {
    "input_ids": "attention_mask",
    "input_values": "input_values_mask",
    "input_features": "input_features_mask",
}
# Modules of the model beside the encoders and what is named after these.
RESERVED = ("pooler", "head", "layers")


def read_encoders(data: Any) -> tuple[tuple[str, Any], ...]:
    """Configs by modality, of a JSON object in its order.

    Raises:
        ValueError: it is no object, or one of its values is no config of a family.
    """
    if not isinstance(data, Mapping):
        raise ValueError("must be an object, from names of modalities to configs")
    return tuple((name, read_part(part)) for name, part in data.items())


def write_encoders(encoders: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The inverse of `read_encoders`."""
    return {name: write_part(part) for name, part in encoders}


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json.

    Args:
        encoders: (name, Config) of each modality, of any family whose head "model" takes one of
            ``input_ids``, ``pixel_values``, ``input_values``, ``input_features``, ``features``.
        fusion: "late": the mean of each one's states, projected; "cross_attention": the first one's
            states attend to all others'; "co_attention": each one's to all others'.
        combination: of the modalities' vectors, by co-attention and late: "mean" or "product".
        hidden_size: D, that all are projected to.
        num_hidden_layers: of cross- or co-attention.
        num_attention_heads, intermediate_size, hidden_act, hidden_dropout_prob, layer_norm_eps,
            initializer_range: as BERT's.
        problem_type: read by the task, not by the model.
        id2label: the classes.
    """

    encoders: tuple[tuple[str, Any], ...] = dataclasses.field(
        default=(("text", bert.Config(add_pooling_layer=False)), ("image", vit.Config())),
        metadata={"read": read_encoders, "write": write_encoders},
    )
    fusion: str = "co_attention"
    combination: str = "mean"
    hidden_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    problem_type: str | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        names = [name for name, _ in self.encoders]
        if not names or len(set(names)) != len(names):
            problems.append(f"encoders are named {names}; at least one, all different")
        if len(names) == 1 and self.fusion != "late":
            problems.append(f"fusion={self.fusion!r} needs two encoders at least")
        for name, config in self.encoders:
            family = family_for(config)
            if not name.isalpha() or name in RESERVED:
                problems.append(f"encoder {name!r} must be of letters alone and none of {RESERVED}")
            if not isinstance(config, family.Config):
                problems.append(f"{name}={config!r} is no family's Config")
            elif len(reads(config)) != 1:
                problems.append(
                    f"{name}: {family.MODEL_TYPE} reads {list(reads(config))}; it must read one of "
                    f"{list(SOURCES)}"
                )
        for name, known in (("fusion", FUSIONS), ("combination", COMBINATIONS)):
            if getattr(self, name) not in known:
                problems.append(f"{name}={getattr(self, name)!r} must be one of {known}")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        refuse(self, problems)

    @property
    def updated(self) -> tuple[str, ...]:
        """The modalities whose states the fusion's layers change."""
        names = tuple(name for name, _ in self.encoders)
        return {"late": (), "cross_attention": names[:1], "co_attention": names}[self.fusion]


def reads(config: Any) -> tuple[str, ...]:
    """What an encoder is given: of `SOURCES`, those that its model takes."""
    return tuple(name for name in SOURCES if name in arguments_of(family_for(config)))


MODEL_TYPE = "fusion"
HEADS = {"model": "FusionModel", "classification": "FusionForClassification"}
VARIANTS = {
    "tiny": Config(
        (
            (
                "text",
                bert.Config(
                    vocab_size=60, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=16, max_position_embeddings=16, add_pooling_layer=False,
                ),
            ),
            ("image", dataclasses.replace(vit.VARIANTS["tiny"], add_pooling_layer=False)),
            ("table", mlp.Config(hidden_sizes=(6,))),
        ),
        hidden_size=16, num_attention_heads=2, intermediate_size=24,
    ),
    # No published model: the sizes of ViLBERT's co-attention (Lu et al. 2019, section 3.1: six
    # pairs of co-attention and Transformer layers of 8 heads at width 1024) behind BERT-base and a
    # ViT, where the paper puts them between BERT's layers, and a detector's regions beside.
    "co-attention-bert-vit-b16": Config(
        (
            ("text", bert.Config(add_pooling_layer=False)),
            ("image", dataclasses.replace(vit.VARIANTS["b16"], add_pooling_layer=False)),
        ),
        combination="product", hidden_size=1024, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=1024,
    ),
    # A small text encoder (all-MiniLM-L6-v2's size) and EfficientNet-Lite0.
    "minilm-lite0-late": Config(
        (
            (
                "text",
                bert.Config(
                    hidden_size=384, num_hidden_layers=6, intermediate_size=1536,
                    add_pooling_layer=False,
                ),
            ),
            ("image", efficientnet_lite.VARIANTS["lite0"]),
        ),
        fusion="late", hidden_size=256, num_attention_heads=4,
    ),
}  # fmt: skip


class Model(nn.Module):
    """Encoders, their fusion and one head.

    Args:
        config: the parts.
        head: a key of `HEADS`.
        scan, remat: of the encoders' blocks and of the fusion's layers.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        pixel_values: Array | None = None,
        input_values: Array | None = None,
        input_features: Array | None = None,
        features: Array | None = None,
        input_values_mask: Array | None = None,
        input_features_mask: Array | None = None,
        present: Array | None = None,
        encoder_outputs: Mapping[str, Array] | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model; each encoder takes the inputs that its family does.

        Args:
            input_ids: int [B, T]; of several text encoders, the same for all.
            attention_mask, token_type_ids: [B, T], of `input_ids`.
            pixel_values: [B, X, Y, C].
            input_values: [B, T], samples.
            input_features: [B, T, M], frames.
            features: [B, I], rows of numbers.
            input_values_mask, input_features_mask: [B, T], 1 for samples or frames, 0 for the
                padding after them; None has no padding.
            present: [B, M], 1 where an example has the modality, in the order of the config's
                encoders; None has all. What an example lacks may be anything, of the right shape.
            encoder_outputs: by modality, states [B, S, D] (or maps, or vectors) that its encoder
                gave earlier, in place of its input: of frozen encoders, or of a detector of regions
                outside the model. A mask given beside them, of a text or a sound, is of states.
            train: see the encoders' families.
            output_hidden_states, output_attentions: have no effect.

        Returns:
            ``pooler_output`` [B, D]; or ``logits`` [B, C].

        Raises:
            ValueError: an unknown head, an input that is missing or that no encoder reads, or
                `present` of another shape.
        """
        config = self.config
        check_head(self, HEADS)
        given = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
            "features": features,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "input_values_mask": input_values_mask,
            "input_features_mask": input_features_mask,
        }
        given = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
        ready = dict(encoder_outputs or {})
        there = self.check(given, ready, present)  # bool [B, M]
        states, masks = {}, {}
        for column, (name, encoder) in enumerate(config.encoders):
            own, mask = there[:, column], None
            if name in ready:
                x = only_present(jnp.asarray(ready[name]), own)
                mask = given.get(MASKS.get(reads(encoder)[0], ""))
            else:
                x, mask = self.encode(name, encoder, given, own, train)
            x = x.reshape(x.shape[0], -1, x.shape[-1])  # of maps and vectors, too
            if mask is None or mask.shape != x.shape[:2]:
                mask = jnp.ones(x.shape[:2], bool)
            states[name], masks[name] = x, mask.astype(bool) & own[:, None]
        vectors, seen = self.fuse(states, masks, there, train)
        vector = combine(vectors, seen, config.combination)
        init = nn.initializers.normal(config.initializer_range)
        pooled = jnp.tanh(Dense(config.hidden_size, kernel_init=init, name="pooler")(vector))
        if self.head == "model":
            return Output(pooler_output=pooled)
        pooled = Dropout(config.hidden_dropout_prob)(pooled, train)
        logits = Dense(len(config.id2label), kernel_init=init, name="head")(pooled)
        return Output(logits=logits.astype(jnp.float32))

    def check(
        self, given: Mapping[str, Array], ready: Mapping[str, Array], present: Array | None
    ) -> Array:
        """Which modalities each example has, bool [B, M].

        Raises:
            ValueError: inputs that are missing or that no encoder reads, or another shape.
        """
        encoders = self.config.encoders
        wanted = {s for name, config in encoders if name not in ready for s in reads(config)}
        problems = [f"{name} is missing" for name in sorted(wanted - given.keys())]
        read = {source for _, config in encoders for source in reads(config)}
        known = wanted | {MASKS[source] for source in read if source in MASKS}
        known |= set(OF_TEXT) if "input_ids" in read else set()
        for source in ("input_values", "input_features"):
            mask, value = given.get(MASKS[source]), given.get(source)
            if mask is not None and value is not None and mask.shape != value.shape[:2]:
                problems.append(
                    f"{MASKS[source]} has the shape {mask.shape}; it must be {value.shape[:2]}"
                )
        problems += [f"no encoder reads {name}" for name in sorted(given.keys() - known)]
        strange = sorted(ready.keys() - {name for name, _ in encoders})
        problems += [f"encoder_outputs has {name!r}, no encoder" for name in strange]
        rows = {value.shape[0] for value in (*given.values(), *ready.values())}
        if len(rows) > 1:
            problems.append(f"inputs have different numbers of rows: {sorted(rows)}")
        shape = (max(rows, default=0), len(encoders))
        if present is not None and present.shape != shape:
            problems.append(f"present has the shape {present.shape}; it must be {shape}")
        if problems:
            raise ValueError("fusion: " + "; ".join(problems))
        return jnp.ones(shape, bool) if present is None else present.astype(bool)

    def encode(
        self, name: str, config: Any, given: Mapping[str, Array], present: Array, train: bool
    ) -> tuple[Array, Array | None]:
        """What an encoder makes of its input, where it is present, and the mask of a text or a
        sound: bool [B, S], or None."""
        (source,) = reads(config)
        family = family_for(config)
        model = family.Model(config, scan=self.scan, remat=self.remat, name=name)
        inputs = {source: only_present(given[source], present)}
        mask = None
        if source == "input_ids":
            taken = [key for key in OF_TEXT if key in given and key in arguments_of(family)]
            inputs |= {key: given[key] for key in taken}
            if "attention_mask" in given:
                # Attention of a row without any key is no number.
                mask = given["attention_mask"].astype(bool) | ~present[:, None]
                inputs["attention_mask"] = mask
        elif MASKS.get(source) in given:
            inputs["attention_mask"] = given[MASKS[source]].astype(bool) | ~present[:, None]
        out = model(**inputs, train=train)
        mask = mask if out.state_mask is None else out.state_mask  # of a sound's states
        states = out.pooler_output if out.last_hidden_state is None else out.last_hidden_state
        assert states is not None  # every encoder has one of them
        return states, mask

    def fuse(
        self, states: dict[str, Array], masks: dict[str, Array], present: Array, train: bool
    ) -> tuple[list[Array], Array]:
        """The vectors to combine, [B, D] each, and which of them each example has."""
        config = self.config
        rate, epsilon = config.hidden_dropout_prob, config.layer_norm_eps
        init = nn.initializers.normal(config.initializer_range)
        if config.fusion == "late":
            vectors = []
            for name, x in states.items():
                mean = masked_mean(x, masks[name])
                x = Dense(config.hidden_size, kernel_init=init, name=f"{name}_project")(mean)
                vectors.append(LayerNorm(epsilon, name=f"{name}_norm")(x))
            return vectors, present
        led = {
            name: Lead(config.hidden_size, epsilon, rate, init, train, name=f"{name}_lead")(
                x, masks[name]
            )
            for name, x in states.items()
        }
        states = {name: x for name, (x, _) in led.items()}
        stream = partial(
            Stream, config.num_attention_heads, config.intermediate_size, config.hidden_act,
            epsilon, rate, init, train,
        )  # fmt: skip
        updated = config.updated
        fixed = {name: x for name, x in states.items() if name not in updated}
        hidden, _, _ = run_stack(
            Layer,
            {"stream": stream},
            {name: states[name] for name in updated},
            Shared(fixed, {name: mask for name, (_, mask) in led.items()}),
            num_layers=config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
        )
        vectors = [hidden[name][:, 0] for name in updated]
        # The token of a modality that is not there has looked at the others.
        return vectors, jnp.ones((present.shape[0], len(updated)), bool)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    result = {}
    for _, encoder in config.encoders:
        own = family_for(encoder).inputs(encoder, "model")
        result |= {name: own[name] for name in reads(encoder)}
    return result


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = (*bert.IGNORED,)


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell of the encoders."""

    def told(name: str, encoder: Any) -> Any:
        own = [n.removeprefix(f"{name}.") for n in names if n.startswith(f"{name}.")]
        return family_for(encoder).from_tensors(encoder, "model", own)

    encoders = tuple((name, told(name, encoder)) for name, encoder in config.encoders)
    return dataclasses.replace(config, encoders=encoders)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are, for one head: the encoders' by their families' names."""
    table = []
    for name, encoder in config.encoders:
        table += nested_rules(family_for(encoder).rules(encoder, "model"), name)
        if config.fusion == "late":
            table += dense_rules(f"{name}_project", f"{name}_project")
            table += norm_rules(f"{name}_norm", f"{name}_norm")
        else:
            table += dense_rules(f"{name}_lead/project", f"{name}_lead.project")
            table += norm_rules(f"{name}_lead/norm", f"{name}_lead.norm")
            table.append(Rule(f"params/{name}_lead/token", f"{name}_lead.token"))
    for name in config.updated:
        table += stream_rules(f"layers_{{i}}/{name}", f"fusion.{{i}}.{name}")
    table += dense_rules("pooler", "pooler.dense")
    return table + (dense_rules("head", "classifier") if head != "model" else [])


def stream_rules(param: str, tensor: str) -> list[Rule]:
    """One modality's part of a layer."""
    table = []
    for here, there in (("cross_attn", "crossattention"), ("attn", "attention")):
        for name in ("query", "key", "value", "out"):
            table += dense_rules(f"{param}/{here}/{name}", f"{tensor}.{there}.{name}")
    for here, there in (("cross_mlp", "cross_mlp"), ("mlp", "mlp")):
        for name in ("up", "down"):
            table += dense_rules(f"{param}/{here}/{name}", f"{tensor}.{there}.{name}")
    for name in ("norm_cross", "norm_cross_mlp", "norm_1", "norm_2"):
        table += norm_rules(f"{param}/{name}", f"{tensor}.{name}")
    return table
