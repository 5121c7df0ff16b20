"""Token ids in, batches out: a deterministic, sharded, resumable stream built on grain.

The number of a batch alone determines it: batch k belongs to epoch ``k // batches_per_epoch``,
and the order of an epoch follows from the seed and the epoch. So the position of a stream is one
integer, and resuming is exact on any number of processes.

Examples are put into buckets by length (by each of their lengths, where they have several), so that
few shapes are compiled and little is padded. A bucket's examples that do not fill a batch move up
to the next longer bucket; hence only the last batch of the longest bucket can hold padding rows, at
most one batch an epoch, and the number of batches of each shape is the same in every epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fmjax.data.buckets import assign, by_cost, choose_shapes, next_holder
from fmjax.data.columns import Columns, repeated
from fmjax.data.corruption import Corruption, corrupted_batch, corruption_identity
from fmjax.data.encoding import EncodedText

Buckets = Sequence[int] | Sequence[Sequence[int]]
"""Lengths in tokens; where examples have several lengths, a tuple of them for each bucket."""


class Planned(NamedTuple):
    """What one batch is to be made of.

    Attributes:
      number: k, counted over all epochs; with the seed it is what random noise depends on.
      lengths: in tokens, of each ragged part.
      rows: int [B], the examples of the global batch; -1 for padding rows.
    """

    number: int
    lengths: tuple[int, ...]
    rows: np.ndarray


class Source(Protocol):
    """Which rows make batch k, for any k: what grain calls a random-access source."""

    @property
    def batches_per_epoch(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Planned: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which examples make batch k, by buckets.

    Attributes:
      groups: the examples of each bucket, in the order of the data.
      buckets: their lengths in tokens, by increasing cost.
      after: the bucket to which what is left over of each moves up; -1 for the last.
      total: batches in the stream.
    """

    groups: tuple[np.ndarray, ...]
    buckets: tuple[tuple[int, ...], ...]
    after: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool
    total: int

    def __len__(self) -> int:
        return self.total

    def __getstate__(self) -> dict[str, Any]:
        # For a process of its own: without the epochs that were planned here.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def batches_per_epoch(self) -> int:
        return -(-sum(len(group) for group in self.groups) // self.batch_size)

    def __getitem__(self, index: int) -> Planned:
        epoch, within = divmod(index, self.batches_per_epoch)
        lengths, rows = self.epoch(epoch if self.shuffle else 0)[within]
        return Planned(index, lengths, rows)

    @functools.cached_property
    def epoch(self) -> Callable[[int], list[tuple[tuple[int, ...], np.ndarray]]]:
        """All batches of an epoch, by its number: lengths and examples [B]."""
        # Two are kept: around the end of one, prefetching already works on the next.
        return functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        promoted = [np.zeros(0, np.int64) for _ in self.groups]
        for i, (lengths, group) in enumerate(zip(self.buckets, self.groups, strict=True)):
            pool = np.concatenate([promoted[i], rng.permutation(group) if self.shuffle else group])
            full = len(pool) // self.batch_size * self.batch_size
            batches += [(lengths, rows) for rows in pool[:full].reshape(-1, self.batch_size)]
            if (up := self.after[i]) >= 0:
                promoted[up] = np.concatenate([promoted[up], pool[full:]])
            elif full < len(pool):
                rows = np.full(self.batch_size, -1, np.int64)
                rows[: len(pool) - full] = pool[full:]
                batches.append((lengths, rows))
        order = rng.permutation(len(batches)) if self.shuffle else range(len(batches))
        return [batches[i] for i in order]


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches with a position that can be saved and restored.

    Made by `batches` and by the streams of language modelling. Each batch is a dict of arrays, B
    being this process's rows and T one of the buckets. Of an `EncodedText`:

      input_ids, attention_mask: int32 [B, T]
      token_type_ids: int32 [B, T], if the tokenizer makes them
      labels: as in TextExamples, [B] or [B, C], if there are any
      weight: float32 [B], 1 for an example and 0 for a padding row
      index: int32 [B], the example's place in the data, -1 for a padding row

    Of `Columns`: everything in them under its name, and weight and index. Padding rows repeat what
    other rows of the batch have in columns of one size, such as pictures and labels; their texts
    are one token of padding.

    Attributes:
      batches_per_epoch: the same in every epoch.
      shapes: the distinct (B, T) of this process, by increasing T; (B, S, T) where examples have
        two lengths, and (B,) where they have none.
    """

    def __init__(
        self,
        source: Source,
        assemble: Callable[[Planned, slice], dict[str, np.ndarray]],
        *,
        shapes: list[tuple[int, ...]],
        identity: Mapping[str, Any],
        process_index: int,
        process_count: int,
        prefetch: int,
        workers: int = 0,
    ) -> None:
        """Args:
        source: what each batch is made of.
        assemble: of what is planned and of this process's rows of it, the arrays.
        shapes: as the attribute.
        identity: all that batch k depends on, as JSON; not the number of epochs or processes.
        process_index, process_count, prefetch: as in `batches`.
        workers: processes that assemble instead of the thread; `prefetch` batches each.
        """
        self.batches_per_epoch = source.batches_per_epoch
        self.shapes = shapes
        self._source = source
        self._identity = dict(identity)
        mine = slice(process_index, None, process_count)
        self._made_of = (lambda planned: assemble(planned, mine)), prefetch, workers
        self._begin(0)

    def _begin(self, position: int) -> None:
        """The iterator from a batch on."""
        import grain  # over a second

        make, prefetch, workers = self._made_of
        dataset = grain.MapDataset.source(self._source)[position:].map(make)
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # as in any program that is not absl's own
                flags.FLAGS.mark_as_parsed()
            iterable = dataset.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(prefetch, 1))
            )
        else:
            # One thread: numpy holds the interpreter lock for much of the work, so more would
            # take time from the training loop without being faster.
            iterable = dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
            )
        self._iterator, self._position = iter(iterable), position
        # A stream that is dropped half-way takes its thread with it.
        self._finalizer = weakref.finalize(self, self._iterator.close)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, after the last batch that was returned, ready for json.dumps.

        It is the same in every process, and may be restored with another number of them.
        """
        return {"position": {"next_index": self._position}, "stream": dict(self._identity)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position, bitwise as the stream it was taken from would have.

        Raises:
          ValueError: a state of other data, another seed, batch size or set of buckets, or a
            position behind the end of a stream of few epochs.
        """
        check_state(state, self._identity)
        position = state["position"]["next_index"]
        if not 0 <= position <= len(self._source):
            raise ValueError(
                f"the saved position is batch {position}, this stream ends at "
                f"{len(self._source)}; give it more epochs"
            )
        self._finalizer()
        self._begin(position)

    def close(self) -> None:
        """Ends the prefetching thread; the stream cannot be used any more."""
        self._finalizer()


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises a ValueError that says how a saved state is not one of the stream of `identity`."""
    if set(state) != {"position", "stream"}:
        raise ValueError(f"not the state of a batch stream: it has the keys {sorted(state)}")
    other = state["stream"]
    differing = [
        f"  {key}: {other.get(key)!r} was saved, this stream has {identity.get(key)!r}"
        for key in [*identity, *(key for key in other if key not in identity)]
        if other.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            "the saved position is of another stream of batches; rebuild the one it was saved "
            "from, or start from the beginning\n" + "\n".join(differing)
        )


def check_options(
    *,
    batch_size: int,
    seed: int,
    epochs: int | None,
    process_index: int,
    process_count: int,
    prefetch: int,
) -> list[str]:
    """What is wrong with the options that all streams share."""
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
    return problems


def batches(
    encoded: EncodedText | Columns,
    *,
    batch_size: int,
    pad_id: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    buckets: Buckets | None = None,
    corruption: Corruption | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> BatchStream:
    """A stream of batches in which every example appears once an epoch.

    Args:
      encoded: N examples.
      batch_size: rows of a global batch, over all processes.
      pad_id: the token id of padding, `tokenizer.pad_token_id`; only for an `EncodedText`, as
        `Columns` say themselves what they are filled with.
      seed: of the order of examples and batches; not negative.
      shuffle: False for evaluation: by bucket, then in the order of the data.
      epochs: None for a stream that never ends.
      buckets: lengths in tokens, increasing, or tuples of them where examples have several
        lengths; by default `choose_shapes` of these examples.
      corruption: what makes an encoder's inputs and a decoder's targets of each example
        (`SpanCorruption`, `Denoising`), whose tokens are then all that it has.
      process_index, process_count: this process returns rows p, p + P, p + 2 P, ... of each
        global batch.
      prefetch: batches that a thread prepares ahead; 0 for no thread.

    Raises:
      ValueError: no examples, a batch size that the processes do not divide, buckets that do not
        increase or do not hold the longest example, or a number out of its range.
    """
    problems = check_options(
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
    if isinstance(encoded, EncodedText) and pad_id is None:
        problems.append(
            "pad_id is missing: give tokenizer.pad_token_id or, where that is None, as GPT-2's, "
            "another of its tokens, such as tokenizer.eos_token_id; the mask hides it"
        )
    if isinstance(encoded, Columns) and pad_id is not None:
        problems.append(f"pad_id={pad_id} is for EncodedText; Columns have their own fill")
    if corruption is not None and not (
        isinstance(encoded, Columns)
        and not encoded.fixed
        and [list(part.values) for part in encoded.ragged] == [["input_ids"]]
    ):
        problems.append("corruption is for Columns with nothing but input_ids (TokenDocuments.cut)")
    if not len(encoded):
        raise ValueError("; ".join([*problems, "there are no examples"]))
    data = encoded.columns(pad_id or 0) if isinstance(encoded, EncodedText) else encoded
    shapes = _checked_buckets(data, buckets, problems)
    if problems:
        raise ValueError("; ".join(problems))

    bucket_of = assign(data.lengths, shapes)  # [N]
    plan = Plan(
        groups=tuple(np.flatnonzero(bucket_of == i) for i in range(len(shapes))),
        buckets=tuple(shapes),
        after=tuple(next_holder(shapes)),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        total=sys.maxsize if epochs is None else epochs * -(-len(data) // batch_size),
    )
    single = len(data.ragged) == 1
    used = sorted({lengths for lengths, _ in plan.epoch(0)}, key=by_cost)
    if corruption is not None:
        used = sorted({corruption.lengths(length) for (length,) in used})

    def assemble(planned: Planned, mine: slice) -> dict[str, np.ndarray]:
        if corruption is None:
            filling = repeated(planned.rows)[mine]
            return data.assemble(planned.rows[mine], planned.lengths, filling=filling)
        return corrupted_batch(
            corruption,
            lambda row: data.ragged[0].row("input_ids", row),
            planned.number,
            planned.rows,
            mine,
            length=planned.lengths[0],
            seed=seed,
        )

    return BatchStream(
        plan,
        assemble,
        shapes=[(batch_size // process_count, *lengths) for lengths in used],
        identity={
            "data": encoded.fingerprint,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "buckets": [shape[0] if single else list(shape) for shape in shapes],
            "pad_id": pad_id,
            **corruption_identity(corruption),
        },
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )


def shared_buckets(
    *splits: EncodedText | Columns, count: int | None = None
) -> list[int] | list[tuple[int, ...]]:
    """Buckets that serve several splits, so that none compiles shapes of its own.

    Args:
      splits: of the same kind.
      count: see `choose_shapes`.
    """
    limits = [(s.max_length,) if isinstance(s, EncodedText) else s.max_lengths for s in splits]
    width = len(limits[0])
    lengths = np.concatenate([split.lengths.reshape(-1, width) for split in splits])
    longest = [max(limit) for limit in zip(*limits, strict=True)]
    shapes = choose_shapes(lengths, max_lengths=longest, count=count)
    return [shape[0] for shape in shapes] if width == 1 else shapes


def _checked_buckets(
    data: Columns, buckets: Buckets | None, problems: list[str]
) -> list[tuple[int, ...]]:
    """The buckets to be used, as tuples; what is wrong with those given joins the problems."""
    if not data.ragged:
        if buckets is not None:
            problems.append(f"buckets={buckets} are for examples whose lengths vary")
        return [()]
    shapes = (
        choose_shapes(data.lengths, max_lengths=data.max_lengths)
        if buckets is None
        else [(b,) if isinstance(b, (int, np.integer)) else tuple(b) for b in buckets]
    )
    shown = [shape[0] if len(shape) == 1 else shape for shape in shapes]
    count = len(data.ragged)
    longest = data.lengths.max(axis=0)  # [R]
    if wrong := [b for b, shape in zip(shown, shapes, strict=True) if len(shape) != count]:
        problems.append(f"buckets {wrong} must have {count} lengths, as the examples do")
    elif not shapes or min(map(min, shapes)) < 1 or shapes != sorted(set(shapes), key=by_cost):
        problems.append(f"buckets={shown} must be increasing lengths in tokens")
    elif (np.array(shapes[-1]) < np.max(shapes, axis=0)).any():
        problems.append(f"buckets={shown} must end with one that holds all the others")
    elif (longest > shapes[-1]).any():
        lengths = [int(n) for n in longest]
        problems.append(
            f"buckets={shown} end before the longest example of "
            f"{lengths[0] if count == 1 else lengths} tokens; add a longer one or encode with "
            f"max_length={shown[-1]}"
        )
    else:
        # Buckets longer than any example would only add padding.
        last = next(i for i, shape in enumerate(shapes) if (longest <= shape).all())
        return [shape for shape in shapes[:last] if (shapes[last] >= np.array(shape)).all()] + [
            shapes[last]
        ]
    return shapes
