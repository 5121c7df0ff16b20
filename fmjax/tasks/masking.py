"""Masking tokens on the device: a pure function of a key and a batch (Devlin et al. 2019,
arXiv:1810.04805, section 3.1), so that every epoch masks anew and every evaluation alike."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.apply import row_weights
from fmjax.tasks.vocabulary_loss import IGNORED
from fmjax.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Which tokens are chosen and what becomes of them.

    Of each row a fixed share is chosen, as the original does, and not a number that a coin for
    each token decides: so the positions to predict fit into an array of a size known beforehand.

    Args:
        mask_token_id: what a masked token becomes.
        vocab_size: V; random tokens are drawn from all of it.
        special_ids: tokens that are never chosen; a batch's ``special_tokens_mask`` adds to them.
        probability: share of the other tokens that is chosen, rounded, at least one of a row.
        mask_share: of the chosen, how many become the mask token.
        random_share: of the chosen, how many become a random token; the rest stay.
        max_predictions: at most so many of a row.
        whole_words: whether words are chosen and not tokens, by the batch's ``word_ids`` [B, T]:
            neighbours of the same number are one word, -1 is none. Words are drawn until the share
            is reached; one that would exceed it is passed over.

    Raises:
        ValueError: shares that are none, or ids outside the vocabulary.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    max_predictions: int | None = None
    whole_words: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.probability <= 1:
            problems.append(f"probability is {self.probability}; it must be in (0, 1]")
        for name in ("mask_share", "random_share"):
            if not 0 <= (share := dataclasses.asdict(self)[name]) <= 1:
                problems.append(f"{name} is {share}; it must be in [0, 1]")
        if not problems and self.mask_share + self.random_share > 1 + 1e-9:
            problems.append(
                f"mask_share + random_share is {self.mask_share + self.random_share}, more than 1"
            )
        if self.max_predictions is not None and self.max_predictions < 1:
            problems.append(f"max_predictions is {self.max_predictions}; it must be at least 1")
        ids = (self.mask_token_id, *self.special_ids)
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            problems.append(f"ids {outside} are outside the vocabulary of {self.vocab_size}")
        if problems:
            raise ValueError("masking: " + "; ".join(problems))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Masking:
        """With a tokenizer's mask token, special tokens and vocabulary.

        Args:
            tokenizer: of `transformers`.
            settings: the other fields.

        Raises:
            ValueError: the tokenizer has no mask token.
        """
        mask: Any = tokenizer.mask_token_id
        if mask is None:
            raise ValueError("the tokenizer has no mask token; masked models need one: add it")
        return cls(
            mask_token_id=mask,
            vocab_size=len(tokenizer),
            special_ids=tuple(sorted(tokenizer.all_special_ids)),
            **settings,
        )

    def size(self, length: int) -> int:
        """M: the most tokens chosen of a row of `length` tokens."""
        most = max(1, int(self.probability * length + 0.5))
        return min(most, length, self.max_predictions or length)


class Masked(NamedTuple):
    """A masked batch and what is to be predicted.

    Args:
        batch: the same batch with other ``input_ids``.
        positions: int [B, M], different ones in a row, whether used or not; None for all, M = T.
        labels: int [B, M]: the tokens that were there; -100 at positions that are not used.
        weights: float [B, M]: the row's ``weight`` (1 without one), 0 where not used.
    """

    batch: dict[str, Any]
    positions: Array | None
    labels: Array
    weights: Array


def mask_tokens(rng: Array | None, batch: Batch, masking: Masking) -> Masked:
    """Masks a batch.

    Args:
        rng: a typed key; None masks each example by its ``index`` alone, whatever the batch.
        batch: ``input_ids`` [B, T], ``attention_mask`` [B, T] (0 is never chosen), and what
            `Masking` names.
        masking: the settings.

    Raises:
        ValueError: whole words are wanted and the batch has no ``word_ids``.
    """
    ids = jnp.asarray(batch["input_ids"])  # [B, T]
    length = ids.shape[1]
    if masking.whole_words and "word_ids" not in batch:
        raise ValueError("whole_words=True needs word_ids [B, T] in the batch; encode with them")
    may = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids))) != 0
    if "special_tokens_mask" in batch:
        may &= jnp.asarray(batch["special_tokens_mask"]) == 0
    for special in masking.special_ids:
        may &= ids != special
    words = jnp.asarray(batch["word_ids"]) if masking.whole_words else jnp.zeros_like(ids)
    keys, size = row_keys(rng, batch, 0), masking.size(length)

    def one_row(key: Array, ids: Array, may: Array, words: Array) -> tuple[Array, Array, Array]:
        choice_key, kind_key, token_key = jax.random.split(key, 3)
        wanted = jnp.floor(masking.probability * may.sum() + 0.5).astype(jnp.int32)
        wanted = jnp.minimum(jnp.clip(wanted, 1, size), may.sum())
        order = jax.random.uniform(choice_key, (length,))
        if masking.whole_words:
            chosen = _choose_words(order, may & (words >= 0), words, wanted)
            used, positions = jax.lax.top_k(chosen.astype(jnp.int32), size)  # the first ones
        else:
            _, positions = jax.lax.top_k(jnp.where(may, order, -1.0), size)  # [M]
            used = jnp.arange(size) < wanted
        kind = jax.random.uniform(kind_key, (length,))[positions]
        drawn = jax.random.randint(token_key, (length,), 0, masking.vocab_size, ids.dtype)
        old = ids[positions]
        new = jnp.where(kind < masking.mask_share + masking.random_share, drawn[positions], old)
        new = jnp.where(kind < masking.mask_share, masking.mask_token_id, new)
        used = used.astype(bool)
        masked = ids.at[positions].set(jnp.where(used, new, old))
        return masked, positions, jnp.where(used, old, IGNORED)

    masked, positions, labels = jax.vmap(one_row)(keys, ids, may & (words >= 0), words)
    return Masked({**batch, "input_ids": masked}, positions, labels, weigh(batch, labels))


def row_keys(rng: Array | None, batch: Batch, use: int) -> Array:
    """A key [B] for each row: of `rng` or, without one, of the example's ``index``.

    Args:
        rng: a typed key or None.
        batch: the rows.
        use: tells apart what one index draws for different things.
    """
    rows = len(next(iter(batch.values())))
    if rng is not None:
        return jax.random.split(rng, rows)
    index = jnp.asarray(batch.get("index", jnp.arange(rows)))
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(use), i))(index)


def gather_labels(batch: Batch, labels: Array, size: int) -> Masked:
    """The labelled positions of a batch that is masked already.

    Args:
        batch: as the model reads it.
        labels: int [B, T], -100 where nothing is predicted.
        size: M, at least as many as a row has labels: the weights of one that has more are nan.
    """
    wanted = labels != IGNORED
    used, positions = jax.lax.top_k(wanted.astype(jnp.int32), size)  # [B, M], the first ones
    kept = jnp.where(used == 1, jnp.take_along_axis(labels, positions, axis=1), IGNORED)
    lost = wanted.sum(axis=1, keepdims=True) > size
    return Masked(dict(batch), positions, kept, jnp.where(lost, jnp.nan, weigh(batch, kept)))


def weigh(batch: Batch, labels: Array) -> Array:
    """float32 [B, ...]: each row's weight where there is a label, else 0."""
    rows = row_weights(batch, labels.shape[0])
    return (labels != IGNORED) * rows.reshape(-1, *[1] * (labels.ndim - 1))


