"""Examples as columns: ragged ones with a value for every token, and ones of a fixed size.

`Columns` is what every task's data become before they are batched: one ragged part for a sentence
and its token labels, two for the source and the target of a translation or for a query and its
passage, one with a group of sequences per example for multiple choice, and beside them what an
example has once: a class, an answer's position.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

IGNORED_LABEL = -100
"""The label of a token that has none, as Hugging Face and PyTorch have it."""
NO_WORD = -1
"""The word number of special tokens and padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of different lengths, stored without padding, with any values per token.

    Attributes:
      values: by the name in a batch, [total, ...] each: the values of all sequences one after the
        other.
      offsets: int64 [S + 1]; sequence s is ``offsets[s]:offsets[s + 1]`` of every value.
      max_length: tokens that a sequence may have, also the longest shape of a batch.
      fill: what padding is filled with, by name; 0 where it is not said.
      mask: the name under which a batch says what is a token (1) and what is padding (0), int32;
        None for a part that needs no mask.
      group: how many sequences make one example, [B, group, T] in a batch; None for one, [B, T].

    Raises:
      ValueError: offsets that do not fit the values, an empty sequence, one longer than
        `max_length`, or a number of sequences that is no multiple of the group.
    """

    values: Mapping[str, np.ndarray]
    offsets: np.ndarray
    max_length: int
    fill: Mapping[str, int] = dataclasses.field(default_factory=dict)
    mask: str | None = "attention_mask"
    group: int | None = None

    def __post_init__(self) -> None:
        total = int(self.offsets[-1])
        problems = [
            f"{name!r} has {len(values)} values and the offsets end at {total}"
            for name, values in self.values.items()
            if len(values) != total
        ]
        problems += [f"fill names {name!r}, no value" for name in self.fill.keys() - self.values]
        if self.mask in self.values:
            problems.append(f"the mask {self.mask!r} is also the name of a value")
        sizes = np.diff(self.offsets)
        if len(empty := np.flatnonzero(sizes < 1)):
            problems.append(f"{len(empty)} sequences are empty, the first is number {empty[0]}")
        if len(over := np.flatnonzero(sizes > self.max_length)):
            problems.append(
                f"{len(over)} sequences are longer than max_length={self.max_length}, the first is "
                f"number {over[0]} with {sizes[over[0]]} tokens"
            )
        if self.group is not None and (self.group < 1 or len(sizes) % self.group):
            problems.append(f"{len(sizes)} sequences do not make groups of {self.group}")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(
        cls,
        rows: Mapping[str, Sequence[Sequence[int] | np.ndarray]],
        *,
        max_length: int,
        fill: Mapping[str, int] | None = None,
        mask: str | None = "attention_mask",
        group: int | None = None,
    ) -> Ragged:
        """From S rows of integers for each name.

        Raises:
          ValueError: names whose rows differ in number or length, and all of `Ragged`'s.
        """
        lengths = {name: [len(row) for row in values] for name, values in rows.items()}
        first, *others = lengths
        for name in others:
            if lengths[name] != lengths[first]:
                raise ValueError(f"the rows of {name!r} are not as long as those of {first!r}")
        return cls(
            values={name: join(values) for name, values in rows.items()},
            offsets=np.cumsum([0, *lengths[first]], dtype=np.int64),
            max_length=max_length,
            fill=fill or {},
            mask=mask,
            group=group,
        )

    @property
    def per_example(self) -> int:
        """Sequences of one example."""
        return 1 if self.group is None else self.group

    def __len__(self) -> int:
        """Examples."""
        return (len(self.offsets) - 1) // self.per_example

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64 [S]: of each sequence, in tokens."""
        return np.diff(self.offsets)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: of each example's longest sequence, in tokens."""
        return self.sizes.reshape(-1, self.per_example).max(axis=1, initial=0)

    def rows(self, name: str) -> list[np.ndarray]:
        """One value's sequences, S arrays."""
        return np.split(self.values[name], self.offsets[1:-1]) if len(self.offsets) > 1 else []

    def row(self, name: str, sequence: int) -> np.ndarray:
        """One value's sequence of that number, [T, ...]."""
        return self.values[name][self.offsets[sequence] : self.offsets[sequence + 1]]

    def pad(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch, [B, T, ...] or [B, group, T, ...].

        Args:
          rows: int [B], the examples; -1 for padding rows. These attend to one padding token: a
            softmax over nothing would be NaN, and NaN times weight 0 is NaN.
          length: T, at least that of the longest.
        """
        per = self.per_example
        sequences = np.maximum(rows, 0)[:, None] * per + np.arange(per)  # [B, group]
        real = np.broadcast_to(rows[:, None] >= 0, sequences.shape)  # [B, group]
        starts, sizes = self.offsets[sequences], self.sizes[sequences]
        places = np.arange(length)
        mask = places < np.where(real, sizes, 1)[..., None]  # [B, group, T]
        keep = mask & real[..., None]
        at = np.minimum(starts[..., None] + places, int(self.offsets[-1]) - 1)  # [B, group, T]
        shape = (len(rows), length) if self.group is None else (len(rows), per, length)
        batch = {}
        for name, values in self.values.items():
            fill = np.asarray(self.fill.get(name, 0), values.dtype)
            kept = keep.reshape(*keep.shape, *[1] * (values.ndim - 1))
            padded = np.where(kept, values[at], fill)  # [B, group, T, ...]
            batch[name] = padded.reshape(*shape, *values.shape[1:])
        if self.mask is not None:
            batch[self.mask] = mask.astype(np.int32).reshape(shape)
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """N examples, ready to be batched.

    Attributes:
      ragged: the parts whose length varies, each with buckets of its own; none for images.
      fixed: by the name in a batch, [N, ...] each; in padding rows those of another row, or zeros.

    Raises:
      ValueError: no parts, parts that do not have the same N, or a name that comes twice.
    """

    ragged: tuple[Ragged, ...]
    fixed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.fixed, "weight", "index"]
        for part in self.ragged:
            names += [*part.values, *([] if part.mask is None else [part.mask])]
        problems = [f"the name {n!r} comes twice" for n in sorted(set(names)) if names.count(n) > 1]
        if not self.ragged and not self.fixed:
            problems.append("there are no columns")
        sizes = [len(part) for part in self.ragged] + [len(v) for v in self.fixed.values()]
        if len(set(sizes)) > 1:
            problems.append(f"the parts have {sizes} examples")
        if problems:
            raise ValueError("; ".join(problems))

    def __len__(self) -> int:
        return len(self.ragged[0] if self.ragged else next(iter(self.fixed.values())))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N, R], in tokens, of each ragged part."""
        lengths = [part.lengths for part in self.ragged]
        return np.stack(lengths, axis=1) if lengths else np.zeros((len(self), 0), np.int64)

    def chosen_lengths(self, length: int | Sequence[int] | None) -> tuple[int, ...]:
        """R tokens of each part, chosen for all batches; None is those of the longest example."""
        if length is None:
            return tuple(int(n) for n in self.lengths.max(axis=0))
        return tuple(length) if isinstance(length, Sequence) else (length,)

    @property
    def max_lengths(self) -> tuple[int, ...]:
        """R tokens that a sequence of each part may have."""
        return tuple(part.max_length for part in self.ragged)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything a batch can depend on."""
        digest = hashlib.sha256()
        for part in self.ragged:
            digest.update(f"{part.mask} {part.group} {sorted(part.fill.items())}".encode())
            update(digest, {"": part.offsets, **part.values})
        update(digest, self.fixed)
        return digest.hexdigest()[:16]

    def select(self, indices: Sequence[int] | np.ndarray) -> Columns:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        parts = []
        for part in self.ragged:
            per = part.per_example
            sequences = (chosen[:, None] * per + np.arange(per)).reshape(-1)  # [S]
            sizes = part.sizes[sequences]
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            at = np.arange(offsets[-1]) + np.repeat(part.offsets[sequences] - offsets[:-1], sizes)
            values = {name: column[at] for name, column in part.values.items()}
            parts.append(dataclasses.replace(part, values=values, offsets=offsets))
        fixed = {name: column[chosen] for name, column in self.fixed.items()}
        return Columns(tuple(parts), fixed)

    def assemble(
        self, rows: np.ndarray, lengths: Sequence[int], *, filling: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of one batch.

        Args:
          rows: int [B], the examples; -1 for padding rows.
          lengths: of each ragged part.
          filling: int [B], the same with examples in the place of padding rows, whose `fixed`
            columns these have; None for zeros. See `repeated`.
        """
        real = rows >= 0  # [B]
        batch: dict[str, np.ndarray] = {}
        for part, length in zip(self.ragged, lengths, strict=True):
            batch |= part.pad(rows, length)
        for name, column in self.fixed.items():
            values = column[np.maximum(rows, 0) if filling is None else filling]  # [B, ...]
            if filling is None:
                values[~real] = 0
            batch[name] = values
        batch["weight"] = real.astype(np.float32)
        batch["index"] = rows.astype(np.int32)
        return batch


def repeated(rows: np.ndarray) -> np.ndarray:
    """A global batch's examples in the place of its padding rows too, in turn: int [B].

    Their weight stays 0. What normalises by a batch's own statistics, as batch normalisation does,
    then does so by those of examples and not of zeros.

    Args:
      rows: int [B], -1 for padding rows, at least one of an example.
    """
    padding = rows < 0
    own = rows[~padding]
    result = rows.copy()
    result[padding] = own[np.arange(padding.sum()) % len(own)]
    return result


def join(rows: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """int32 [total]: rows one after the other."""
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])


def update(digest: hashlib._Hash, columns: Mapping[str, np.ndarray]) -> None:
    """Adds named arrays to a hash."""
    for name, values in columns.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
