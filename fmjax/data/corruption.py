"""Noise for encoder-decoders, on the host: T5's spans and BART's denoising.

A corruption is a pure function of a random generator and tokens, and says beforehand how long its
inputs and targets are. Inside a stream each row's generator follows from the seed, the number of
the batch and the place in it: so noise is new in every epoch, the same however many processes
share the batch, and the same again after a restart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, Columns, Ragged
from fmjax.data.tokens import padding_id, special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Corruption(Protocol):
    """Makes an encoder's inputs and a decoder's targets of one row of tokens.

    A frozen dataclass of plain values: what `repr` shows is what the noise depends on.
    """

    @property
    def pad_id(self) -> int: ...

    def __call__(
        self, rng: np.random.Generator, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def lengths(self, length: int) -> tuple[int, int]:
        """What inputs and targets of at most `length` tokens have at most."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """T5's objective: spans are replaced by sentinels, and the targets are what was there.

    Raffel et al. 2020, arXiv:1910.10683, section 3.1.4. Of n tokens ``round(n density)`` are noise,
    in ``round(noise / mean_span)`` spans; how tokens are shared out over the spans, and over the
    gaps before them, is drawn uniformly; so a text begins with a gap and ends with a span. Lengths
    follow from n alone: 568 tokens make 512 inputs and 114 targets, both with their end token.

    Attributes:
      sentinels: token ids; the first stands for the first span. In T5 they fall from the
        vocabulary's end.
      eos_id: what ends inputs and targets.
      pad_id: of padding.
      density: share of the tokens that is noise.
      mean_span: tokens, on average.

    Raises:
      ValueError: a density outside (0, 1), a mean span below 1, or no sentinels.
    """

    sentinels: tuple[int, ...]
    eos_id: int
    pad_id: int
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.density < 1:
            problems.append(f"density={self.density} must be in (0, 1)")
        if self.mean_span < 1:
            problems.append(f"mean_span={self.mean_span} must be at least 1 token")
        if not self.sentinels or len(set(self.sentinels)) < len(self.sentinels):
            problems.append(f"sentinels={self.sentinels} must be different ids, at least one")
        if problems:
            raise ValueError("span corruption: " + "; ".join(problems))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, **settings: float) -> SpanCorruption:
        """With the tokenizer's ``<extra_id_0>``, ``<extra_id_1>``, ... as sentinels.

        Args:
          tokenizer: of `transformers`.
          settings: density, mean_span.

        Raises:
          ValueError: the tokenizer has none of them, no end or no pad token.
        """
        vocabulary = tokenizer.get_vocab()
        count = 0
        while f"<extra_id_{count}>" in vocabulary:
            count += 1
        if not count:
            raise ValueError(
                "the tokenizer has no <extra_id_0>; add such tokens, or give SpanCorruption its "
                "sentinels"
            )
        return cls(
            sentinels=tuple(vocabulary[f"<extra_id_{i}>"] for i in range(count)),
            eos_id=special_id(tokenizer, "eos"),
            pad_id=padding_id(tokenizer),
            **settings,
        )

    def counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, spans) of `length` tokens."""
        noise = min(max(round(length * self.density), 1), length - 1)
        # Every span has a token, and so has every gap before one.
        return noise, max(min(max(round(noise / self.mean_span), 1), noise, length - noise), 0)

    def lengths(self, length: int) -> tuple[int, int]:
        """(inputs, targets) of `length` tokens, end tokens included.

        Raises:
          ValueError: there are fewer sentinels than spans.
        """
        noise, spans = self.counts(length)
        if spans > len(self.sentinels):
            raise ValueError(
                f"{length} tokens have {spans} spans and there are {len(self.sentinels)} "
                "sentinels; take shorter rows or a larger mean_span"
            )
        return length - noise + spans + 1, noise + spans + 1

    def raw_length(self, inputs: int) -> int:
        """How many tokens make at most `inputs` inputs: rows for an encoder of that length.

        Raises:
          ValueError: even two tokens make more, or there are fewer sentinels than spans.
        """
        length = 2
        if self.lengths(length)[0] > inputs:
            raise ValueError(f"inputs={inputs} leave no room; {self.lengths(2)[0]} is the least")
        while self.lengths(length + 1)[0] <= inputs:
            length += 1
        return length

    def __call__(
        self, rng: np.random.Generator, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) int32 of tokens [n].

        Raises:
          ValueError: there are fewer sentinels than spans.
        """
        self.lengths(len(tokens))
        noise, spans = self.counts(len(tokens))
        inputs: list[np.ndarray | list[int]] = []
        targets: list[np.ndarray | list[int]] = []
        at = 0
        gaps = _shares(rng, len(tokens) - noise, spans)
        for gap, span, sentinel in zip(
            gaps, _shares(rng, noise, spans), self.sentinels, strict=False
        ):
            inputs += [tokens[at : at + gap], [sentinel]]
            targets += [[sentinel], tokens[at + gap : at + gap + span]]
            at += gap + span
        inputs += [tokens[at:], [self.eos_id]]
        targets.append([self.eos_id])
        return np.concatenate(inputs).astype(np.int32), np.concatenate(targets).astype(np.int32)


def restore_spans(
    inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int], eos_id: int
) -> np.ndarray:
    """int32 [n]: a text again, from corrupted inputs and the (perhaps predicted) targets.

    Args:
      inputs, targets: int, as `SpanCorruption` makes them; what follows the end token is ignored.
      sentinels: token ids.
      eos_id: of the end token.

    A sentinel that the targets do not have stands for nothing.
    """
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    marks = set(sentinels)
    for token in _until(targets, eos_id):
        if token in marks:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    text: list[int] = []
    for token in _until(inputs, eos_id):
        text += spans.get(token, []) if token in marks else [token]
    return np.array(text, np.int32)


def _until(tokens: np.ndarray, eos_id: int) -> list[int]:
    found = np.flatnonzero(tokens == eos_id)
    return tokens[: found[0] if len(found) else None].tolist()


def _shares(rng: np.random.Generator, count: int, parts: int) -> np.ndarray:
    """int64 [parts]: `count` things in that many parts of at least one, each way as likely."""
    if parts < 1:
        return np.zeros(0, np.int64)
    cuts = np.sort(rng.choice(count - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """BART's objective: the inputs are a corrupted text, the targets the text itself.

    Lewis et al. 2020, arXiv:1910.13461, section 2.2. In this order: sentences are permuted, tokens
    deleted, spans replaced by one mask each (text infilling; a span of no tokens inserts a mask),
    and the text rotated. By default as the published models were trained: 30 % of the tokens
    infilled, sentences permuted.

    Attributes:
      mask_id, bos_id, eos_id, pad_id: token ids; inputs and targets have both bos and eos.
      sentence_ends: tokens after which a sentence ends; () permutes nothing.
      infill: share of the tokens in masked spans.
      mean_span: tokens, the mean of a Poisson distribution.
      delete: share of the tokens that is deleted.
      rotate: how likely a text is rotated to begin with another of its tokens.

    Raises:
      ValueError: shares outside [0, 1), or a mean span that is not positive.
    """

    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    sentence_ends: tuple[int, ...] = ()
    infill: float = 0.3
    mean_span: float = 3.0
    delete: float = 0.0
    rotate: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be in [0, {most}"
            for name, value, most, fits in [
                ("infill", self.infill, "1]", 0 <= self.infill <= 1),
                ("delete", self.delete, "1)", 0 <= self.delete < 1),
                ("rotate", self.rotate, "1]", 0 <= self.rotate <= 1),
            ]
            if not fits
        ]
        if self.mean_span <= 0:
            problems.append(f"mean_span={self.mean_span} must be positive")
        if problems:
            raise ValueError("denoising: " + "; ".join(problems))

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, sentence_ends: str = ".!?", **settings: float
    ) -> Denoising:
        """With the tokenizer's mask, begin, end and pad token.

        Args:
          tokenizer: of `transformers`.
          sentence_ends: tokens that are one of these characters (and perhaps a space) end a
            sentence.
          settings: infill, mean_span, delete, rotate.

        Raises:
          ValueError: the tokenizer lacks one of them.
        """
        pieces = tokenizer.get_vocab()
        ends = [
            pieces[token]
            for character in sentence_ends
            for token in (character, "Ġ" + character, "▁" + character)
            if token in pieces
        ]
        return cls(
            mask_id=special_id(tokenizer, "mask"),
            bos_id=special_id(tokenizer, "bos"),
            eos_id=special_id(tokenizer, "eos"),
            pad_id=padding_id(tokenizer),
            sentence_ends=tuple(sorted(ends)),
            **settings,
        )

    def lengths(self, length: int) -> tuple[int, int]:
        """(inputs, targets) of `length` tokens have at most two more."""
        return length + 2, length + 2

    def __call__(
        self, rng: np.random.Generator, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) int32 of tokens [n]."""
        noised = tokens
        if self.sentence_ends:
            noised = permute_sentences(rng, noised, self.sentence_ends)
        if self.delete:
            noised = delete_tokens(rng, noised, self.delete)
        if self.infill:
            noised = infill(rng, noised, self.mask_id, share=self.infill, mean_span=self.mean_span)
        if self.rotate and rng.random() < self.rotate and len(noised):
            noised = np.roll(noised, -int(rng.integers(len(noised))))
        return self._framed(noised), self._framed(tokens)

    def _framed(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.bos_id], tokens, [self.eos_id]]).astype(np.int32)


