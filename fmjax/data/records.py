"""What the readers in this folder return: parallel sequences that can be selected from.

`TextExamples` (examples.py) is the like for texts with labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.data.files import raise_problems

Indices = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TaggedSentences:
    """N sentences, a sequence of words each, and a tag for every word.

    Attributes:
      words: N sequences of W_n words each.
      tags: N arrays, int32 [W_n], of indices into `tag_names`; None when there are none.
      tag_names: the tags in the order of their indices.
      documents: N names of the documents the sentences are from, when the source has them.

    Raises:
      ValueError: lengths that differ, or a tag outside `tag_names`.
    """

    words: Sequence[Sequence[str]]
    tags: Sequence[np.ndarray] | None
    tag_names: tuple[str, ...]
    documents: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_lengths(
            "TaggedSentences", words=self.words, tags=self.tags, documents=self.documents
        )
        if self.tags is None:
            return
        problems = [
            f"sentence {n}: {len(tags)} tags for {len(words)} words"
            for n, (words, tags) in enumerate(zip(self.words, self.tags, strict=True))
            if len(words) != len(tags)
        ]
        flat = np.concatenate([np.zeros(0, np.int32), *self.tags])
        outside = flat[(flat < 0) | (flat >= len(self.tag_names))]
        if outside.size:
            problems.append(f"tag {outside[0]} is outside the {len(self.tag_names)} tag_names")
        raise_problems("TaggedSentences", problems)

    def __len__(self) -> int:
        return len(self.words)

    def select(self, indices: Indices) -> TaggedSentences:
        """The sentences at `indices`, in that order."""
        return dataclasses.replace(
            self,
            words=_pick(self.words, indices),
            tags=_pick(self.tags, indices),
            documents=_pick(self.documents, indices),
        )


class Answer(NamedTuple):
    """A text that answers a question, and the character of the context at which it starts."""

    text: str
    start: int


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """N questions about contexts that hold their answers.

    Attributes:
      ids: N names of the questions, all different.
      questions: N strings.
      contexts: N strings.
      answers: N sequences of the answers people gave; an empty one says that the context does not
        answer the question. None for questions whose answers are not known.
      titles: N names of what the contexts are from, when the source has them.

    Raises:
      ValueError: lengths that differ.
    """

    ids: Sequence[str]
    questions: Sequence[str]
    contexts: Sequence[str]
    answers: Sequence[Sequence[Answer]] | None
    titles: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_lengths(
            "Questions",
            ids=self.ids,
            questions=self.questions,
            contexts=self.contexts,
            answers=self.answers,
            titles=self.titles,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Indices) -> Questions:
        """The questions at `indices`, in that order."""
        return Questions(
            ids=_pick(self.ids, indices),
            questions=_pick(self.questions, indices),
            contexts=_pick(self.contexts, indices),
            answers=_pick(self.answers, indices),
            titles=_pick(self.titles, indices),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TextPairs:
    """N pairs of texts, one to be made from the other: translations, summaries, definitions.

    Attributes:
      sources: N strings that a model reads.
      targets: N strings that it is to write.
      ids: N names of the pairs, when the source has them.

    Raises:
      ValueError: lengths that differ.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_lengths("TextPairs", sources=self.sources, targets=self.targets, ids=self.ids)

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, indices: Indices) -> TextPairs:
        """The pairs at `indices`, in that order."""
        return TextPairs(
            sources=_pick(self.sources, indices),
            targets=_pick(self.targets, indices),
            ids=_pick(self.ids, indices),
        )

    def reverse(self) -> TextPairs:
        """The same pairs, sources made from targets."""
        return dataclasses.replace(self, sources=self.targets, targets=self.sources)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """N running texts, for language modelling.

    Attributes:
      texts: N strings; line breaks within them separate paragraphs or sentences.
      names: N names of the documents, when the source has them.

    Raises:
      ValueError: lengths that differ.
    """

    texts: Sequence[str]
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_lengths("Documents", texts=self.texts, names=self.names)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Indices) -> Documents:
        """The documents at `indices`, in that order."""
        return Documents(texts=_pick(self.texts, indices), names=_pick(self.names, indices))


def _check_lengths(name: str, **columns: Sequence[Any] | None) -> None:
    (first, expected), *rest = columns.items()
    assert expected is not None  # the first column of each record is never None
    raise_problems(
        name,
        [
            f"{len(column)} {other} for {len(expected)} {first}"
            for other, column in rest
            if column is not None and len(column) != len(expected)
        ],
    )


def _pick(column: Any, indices: Indices) -> Any:
    if column is None:
        return None
    return [column[i] for i in np.asarray(indices, dtype=np.int64)]
