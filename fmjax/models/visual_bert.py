"""VisualBERT (Li et al. 2019, arXiv:1908.03557): BERT over words and regions of an image in one
sequence; visual question answering, reasoning and grounding. HF "visual_bert".

The regions' features come from a detector outside the model: ``visual_embeds`` [B, N, I].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Inputs, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules, renamed, vocabulary_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30522
    hidden_size: int = 768
    visual_embedding_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What BERT's code reads and VisualBERT lacks; these are no keys of config.json.
    is_decoder = add_cross_attention = False
    classifier_dropout = None

    def __post_init__(self) -> None:
        problems = []
        if self.visual_embedding_dim < 1:
            problems.append(f"visual_embedding_dim={self.visual_embedding_dim} must be positive")
        if self.type_vocab_size < 2:
            problems.append(
                f"type_vocab_size={self.type_vocab_size} must be at least 2: regions are of type 1"
            )
        bert.check_config(self, problems)


MODEL_TYPE = "visual_bert"
HEADS = {
    "model": "VisualBertModel",
    "pretraining": "VisualBertForPreTraining",
    "multiple_choice": "VisualBertForMultipleChoice",
    "question_answering": "VisualBertForQuestionAnswering",
    "visual_reasoning": "VisualBertForVisualReasoning",
    "region_to_phrase_alignment": "VisualBertForRegionToPhraseAlignment",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, visual_embedding_dim=10, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
    ),
    # Li et al. 2019, section 4: BERT-base, with the features of each data set's detector.
    "vcr": Config(visual_embedding_dim=512),
    "nlvr2": Config(visual_embedding_dim=1024),
    "vqa": Config(visual_embedding_dim=2048),
}  # fmt: skip


class Visual(NamedTuple):
    """What a call was given beside the text; for multiple choice B is B * N.

    Args:
        text_length: T, the words' positions, which come first.
        text_mask: [B, T] or None, over the words alone.
        embeds: [B, N, I] or None.
        mask: [B, N] or None.
        types: int [B, N] or None.
        alignment: int [B, N, A] or None, the words that each region belongs to, -1 for none.
        phrases: int [B, P] or None, positions whose regions are looked for, -1 for none.
    """

    text_length: int
    text_mask: Array | None
    embeds: Array | None
    mask: Array | None
    types: Array | None
    alignment: Array | None
    phrases: Array | None


class VisualEmbeddings(TextEmbeddings):
    """BERT's embeddings, and behind them those of regions: a projection of their features, with
    tables of types and positions of their own.

    Args:
        features: I of the regions' features.
    """

    features: int = 0

    def setup(self) -> None:
        super().setup()
        init = self.embedding_init
        self.visual_token_type = Embed(self.token_types, self.width, init)
        self.visual_position = Embed(self.positions, self.width, init)
        self.visual_projection = Dense(self.width, kernel_init=init)

    def total(self, inputs: Inputs) -> Array:  # [B, T + N, D]
        words, visual = super().total(inputs), inputs.extra
        if visual.embeds is None:
            return words
        types = jnp.ones((1, 1), jnp.int32) if visual.types is None else visual.types
        x = self.visual_projection(visual.embeds.astype(words.dtype))  # [B, N, D]
        x = x + self.visual_token_type(types)
        # All regions stand at 0, or at the mean of the positions of their words.
        x = x + self.visual_position(jnp.zeros((1, 1), jnp.int32))
        if visual.alignment is not None:
            there = visual.alignment != -1  # [B, N, A]
            vectors = self.position(jnp.where(there, visual.alignment, 0))  # [B, N, A, D]
            count = jnp.maximum(there.sum(axis=-1, keepdims=True), 1)  # [B, N, 1]
            mean = jnp.where(there[..., None], vectors, 0).sum(axis=2) / count
            x = x + mean.astype(x.dtype)
        return jnp.concatenate([words, x], axis=1)


class Head(bert.Head):
    """What each head makes of the last hidden states and the pooled first token."""

    vocabulary: ClassVar[tuple[str, ...]] = ("pretraining",)

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
        word: Embed,
        *,
        output_logits: bool,
    ) -> Output:
        labels, train, visual = len(self.config.id2label), inputs.train, inputs.extra
        match self.head:
            case "model":
                return Output(last_hidden_state=hidden, pooler_output=pooled)
            case "pretraining":
                logits = self.predictions(hidden, word) if output_logits else None
                states = None if output_logits else hidden
                return self.pretraining(logits, states, hidden, pooled, inputs)
            case "multiple_choice":
                scores = self.dense("classifier", 1, self.sequence(hidden, pooled, train))
                return Output(logits=scores.reshape(inputs.batch_shape[:-1]))
            case "visual_reasoning":
                x = self.sequence(hidden, pooled, train)
                return Output(logits=self.dense("classifier", labels, x))
            case "question_answering":
                x = self.drop(before_last(hidden, visual), train)
                return Output(logits=self.dense("classifier", labels, x))
        return Output(logits=self.align(hidden, visual))

    def align(self, hidden: Array, visual: Visual) -> Array:
        """How much each phrase is of each region: [B, P, N] float32."""
        config = self.config
        if visual.phrases is None or visual.embeds is None:
            raise ValueError(
                f"the head {self.head!r} needs region_to_phrase_position and visual_embeds"
            )
        place = jnp.maximum(visual.phrases, 0)[..., None]  # [B, P, 1]
        phrases = jnp.take_along_axis(hidden, place, axis=1)  # [B, P, D]
        # As in PyTorch, one head of the size of one of many.
        size = config.hidden_size // config.num_attention_heads
        query = self.dense("query", size, phrases)
        key = self.dense("key", size, hidden[:, visual.text_length :])
        scores = jnp.einsum("BPK,BNK->BPN", query, key) / jnp.sqrt(jnp.float32(size))
        if visual.mask is None:
            return scores
        least = jnp.finfo(jnp.float32).min
        return jnp.where(visual.mask.astype(bool)[:, None], scores, least)


def before_last(hidden: Array, visual: Visual) -> Array:
    """The state of the last word but one, which answers: [B, T + N, D] -> [B, D].

    Questions end with [MASK] [SEP] where they were asked in training (section 4.1).
    """
    if visual.text_mask is None:
        return hidden[:, max(visual.text_length - 2, 0)]
    place = jnp.maximum(visual.text_mask.sum(axis=1).astype(jnp.int32) - 2, 0)  # [B]
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


class Model(bert.Model):
    """VisualBERT with one head; see `fmjax.nn.encoder.Encoder`."""

    head_module = Head
    heads = HEADS

    pooled: ClassVar[tuple[str, ...]] = ("pretraining", "multiple_choice", "visual_reasoning")

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        return VisualEmbeddings(
            config.vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
            nn.initializers.normal(config.initializer_range),
            positions=config.max_position_embeddings,
            token_types=config.type_vocab_size,
            padding_index=config.pad_token_id,
            features=config.visual_embedding_dim,
        )

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        region_to_phrase_position: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; for multiple choice every [B, ...] below is [B, N, ...].

        Args:
            input_ids, token_type_ids, position_ids, inputs_embeds, train, output_hidden_states,
                output_attentions, output_logits: see `fmjax.nn.encoder.Encoder`.
            attention_mask: [B, T], over the words.
            visual_embeds: [B, N, I], features of regions, which follow the words: hidden states are
                [B, T + N, D]. None is text alone.
            visual_attention_mask: [B, N]; None keeps all regions.
            visual_token_type_ids: int [B, N]; None is all 1.
            image_text_alignment: int [B, N, A], places of each region's words, -1 for none.
            region_to_phrase_position: int [B, P], for the head of that name: places of the phrases,
                -1 for none.

        Returns:
            "question_answering": ``logits`` [B, C] of the answers; "visual_reasoning": [B, C];
            "region_to_phrase_alignment": [B, P, N], the lowest float32 for regions that are masked.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        inputs = self.check(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            None, None, None, train,
        )  # fmt: skip
        given = (
            visual_embeds, visual_attention_mask, visual_token_type_ids, image_text_alignment,
            region_to_phrase_position,
        )  # fmt: skip
        if self.head == "multiple_choice":
            given = (None if x is None else x.reshape(-1, *x.shape[2:]) for x in given)
        visual = Visual(inputs.length, inputs.attention_mask, *given)
        self.check_visual(inputs, visual)
        inputs = _together(inputs, visual)
        out = self.run(
            inputs,
            None,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )
        # With regions there are more states than words.
        mask = None if visual.embeds is None else inputs.attention_mask
        return dataclasses.replace(out, state_mask=mask)

    def check_visual(self, inputs: Inputs, visual: Visual) -> None:
        """Refuses features that do not fit the text or the config, or masks that do not fit them.

        Raises:
            ValueError: everything that is wrong.
        """
        features, problems = self.config.visual_embedding_dim, []
        text = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
        assert text is not None  # `check` has seen to that
        rows, count = text.shape[0], None
        if visual.embeds is not None:
            shape, count = visual.embeds.shape, visual.embeds.shape[1]
            if len(shape) != 3 or shape[0] != rows or shape[2] != features:
                problems.append(
                    f"visual_embeds has shape {shape}; it must be [{rows}, N, {features}]"
                )
        for name, value, rank in (
            ("visual_attention_mask", visual.mask, 2),
            ("visual_token_type_ids", visual.types, 2),
            ("image_text_alignment", visual.alignment, 3),
        ):
            if value is None:
                continue
            if count is None:
                problems.append(f"{name} needs visual_embeds")
            elif value.ndim != rank or value.shape[:2] != (rows, count):
                problems.append(f"{name} has shape {value.shape}; it must begin ({rows}, {count})")
        if visual.phrases is not None and self.head != "region_to_phrase_alignment":
            problems.append(f"the head {self.head!r} does not take region_to_phrase_position")
        if visual.text_mask is not None and visual.text_mask.ndim != 2:
            problems.append(f"attention_mask has shape {visual.text_mask.shape}; it must be [B, T]")
        if problems:
            raise ValueError("visual_bert: " + "; ".join(problems))


def _together(inputs: Inputs, visual: Visual) -> Inputs:
    """The inputs of words and regions as one sequence."""
    if visual.embeds is None:
        return inputs._replace(extra=visual)
    rows, count = visual.embeds.shape[:2]
    mask = None
    if visual.text_mask is not None or visual.mask is not None:
        parts = ((visual.text_mask, visual.text_length), (visual.mask, count))
        whole = [jnp.ones((rows, n), bool) if m is None else m.astype(bool) for m, n in parts]
        mask = jnp.concatenate(whole, axis=1)  # [B, T + N]
    length = visual.text_length + count
    return inputs._replace(
        attention_mask=mask,
        batch_shape=(*inputs.batch_shape[:-1], length),
        capacity=length,
        extra=visual,
    )


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    shape = (1, 1, 1) if head == "multiple_choice" else (1, 1)
    result = {
        "input_ids": jnp.zeros(shape, jnp.int32),
        "visual_embeds": jnp.zeros((*shape, config.visual_embedding_dim)),
    }
    if head == "region_to_phrase_alignment":
        result["region_to_phrase_position"] = jnp.zeros((1, 1), jnp.int32)
    return result


PREFIX = "visual_bert."
FIXED: dict[str, Any] = {
    # PyTorch's code has another way for it that cannot run.
    "bypass_transformer": False,
    # Whether the visual tables begin as copies of the text's: nothing of a trained model.
    "special_visual_initialize": ...,
}
# The alignment head's values are computed nowhere.
IGNORED = (*bert.IGNORED, r"^attention\.value\.")


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return bert.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = bert.body_of(head)
    table = bert.body_rules(config, head, tied="cls.predictions.decoder.weight")
    for name in ("visual_token_type", "visual_position"):
        tensor = f"{body}embeddings.{name}_embeddings.weight"
        table.append(Rule(f"params/embed/{name}/embedding", tensor))
    table += dense_rules("embed/visual_projection", f"{body}embeddings.visual_projection")
    if bert.has_pooler(config, head, Model.pooled):
        table += dense_rules("pooler", f"{body}pooler.dense")
    return renamed(table, {"bert": "visual_bert"}) + head_rules(config, head)


def head_rules(config: Config, head: str) -> list[Rule]:
    """What stands after the last hidden states."""
    match head:
        case "pretraining":
            table = vocabulary_rules(
                tied=config.tie_word_embeddings,
                dense="cls.predictions.transform.dense",
                norm="cls.predictions.transform.LayerNorm",
                decoder="cls.predictions.decoder",
                bias="cls.predictions.bias",
            )
            return table + dense_rules("head/seq_relationship", "cls.seq_relationship")
        case "multiple_choice" | "question_answering" | "visual_reasoning":
            return dense_rules("head/classifier", "cls")
        case "region_to_phrase_alignment":
            return [
                *dense_rules("head/query", "attention.query"),
                *dense_rules("head/key", "attention.key"),
            ]
    return []