def permute_sentences(
    rng: np.random.Generator, tokens: np.ndarray, sentence_ends: Sequence[int]
) -> np.ndarray:
    """The sentences of a text in random order; what follows the last end is one too."""
    ends = np.flatnonzero(np.isin(tokens, sentence_ends)) + 1
    sentences = [part for part in np.split(tokens, ends) if len(part)]
    if not sentences:
        return tokens
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def delete_tokens(rng: np.random.Generator, tokens: np.ndarray, share: float) -> np.ndarray:
    """A text without ``round(n share)`` of its n tokens."""
    count = round(len(tokens) * share)
    return np.delete(tokens, rng.choice(len(tokens), count, replace=False))


def infill(
    rng: np.random.Generator,
    tokens: np.ndarray,
    mask_id: int,
    *,
    share: float = 0.3,
    mean_span: float = 3.0,
) -> np.ndarray:
    """A text in which spans are one mask each: never longer than it was.

    Args:
      rng: the generator.
      tokens: int [n].
      mask_id: the mask's token id.
      share: of the tokens, rounded, at least one, that the spans hold together.
      mean_span: of the Poisson distribution that lengths are drawn from; 0 inserts a mask. Spans do
        not touch; the last one drawn is cut to the share.
    """
    if not len(tokens):
        return tokens
    budget = max(round(len(tokens) * share), 1)
    drawn: list[int] = []
    while sum(drawn) < budget:
        drawn.append(min(int(rng.poisson(mean_span)), budget - sum(drawn)))
    spans = [length for length in drawn if length]
    inserted = min(len(drawn) - len(spans), budget - len(spans))
    lengths = [*spans, *[0] * inserted]
    # Spans stand before, between and behind the tokens that are kept.
    places = len(tokens) - budget + 1
    if len(lengths) > places:
        lengths = [*lengths[: places - 1], sum(lengths[places - 1 :])]
    parts: list[np.ndarray | list[int]] = []
    at = before = 0
    for place, length in zip(
        np.sort(rng.choice(places, len(lengths), replace=False)),
        rng.permutation(lengths),
        strict=True,
    ):
        parts += [tokens[at : at + place - before], [mask_id]]
        at += place - before + length
        before = place
    return np.concatenate([*parts, tokens[at:]]).astype(np.int32)