def _choose_words(order: Array, may: Array, words: Array, wanted: Array) -> Array:
    """bool [T]: the tokens of words drawn in random order while no more than `wanted` are chosen.

    Args:
        order: [T] random numbers; the n-th is the n-th word's.
        may: bool [T]: tokens that may be chosen.
        words: int [T]: neighbours that may be chosen and have the same number are a word.
        wanted: int [].
    """
    length = len(words)
    before = jnp.concatenate([jnp.full(1, -1), jnp.where(may, words, -1)[:-1]])
    begins = may & (words != before)
    number = jnp.where(may, jnp.cumsum(begins) - 1, length)  # [T]; no word has the number T
    sizes = jnp.zeros(length, jnp.int32).at[number].add(1, mode="drop")  # [words]
    ranked = jnp.argsort(jnp.where(sizes > 0, -order, 1.0))
    count = begins.sum()

    def more(state: tuple[Array, Array, Array]) -> Array:
        step, total, _ = state
        return (step < count) & (total < wanted)

    def draw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, total, taken = state
        word = ranked[step]
        fits = total + sizes[word] <= wanted
        return step + 1, total + fits * sizes[word], taken.at[word].set(fits)

    start = (jnp.int32(0), jnp.int32(0), jnp.zeros(length, bool))
    _, _, taken = jax.lax.while_loop(more, draw, start)
    return may & jnp.take(taken, number, mode="fill", fill_value=False)
