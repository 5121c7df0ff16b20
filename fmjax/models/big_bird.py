"""BigBird (Zaheer et al. 2020, arXiv:2007.14062): BERT whose attention, for long inputs, is sparse
in blocks: global, neighbouring and random ones. HF "big_bird".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import bert, roberta
from fmjax.models.bert import IGNORED, inputs
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.encoder import Inputs, Shared, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, dense_rules, norm_rules, vocabulary_rules

__all__ = ["IGNORED", "inputs"]

PENALTY = -10000.0  # what PyTorch adds to the scores of masked keys in sparse attention


@dataclasses.dataclass(frozen=True)
class Config(bert.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50358
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 4096
    sep_token_id: int | None = 66
    attention_type: str = "block_sparse"
    use_bias: bool = True
    rescale_embeddings: bool = False
    block_size: int = 64
    num_random_blocks: int = 3

    def __post_init__(self) -> None:
        problems = []
        if self.attention_type not in ("block_sparse", "original_full"):
            problems.append(
                f"attention_type={self.attention_type!r} must be 'block_sparse' or 'original_full'"
            )
        if self.block_size < 1:
            problems.append(f"block_size={self.block_size} must be positive")
        if self.num_random_blocks < 0:
            problems.append(f"num_random_blocks={self.num_random_blocks} must not be negative")
        bert.check_config(self, problems)

    def sparse(self, length: int) -> bool:
        """Whether inputs of this many tokens are attended to in blocks: what is shorter than all
        blocks that a token sees, and decoders, attend to everything.
        """
        seen = (5 + 2 * self.num_random_blocks) * self.block_size
        return self.attention_type == "block_sparse" and not self.is_decoder and length > seen


MODEL_TYPE = "big_bird"
HEADS = {
    "model": "BigBirdModel",
    "pretraining": "BigBirdForPreTraining",
    "masked_lm": "BigBirdForMaskedLM",
    "causal_lm": "BigBirdForCausalLM",
    "sequence_classification": "BigBirdForSequenceClassification",
    "token_classification": "BigBirdForTokenClassification",
    "question_answering": "BigBirdForQuestionAnswering",
    "multiple_choice": "BigBirdForMultipleChoice",
}
POOLED = ("pretraining", "multiple_choice")
# Zaheer et al. 2020, appendix E, table 8: the sizes of BERT and RoBERTa with 4096 tokens.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=32, block_size=2, num_random_blocks=1,
        rescale_embeddings=True, sep_token_id=3,
    ),
    "base": Config(),
    "large": Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}  # fmt: skip


def random_blocks(config: Config, layer: int, length: int, *, train: bool) -> np.ndarray:
    """The random blocks of keys that each inner block of queries sees.

    As in PyTorch they are drawn by numpy's legacy generator, seeded with the layer's number, when
    training; otherwise all of them are block 0.

    Args:
        config: the model's.
        layer: its number.
        length: T, a multiple of the block size.
        train: whether they are drawn.

    Returns:
        int32 [H, T / block_size - 2, num_random_blocks].
    """
    heads, count, size = config.num_attention_heads, config.num_random_blocks, config.block_size
    rows = length // size - 2
    result = np.zeros((heads, rows, count), np.int32)
    if not train or not count:
        return result
    rng = np.random.RandomState(layer)
    if length in (1024, 3072, 4096):
        for head in range(heads):
            result[head] = _paper_rows(rng, config)[:rows]
        return result
    end = 2 * count + 5  # random blocks lie in the first ones only
    for row in range(1, rows + 1):
        for head in range(heads):
            barred = {row - 1, row, row + 1, 0, end - 1}
            if row == 1:
                barred.add(end - 2)
            if row == end - 2:
                barred.add(1)
            drawn = [block for block in rng.permutation(end) if block not in barred]
            result[head, row - 1] = drawn[:count]
    return result


def _paper_rows(rng: np.random.RandomState, config: Config) -> np.ndarray:
    """The plan of the authors' code for the lengths they trained on: [N - 2, R]."""
    size, count = config.block_size, config.num_random_blocks
    blocks = config.max_position_embeddings // size
    middle = np.arange(1, blocks - 1, dtype=np.int32)
    last = 1024 // size - 1 if 2 * size < 1024 else blocks - 1
    rows = []
    for row in range(1, blocks - 1):
        start, end = row - 2, row
        if row <= 2:
            among = middle[row + 1 : last]
        elif row >= blocks - 3 or start > last:
            among = middle[:last]
        elif end + 1 == last:
            among = middle[:start]
        else:
            among = np.concatenate([middle[:start], middle[end + 1 : last]])
        rows.append(rng.permutation(among)[:count])
    return np.array(rows)