def corrupted_batch(
    corruption: Corruption,
    tokens_of: Callable[[int], np.ndarray],
    number: int,
    rows: np.ndarray,
    mine: slice,
    *,
    length: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """One process's part of a batch: inputs and targets, their noise drawn by batch and place.

    Args:
      corruption: the noise.
      tokens_of: a row's number -> its tokens.
      number: of the batch.
      rows: int [B] of the global batch, -1 for padding rows.
      mine: this process's.
      length: tokens that a row has at most.
      seed: of the stream.
    """
    inputs, targets = [], []
    places = np.arange(len(rows))[mine]
    for place in places[rows[mine] >= 0].tolist():
        rng = np.random.default_rng([seed, number, place])
        noised, target = corruption(rng, tokens_of(int(rows[place])))
        inputs.append(noised)
        targets.append(target)
    own = np.where(rows[mine] >= 0, np.cumsum(rows[mine] >= 0) - 1, -1)
    if not inputs:  # a process whose rows are all padding
        inputs, targets = [[corruption.pad_id]], [[IGNORED_LABEL]]
    most = corruption.lengths(length)
    made = Columns(
        (
            Ragged.of(
                {"input_ids": inputs}, max_length=most[0], fill={"input_ids": corruption.pad_id}
            ),
            Ragged.of(
                {"labels": targets}, max_length=most[1], fill={"labels": IGNORED_LABEL}, mask=None
            ),
        )
    )
    return {**made.assemble(own, most), "index": rows[mine].astype(np.int32)}


def corruption_identity(corruption: Corruption | None) -> dict[str, Any]:
    """What a stream's state says about its noise."""
    return {} if corruption is None else {"corruption": repr(corruption)}
