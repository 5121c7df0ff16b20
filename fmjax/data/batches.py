"""Token ids in, batches out: a deterministic, sharded, resumable stream built on grain.

The number of a batch alone determines it: batch k belongs to epoch ``k // batches_per_epoch``,
and the order of an epoch follows from the seed and the epoch. So the position of a stream is one
integer, and resuming is exact on any number of processes.

Examples are put into buckets by length, so that few shapes are compiled and little is padded. A
bucket's examples that do not fill a batch move up to the next longer bucket; hence only the last
batch of the longest bucket can hold padding rows, at most one batch an epoch, and the number of
batches of each shape is the same in every epoch.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.examples import TextExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_AT_ONCE = 4096  # texts; bounds the memory that the tokenizer's own objects take


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedText:
    """N tokenized examples of different lengths, stored without padding.

    Attributes:
      tokens: int32 [total], the token ids of all examples one after the other.
      offsets: int64 [N + 1]; example n is ``tokens[offsets[n]:offsets[n + 1]]``.
      max_length: tokens that an example may have, also the longest shape of a batch.
      token_type_ids: int32 [total], if the tokenizer makes them.
      labels: as in TextExamples.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_length: int
    token_type_ids: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N], in tokens."""
        return np.diff(self.offsets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything a batch can depend on."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.offsets, self.token_type_ids, self.labels):
            if values is None:
                digest.update(b"none")
            else:
                digest.update(f"{values.dtype} {values.shape}".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: TextExamples,
    *,
    max_length: int,
    vocab_size: int | None = None,
) -> EncodedText:
    """Tokenizes examples, with the tokenizer's special tokens, cut to `max_length` tokens.

    Args:
      tokenizer: of `transformers`. Pairs are cut at the end of the longer text first.
      examples: N texts or pairs of texts.
      max_length: in tokens, special tokens included.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: a max_length that leaves no room for text, a text without any token, or a token
        id that the model's vocabulary does not have.
    """
    pairs = examples.text_pairs
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text beside {special} special tokens"
        )
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(examples), TOKENIZED_AT_ONCE):
        part = slice(start, start + TOKENIZED_AT_ONCE)
        encoding = tokenizer(
            list(examples.texts[part]),
            None if pairs is None else list(pairs[part]),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        ids: Any = encoding["input_ids"]
        tokens += [np.asarray(row, np.int32) for row in ids]
        lengths += [len(row) for row in ids]
        if "token_type_ids" in encoding:
            rows: Any = encoding["token_type_ids"]
            types += [np.asarray(row, np.int32) for row in rows]
    empty = [n for n, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} texts have no tokens, the first is example {empty[0]}: "
            f"{examples.texts[empty[0]]!r}; remove them"
        )
    encoded = EncodedText(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        max_length=max_length,
        token_type_ids=np.concatenate(types) if types else None,
        labels=examples.labels,
    )
    if vocab_size is not None and len(encoded.tokens) and encoded.tokens.max() >= vocab_size:
        first = int(np.argmax(encoded.tokens >= vocab_size))
        example = int(np.searchsorted(encoded.offsets, first, side="right")) - 1
        raise ValueError(
            f"token id {encoded.tokens[first]} (example {example}: {examples.texts[example]!r}) is "
            f"outside the model's vocabulary of {vocab_size}; use the tokenizer of the model"
        )
    return encoded


def choose_buckets(lengths: np.ndarray, *, max_length: int, count: int = 4) -> list[int]:
    """The `count` lengths, multiples of 8, into which `lengths` pad with the fewest tokens.

    Each bucket costs a compilation and saves padding; four take a sentence set from half padding
    to a fifth. Exact, by dynamic programming over the multiples of 8 up to the longest.

    Args:
      lengths: int [N], in tokens, of all splits that are to share compiled shapes.
      max_length: the longest allowed, which may be all the positions that the model has.
      count: at most this many; fewer where fewer do as well.
    """
    ends = np.unique(np.minimum(-(-np.asarray(lengths) // 8) * 8, max_length))  # [M] increasing
    if not len(ends):
        return [max_length]
    within = np.searchsorted(np.sort(lengths), ends, side="right")  # examples up to each end
    # cost[m]: tokens of the examples up to ends[m], padded into the buckets so far.
    cost, splits = ends * within, []
    for _ in range(min(count, len(ends)) - 1):
        # One bucket more: it ends at m and begins after k.
        table = cost[None, :] + ends[:, None] * (within[:, None] - within[None, :])  # [M, M]
        table[np.triu_indices(len(ends))] = np.iinfo(np.int64).max
        best = table.argmin(axis=1)
        better = table[np.arange(len(ends)), best]
        splits.append(np.where(better < cost, best, -1))
        cost = np.minimum(better, cost)
    chosen, m = [], len(ends) - 1
    for before in reversed(splits):
        if before[m] >= 0:
            chosen.append(int(ends[m]))
            m = before[m]
    return [*reversed([*chosen, int(ends[m])])]


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Which examples make batch k, for any k: what grain calls a random-access source.

    Attributes:
      groups: the examples of each bucket, in the order of the data.
      buckets: their lengths in tokens, increasing.
      total: batches in the stream.
    """

    groups: tuple[np.ndarray, ...]
    buckets: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool
    total: int

    def __len__(self) -> int:
        return self.total

    @property
    def batches_per_epoch(self) -> int:
        return -(-sum(len(group) for group in self.groups) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        """Of one batch: its length in tokens and its examples [B], -1 for padding rows."""
        epoch, within = divmod(index, self.batches_per_epoch)
        return self.epoch(epoch if self.shuffle else 0)[within]

    @functools.cached_property
    def epoch(self) -> Callable[[int], list[tuple[int, np.ndarray]]]:
        """All batches of an epoch, by its number."""
        # Two are kept: around the end of one, prefetching already works on the next.
        return functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        promoted = np.zeros(0, np.int64)
        for length, group in zip(self.buckets, self.groups, strict=True):
            pool = np.concatenate([promoted, rng.permutation(group) if self.shuffle else group])
            full = len(pool) // self.batch_size * self.batch_size
            batches += [(length, rows) for rows in pool[:full].reshape(-1, self.batch_size)]
            promoted = pool[full:]
        if len(promoted):
            rows = np.full(self.batch_size, -1, np.int64)
            rows[: len(promoted)] = promoted
            batches.append((self.buckets[-1], rows))
        order = rng.permutation(len(batches)) if self.shuffle else range(len(batches))
        return [batches[i] for i in order]


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches with a position that can be saved and restored.

    Made by `batches`. Each batch is a dict of arrays, B being this process's rows and T one of the
    buckets:

      input_ids, attention_mask: int32 [B, T]
      token_type_ids: int32 [B, T], if the tokenizer makes them
      labels: as in TextExamples, [B] or [B, C], if there are any
      weight: float32 [B], 1 for an example and 0 for a padding row
      index: int32 [B], the example's place in the data, -1 for a padding row

    Attributes:
      batches_per_epoch: the same in every epoch.
      shapes: the distinct (B, T) of this process, by increasing T.
    """

    def __init__(
        self,
        data: EncodedText,
        plan: _Plan,
        *,
        pad_id: int,
        process_index: int,
        process_count: int,
        prefetch: int,
    ) -> None:
        import grain  # over a second

        self.batches_per_epoch = plan.batches_per_epoch
        lengths = sorted({length for length, _ in plan.epoch(0)})
        self.shapes = [(plan.batch_size // process_count, length) for length in lengths]
        self._data = data
        self._plan = plan
        self._pad_id = pad_id
        mine = slice(process_index, None, process_count)
        self._iterator = iter(
            grain.MapDataset.source(plan)
            .map(lambda planned: _assemble(data, planned[0], planned[1][mine], pad_id))
            .to_iter_dataset(
                # One thread: numpy holds the interpreter lock for much of the work, so more
                # would take time from the training loop without being faster.
                grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
            )
        )
        # A stream that is dropped half-way takes its thread with it.
        weakref.finalize(self, self._iterator.close)

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, after the last batch that was returned, ready for json.dumps.

        It is the same in every process, and may be restored with another number of them.
        """
        return {"position": self._iterator.get_state(), "stream": self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position, bitwise as the stream it was taken from would have.

        Raises:
          ValueError: a state of other data, another seed, batch size or set of buckets, or a
            position behind the end of a stream of few epochs.
        """
        if set(state) != {"position", "stream"}:
            raise ValueError(f"not the state of a batch stream: it has the keys {sorted(state)}")
        mine, other = self._identity(), state["stream"]
        differing = [
            f"  {key}: {other.get(key)!r} was saved, this stream has {value!r}"
            for key, value in mine.items()
            if other.get(key) != value
        ]
        if differing:
            raise ValueError(
                "the saved position is of another stream of batches; rebuild the one it was saved "
                "from, or start from the beginning\n" + "\n".join(differing)
            )
        position = state["position"]["next_index"]
        if not 0 <= position <= len(self._plan):
            raise ValueError(
                f"the saved position is batch {position}, this stream ends at {len(self._plan)}; "
                f"give it more epochs"
            )
        self._iterator.set_state({"next_index": position})

    def close(self) -> None:
        """Ends the prefetching thread; the stream cannot be used any more."""
        self._iterator.close()

    def _identity(self) -> dict[str, Any]:
        # Neither epochs nor processes: batch k is the same whatever they are.
        return {
            "data": self._data.fingerprint,
            "batch_size": self._plan.batch_size,
            "seed": self._plan.seed,
            "shuffle": self._plan.shuffle,
            "buckets": list(self._plan.buckets),
            "pad_id": self._pad_id,
        }


def batches(
    encoded: EncodedText,
    *,
    batch_size: int,
    pad_id: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    buckets: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> BatchStream:
    """A stream of batches in which every example appears once an epoch.

    Args:
      encoded: N examples.
      batch_size: rows of a global batch, over all processes.
      pad_id: the token id of padding, `tokenizer.pad_token_id`.
      seed: of the order of examples and batches; not negative.
      shuffle: False for evaluation: by bucket, then in the order of the data.
      epochs: None for a stream that never ends.
      buckets: lengths in tokens, increasing; by default `choose_buckets` of these examples.
      process_index, process_count: this process returns rows p, p + P, p + 2 P, ... of each
        global batch.
      prefetch: batches that a thread prepares ahead; 0 for no thread.

    Raises:
      ValueError: no examples, a batch size that the processes do not divide, buckets that do not
        increase or do not hold the longest example, or a number out of its range.
    """
    problems = [
        f"{name}={value} must be at least {least}"
        for name, value, least in [
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("epochs", 1 if epochs is None else epochs, 1),
            ("process_count", process_count, 1),
            ("prefetch", prefetch, 0),
        ]
        if value < least
    ]
    if not 0 <= process_index < max(process_count, 1):
        problems.append(f"process_index={process_index} is not one of {process_count} processes")
    if process_count > 0 and batch_size % process_count:
        problems.append(f"batch_size={batch_size} does not divide by process_count={process_count}")
    longest = int(encoded.lengths.max(initial=0))
    lengths = (
        choose_buckets(encoded.lengths, max_length=encoded.max_length)
        if buckets is None
        else list(buckets)
    )
    if not lengths or lengths[0] < 1 or lengths != sorted(set(lengths)):
        problems.append(f"buckets={lengths} must be increasing lengths in tokens")
    elif lengths[-1] < longest:
        problems.append(
            f"buckets={lengths} end before the longest example of {longest} tokens; add a longer "
            f"one or encode with max_length={lengths[-1]}"
        )
    if not len(encoded):
        problems.append("there are no examples")
    if problems:
        raise ValueError("; ".join(problems))

    # Buckets longer than any example would only add padding.
    lengths = lengths[: bisect.bisect_left(lengths, longest) + 1]
    bucket_of = np.searchsorted(lengths, encoded.lengths)  # [N], the shortest that holds it
    plan = _Plan(
        groups=tuple(np.flatnonzero(bucket_of == i) for i in range(len(lengths))),
        buckets=tuple(lengths),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        total=sys.maxsize if epochs is None else epochs * -(-len(encoded) // batch_size),
    )
    return BatchStream(
        encoded,
        plan,
        pad_id=pad_id,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )


def _assemble(
    data: EncodedText, length: int, rows: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of one batch from the indices of its examples [B], -1 for padding rows."""
    real = rows >= 0  # [B]
    source = np.maximum(rows, 0)
    # A padding row attends to one padding token: a softmax over nothing would be NaN, and NaN
    # times weight 0 is NaN.
    lengths = np.where(real, data.lengths[source], 1)
    places = np.arange(length)
    mask = places < lengths[:, None]  # [B, T]
    at = np.minimum(data.offsets[source][:, None] + places, len(data.tokens) - 1)  # [B, T]
    keep = mask & real[:, None]
    batch = {
        "input_ids": np.where(keep, data.tokens[at], np.int32(pad_id)),
        "attention_mask": mask.astype(np.int32),
        "weight": real.astype(np.float32),
        "index": rows.astype(np.int32),
    }
    if data.token_type_ids is not None:
        batch["token_type_ids"] = np.where(keep, data.token_type_ids[at], np.int32(0))
    if data.labels is not None:
        labels = data.labels[source]  # [B] or [B, C]
        labels[~real] = 0
        batch["labels"] = labels
    return batch