def seen_blocks(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that inner blocks of queries see without chance: first, neighbours, last.

    Args:
        blocks: N.

    Returns:
        (ids int [N - 2, 5], whether they count bool [N - 2, 5]): beside the ends a neighbour is
        the first or the last block already.
    """
    row = np.arange(1, blocks - 1)
    ids = np.stack([0 * row, row - 1, row, row + 1, 0 * row + blocks - 1], axis=1)
    valid = np.ones(ids.shape, bool)
    valid[0, 1] = valid[-1, 3] = False
    return ids, valid


class SparseAttention(nn.Module):
    """Attention by blocks, with the parameters of `fmjax.nn.attention.Attention`.

    Queries of the first and the last block see everything, the others the first and the last
    block, their own and its neighbours, and random ones; time and memory are linear in T.

    Args:
        config: the family's.
        with_probabilities: whether the probabilities are returned.
    """

    config: Config
    with_probabilities: bool

    @nn.compact
    def __call__(self, x: Array, keep: Array, random: Array) -> tuple[Array, Array | None]:
        """Attends from x to itself.

        Args:
            x: [B, T, D].
            keep: [B, T], 1 for tokens and 0 for padding.
            random: int [H, N - 2, R], see `random_blocks`.

        Returns:
            ([B, T, D], [B, H, T, T] or None).
        """
        config = self.config
        if self.has_variable("adapters", "prefix_key"):
            raise ValueError(
                "block-sparse attention has no prefix; set attention_type='original_full'"
            )
        heads, size = config.num_attention_heads, config.block_size
        batch, length, width = x.shape
        init = nn.initializers.normal(config.initializer_range)
        padding = -length % size
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        keep = jnp.pad(keep, ((0, 0), (0, padding))).astype(jnp.float32)
        blocks = x.shape[1] // size

        def project(name: str) -> Array:  # [B, T, D] -> [B, H, N, M, K], M = block_size
            y = Dense(width, config.use_bias, init, name=name)(x)
            y = y.reshape(batch, blocks, size, heads, width // heads)
            return y.transpose(0, 3, 1, 2, 4)

        query, key, value = project("query"), project("key"), project("value")
        query = query / math.sqrt(width // heads)
        kept = keep.reshape(batch, 1, blocks, size)  # [B, 1, N, M]

        # The first and the last block of queries: all keys.
        scores = jnp.einsum("BHNMK,BHSK->BHNMS", query[:, :, (0, -1)], _rows(key))
        scores = scores.astype(jnp.float32) + _penalty(_rows(kept)[:, :, None, None])
        outer = jax.nn.softmax(scores, axis=-1).astype(x.dtype)  # [B, H, 2, M, T]
        ends = jnp.einsum("BHNMS,BHSK->BHNMK", outer, _rows(value))

        # The others: the blocks they see, J of them, side by side.
        fixed, valid = seen_blocks(blocks)
        ids = jnp.concatenate([jnp.broadcast_to(fixed, (heads, *fixed.shape)), random], axis=-1)
        head = jnp.arange(heads)[:, None, None]
        near_key, near_value = key[:, head, ids], value[:, head, ids]  # [B, H, N - 2, J, M, K]
        scores = jnp.einsum("BHNMK,BHNJSK->BHNMJS", query[:, :, 1:-1], near_key)
        mask = kept[:, 0, ids][:, :, :, None]  # [B, H, N - 2, 1, J, M], keys
        # Padding among the queries is masked too where PyTorch's band and random masks are.
        strict = np.zeros((blocks - 2, ids.shape[-1]), bool)
        strict[1:-1, 1:4] = True
        strict[:, 5:] = True
        both = mask * kept[:, :, 1:-1, :, None, None]  # [B, H, N - 2, M, J, M]
        mask = jnp.where(strict[:, None, :, None], both, mask)
        scores = scores.astype(jnp.float32) + _penalty(mask)
        valid = np.pad(valid, ((0, 0), (0, random.shape[-1])), constant_values=True)
        scores = jnp.where(valid[:, None, :, None], scores, -jnp.inf)
        inner = jax.nn.softmax(scores, axis=(-2, -1)).astype(x.dtype)
        middle = jnp.einsum("BHNMJS,BHNJSK->BHNMK", inner, near_value)

        out = jnp.concatenate([ends[:, :, :1], middle, ends[:, :, 1:]], axis=2)
        out = out * kept[..., None].astype(x.dtype)
        out = out.transpose(0, 2, 3, 1, 4).reshape(batch, -1, width)[:, :length]  # [B, T, D]
        out = Dense(width, kernel_init=init, name="out")(out)
        if not self.with_probabilities:
            return out, None
        probabilities = _spread(outer, inner, ids, valid)[:, :, :length, :length]
        return out, probabilities


def _rows(x: Array) -> Array:
    """[B, H, N, M, ...] -> [B, H, N * M, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _penalty(mask: Array) -> Array:
    return (1.0 - mask) * PENALTY


def _spread(outer: Array, inner: Array, ids: Array, valid: np.ndarray) -> Array:
    """Probabilities by block as [B, H, T, S]; of a block seen twice the later one's, as PyTorch."""
    batch, heads, rows, size, count, _ = inner.shape
    blocks = rows + 2
    full = jnp.zeros((batch, heads, rows, size, blocks, size), inner.dtype)
    for j in range(count):
        here = (ids[..., j, None] == jnp.arange(blocks)) & valid[:, j, None]  # [H, N - 2, N]
        full = jnp.where(here[:, :, None, :, None], inner[..., j, None, :], full)
    full = full.reshape(batch, heads, rows, size, -1)  # [B, H, N - 2, M, T]
    return _rows(jnp.concatenate([outer[:, :, :1], full, outer[:, :, 1:]], axis=2))


class Block(bert.Block):
    """BERT's block with sparse attention where the input is long."""

    def attention(self, name: str) -> Attention:
        return super().attention(name, use_bias=self.config.use_bias, out_bias=True)

    def attend(
        self, x: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, Array | None, Cache | None]:
        if shared.extra is None:
            return super().attend(x, cache, index, shared)
        keep, random = shared.extra
        sparse = SparseAttention(self.config, self.output_attentions, name="attn")
        return *sparse(x, keep, random[index]), None


class Embeddings(TextEmbeddings):
    """Word vectors may be scaled; dropout comes before the norm.

    Args:
        scale: of the word vectors.
    """

    scale: float = 1.0

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = inputs.inputs_embeds
        if x is None:
            x = self.word(inputs.input_ids)  # pyright: ignore[reportArgumentType]
        types = inputs.token_type_ids
        types = jnp.zeros((1, 1), jnp.int32) if types is None else types
        x = x * self.scale + self.token_type(types) + self.position(inputs.position_ids)
        return self.norm(self.dropout(x, inputs.train))


class Head(roberta.Head):
    """RoBERTa's heads; answers are found by a feed-forward layer, outside the question."""

    vocabulary = ("pretraining", "masked_lm", "causal_lm")

    @property
    def vocabulary_act(self) -> str:
        return self.config.hidden_act

    def first_token(self, hidden: Array, act: str, train: bool) -> Array:
        return super().first_token(hidden, self.config.hidden_act, train)

    def answers(self, hidden: Array, inputs: Inputs) -> Array:
        config, train = self.config, inputs.train
        init = nn.initializers.normal(config.initializer_range)
        rate = config.hidden_dropout_prob
        mlp = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")
        x = self.drop(mlp(self.drop(hidden, train, rate)), train, rate)
        x = LayerNorm(config.layer_norm_eps, name="norm")(x + hidden)
        scores = super().answers(x, inputs)
        question = inputs.extra
        return scores if question is None else scores - 1e6 * question[..., None]


class Model(bert.Model):
    """BigBird with one head; see `fmjax.nn.encoder.Encoder`.

    All heads but "question_answering" have the pooler, as PyTorch's files do. With
    ``add_cross_attention`` it differs from transformers', where self-attention attends to the
    encoder's states instead of the decoder's own, padding among them included.
    """

    block = Block
    head_module = Head
    heads = HEADS

    def embeddings(self) -> Embeddings:
        plain, config = super().embeddings(), self.config
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        scale = math.sqrt(config.hidden_size) if config.rescale_embeddings else 1.0
        return Embeddings(**fields, scale=scale)

    def shared(self, inputs: Inputs, embedded: Array) -> Shared:
        shared, config, length = super().shared(inputs, embedded), self.config, inputs.length
        if not config.sparse(length):
            return shared
        keep = inputs.attention_mask
        keep = jnp.ones((embedded.shape[0], length)) if keep is None else keep
        if keep.ndim != 2:
            raise ValueError(
                f"sparse attention takes an attention_mask [B, T], not one of shape {keep.shape}; "
                "for others set attention_type='original_full'"
            )
        padded = length + -length % config.block_size
        random = np.stack(
            [
                random_blocks(config, layer, padded, train=inputs.train)
                for layer in range(self.num_layers)
            ]
        )
        return shared._replace(mask=None, extra=(keep, jnp.asarray(random)))

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        config = self.config
        if not has_pooler(config, self.head):
            return None
        init = nn.initializers.normal(config.initializer_range)
        return jnp.tanh(Dense(config.hidden_size, kernel_init=init, name="pooler")(hidden[:, 0]))

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        cache: PyTree = None,
        question_lengths: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; beside the arguments of `fmjax.nn.encoder.Encoder`:

        Args:
            question_lengths: int [B, 1], of the head "question_answering": how many tokens from
                the start are no answer. None counts up to the first `sep_token_id`; token types
                that are not given are 0 there and 1 behind.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        if question_lengths is not None and self.head != "question_answering":
            raise ValueError(f"question_lengths is for question answering, not {self.head!r}")
        inputs = self.check(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            cache,
            train,
        )
        if self.head == "question_answering":
            if question_lengths is None and input_ids is not None:
                separators = input_ids == self.config.sep_token_id
                question_lengths = jnp.argmax(separators, axis=-1)[:, None] + 1
            if question_lengths is not None:
                place = jnp.arange(inputs.length)[None]
                question = place < question_lengths  # [B, T]
                if token_type_ids is None:
                    inputs = inputs._replace(token_type_ids=1 - question.astype(jnp.int32))
                inputs = inputs._replace(extra=question & (place > 0))  # [CLS] is "no answer"
        return self.run(
            inputs,
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )


def has_pooler(config: Config, head: str) -> bool:
    """Whether a head has the pooler."""
    return head in POOLED or (config.add_pooling_layer and head != "question_answering")


PREFIX = "bert."
FIXED = bert.FIXED | {"norm_type": "postnorm"}


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether there is a pooler, which Flax
    files of some heads lack.
    """
    pooler = any(name.removeprefix(PREFIX).startswith("pooler.") for name in names)
    wanted = pooler or head in (*POOLED, "question_answering")
    return dataclasses.replace(config, add_pooling_layer=wanted)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    tied = "cls.predictions.decoder.weight"
    table = bert.body_rules(config, head, tied=tied, bias=config.use_bias)
    if has_pooler(config, head):
        table += dense_rules("pooler", f"{bert.body_of(head)}pooler")
    if head in Head.vocabulary:
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
            bias="cls.predictions.bias",
        )
    if head == "pretraining":
        table += dense_rules("head/seq_relationship", "cls.seq_relationship")
    if head == "question_answering":
        there = "qa_classifier"
        return [
            *table,
            *dense_rules("head/mlp/up", f"{there}.intermediate.dense"),
            *dense_rules("head/mlp/down", f"{there}.output.dense"),
            *norm_rules("head/norm", f"{there}.output.LayerNorm"),
            *dense_rules("head/classifier", f"{there}.qa_outputs"),
        ]
    if head == "sequence_classification":
        return table + roberta.head_rules(config, head)
    return table + bert.classifier_rules(head)
