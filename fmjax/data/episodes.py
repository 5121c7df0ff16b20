"""Small tasks drawn from a large labelled set: a few classes, a few examples of each to learn from
and others to be asked about (Vinyals et al. 2016, arXiv:1606.04080, section 3)."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from fmjax.data.batches import BatchStream, Planned, check_options
from fmjax.data.columns import Columns, update


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """Which examples each task is made of.

    Attributes:
      classes: the examples of each class that tasks are drawn from.
      tasks, ways, shots, queries: see `episodes`.
      seed: of the draws.
      lengths: in tokens, of each ragged part.
      total: batches.
    """

    classes: tuple[np.ndarray, ...]
    tasks: int
    ways: int
    shots: int
    queries: int
    seed: int
    lengths: tuple[int, ...]
    total: int

    @property
    def batches_per_epoch(self) -> int:
        """One: episodes know no epochs."""
        return 1

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Planned:
        """Rows int64 [tasks, ways, shots + queries], no example twice in a task."""
        rng = np.random.default_rng([self.seed, index])
        each = self.shots + self.queries
        rows = [
            [
                rng.choice(self.classes[number], each, replace=False)
                for number in rng.choice(len(self.classes), self.ways, replace=False)
            ]
            for _ in range(self.tasks)
        ]
        return Planned(index, self.lengths, np.asarray(rows, np.int64))


def episodes(
    data: Columns,
    *,
    ways: int,
    shots: int,
    queries: int,
    tasks: int = 1,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    batches: int | None = None,
    length: int | Sequence[int] | None = None,
    prefetch: int = 2,
) -> BatchStream:
    """A stream whose every batch is some tasks: "support/..." [B, S, ...], "query/..." [B, Q, ...].

    S is ``ways * shots`` and Q ``ways * queries``; ``labels`` are 0 to ways - 1, in an order of the
    classes that is each task's own, and ``weight`` is 1.

    Args:
      data: N examples with ``labels`` int [N].
      ways: classes of a task.
      shots, queries: examples of each class to learn from, and to be asked about.
      tasks: B.
      classes: those that tasks are drawn from; by default all. Held-out ones make the test.
      seed: of the draws.
      batches: None for a stream that never ends.
      length: tokens of each ragged part; by default those of the longest example.
      prefetch: batches that a thread prepares ahead.

    Raises:
      ValueError: classes with too few examples (all are named), too few classes, labels that do
        not fit, or numbers out of their ranges.
    """
    problems = check_options(
        batch_size=tasks,
        seed=seed,
        epochs=batches,
        process_index=0,
        process_count=1,
        prefetch=prefetch,
    )
    labels = np.asarray(data.fixed.get("labels", np.zeros((0, 0))))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"the data have labels {labels.dtype} {labels.shape}; tasks are drawn from classes, "
            f"int [{len(data)}]"
        )
    for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        if value < least:
            problems.append(f"{name}={value} must be at least {least}")
    chosen = sorted(set(labels.tolist())) if classes is None else list(classes)
    members = [np.flatnonzero(labels == number) for number in chosen]
    if small := {
        number: len(found)
        for number, found in zip(chosen, members, strict=True)
        if len(found) < shots + queries
    }:
        problems.append(
            f"shots={shots} and queries={queries} need {shots + queries} examples of a class; "
            f"these have fewer: {small}"
        )
    if len(chosen) < ways:
        problems.append(f"ways={ways}, but there are {len(chosen)} classes")
    if problems:
        raise ValueError("; ".join(problems))
    lengths = data.chosen_lengths(length)
    source = Episodes(
        tuple(members),
        tasks,
        ways,
        shots,
        queries,
        seed,
        lengths,
        sys.maxsize if batches is None else batches,
    )
    digest = hashlib.sha256()
    update(digest, {str(number): found for number, found in zip(chosen, members, strict=True)})

    def assemble(planned: Planned, mine: slice) -> dict[str, np.ndarray]:
        rows = planned.rows[mine]  # [B, ways, shots + queries]
        batch = {}
        for part, some in (("support", rows[..., :shots]), ("query", rows[..., shots:])):
            found = data.assemble(some.reshape(-1), planned.lengths)
            numbers = np.broadcast_to(np.arange(ways)[:, None], some.shape)
            found |= {"labels": numbers.astype(np.int32).reshape(-1)}
            batch |= {
                f"{part}/{name}": leaf.reshape(len(rows), -1, *leaf.shape[1:])
                for name, leaf in found.items()
            }
        return batch

    return BatchStream(
        source,
        assemble,
        shapes=[(tasks, ways * (shots + queries), *lengths)],
        identity={
            "data": data.fingerprint,
            "classes": digest.hexdigest()[:16],
            **{name: getattr(source, name) for name in ("tasks", "ways", "shots", "queries")},
            "seed": seed,
            "lengths": list(lengths),
        },
        process_index=0,
        process_count=1,
        prefetch=prefetch,
    )
