"""Which few shapes a set of examples is padded to: every shape costs a compilation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_ENDS = 512  # lengths among which buckets are sought: samples of sounds have as many as sounds
CELLS_PER_AXIS = 12  # the ends among which shapes of several lengths are sought, along each


def choose_buckets(lengths: np.ndarray, *, max_length: int, count: int = 4) -> list[int]:
    """The `count` lengths, multiples of 8, into which `lengths` pad with the fewest tokens.

    Each bucket costs a compilation and saves padding; four take a sentence set from half padding
    to a fifth. Exact, by dynamic programming over the multiples of 8 up to the longest; of
    lengths beyond 4,096, over as many coarser ones.

    Args:
      lengths: int [N], in tokens, of all splits that are to share compiled shapes.
      max_length: the longest allowed, which may be all the positions that the model has.
      count: at most this many; fewer where fewer do as well.
    """
    lengths = np.asarray(lengths)
    step = 8 * max(1, -(-int(lengths.max(initial=0)) // (8 * MOST_ENDS)))
    ends = np.unique(np.minimum(-(-lengths // step) * step, max_length))  # [M] increasing
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


def choose_shapes(
    lengths: np.ndarray, *, max_lengths: Sequence[int], count: int | None = None
) -> list[tuple[int, ...]]:
    """The `count` shapes into which examples with several lengths pad with few tokens.

    Of an encoder's and a decoder's length, say. With one length it is `choose_buckets`. With
    several, the examples are first sorted into a fine grid, and then those two of its cells are
    merged, again and again, whose common shape costs the fewest tokens more.

    Args:
      lengths: int [N, R], in tokens, of all splits that are to share compiled shapes.
      max_lengths: R longest allowed.
      count: at most this many; by default 4 for one length and 6 for several.

    Returns:
      By increasing cost. The last one holds every example, so that what is left over of the
      others always has a place.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, len(max_lengths))
    if lengths.shape[1] == 1:
        ends = choose_buckets(lengths[:, 0], max_length=max_lengths[0], count=count or 4)
        return [(end,) for end in ends]
    if not len(lengths):
        return [tuple(max_lengths)]
    axes = [
        np.array(choose_buckets(column, max_length=longest, count=CELLS_PER_AXIS))
        for column, longest in zip(lengths.T, max_lengths, strict=True)
    ]
    cell = np.stack(
        [np.searchsorted(ends, column) for ends, column in zip(axes, lengths.T, strict=True)], 1
    )
    cells, held = np.unique(cell, axis=0, return_counts=True)
    corners = np.stack([ends[at] for ends, at in zip(axes, cells.T, strict=True)], axis=1)  # [M, R]
    top = corners.max(axis=0)
    if not any((corner == top).all() for corner in corners):
        corners, held = np.vstack([corners, top]), np.append(held, 0)
    count = max(1, count or 6)
    while len(corners) > count:
        joined = np.maximum(corners[:, None], corners[None])  # [M, M, R]
        tokens = corners.sum(axis=1) * held
        more = joined.sum(axis=2) * (held[:, None] + held) - tokens[:, None] - tokens
        more[np.tril_indices(len(corners))] = np.iinfo(np.int64).max
        a, b = np.unravel_index(more.argmin(), more.shape)
        corners[a], held[a] = joined[a, b], held[a] + held[b]
        corners, held = np.delete(corners, b, axis=0), np.delete(held, b)
    return sorted({tuple(int(n) for n in corner) for corner in corners}, key=by_cost)


def by_cost(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """A key to sort shapes by: tokens of an example. A shape that holds another comes after it."""
    return sum(shape), tuple(shape)


def assign(lengths: np.ndarray, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [N]: for each example the first of `shapes` that holds it, -1 where none does.

    Args:
      lengths: int [N, R].
      shapes: R lengths each.
    """
    fits = np.all(lengths[:, None, :] <= np.asarray(shapes)[None], axis=2)  # [N, shapes]
    return np.where(fits.any(axis=1), fits.argmax(axis=1), -1)


def next_holder(shapes: Sequence[Sequence[int]]) -> list[int]:
    """For each of the shapes, the first later one that holds all it holds; -1 where none does."""
    table = np.asarray(shapes)
    return [
        next((j for j in range(i + 1, len(table)) if (table[j] >= table[i]).all()), -1)
        for i in range(len(table))
    ]
