"""Packing samples into rows of a fixed length: best-fit-decreasing, computed once per epoch from lengths alone.

No sample is ever split. Which of several samples of one length goes where, the order of rows and the order of samples
inside a row are fixed by (seed, epoch): see ``mix.order_keys``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from megatron_medgpt.data.mix import order_keys, permutation


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """Rows of one epoch. Row r holds ``samples[first_of_row[r] : first_of_row[r + 1]]``."""

    first_of_row: np.ndarray
    """int64 (rows + 1,)."""
    samples: np.ndarray
    """int32 or int64 (samples,): numbers through the blend."""
    images_of_row: np.ndarray
    """int32 (rows,)."""

    @property
    def num_rows(self) -> int:
        return self.first_of_row.size - 1

    def row(self, number: int) -> np.ndarray:
        return self.samples[self.first_of_row[number] : self.first_of_row[number + 1]]


_Pattern = tuple[tuple[int, int], ...]
"""What lies in a row: (length, how many of it), longest first."""


def best_fit_decreasing(count_of_length: np.ndarray, capacity: int) -> list[tuple[_Pattern, int]]:
    """Pack items known only by their lengths; rows of one filling are kept as one group.

    Best-fit-decreasing puts the items of one length into the fullest row that takes them, and a row that took one stays
    the fullest that may take the next; so whole groups of equal rows move at once, and 10 million lengths take seconds.

    Args:
        count_of_length: how many items there are of each length 0 .. capacity.
        capacity: positions of a row.

    Returns:
        (filling, number of rows filled so).
    """
    groups: dict[int, list[tuple[_Pattern, int]]] = {}
    free: list[int] = []  # the keys of ``groups`` (positions left in a row), ascending

    def put(left: int, pattern: _Pattern, rows: int) -> None:
        if left not in groups:
            groups[left] = []
            insort(free, left)
        groups[left].append((pattern, rows))

    for length in np.flatnonzero(count_of_length)[::-1].tolist():
        items = int(count_of_length[length])
        while items:
            at = bisect_left(free, length)
            if at == len(free):
                left, pattern, rows = capacity, (), -(-items // (capacity // length))
            else:
                left = free[at]
                pattern, rows = groups[left].pop()
                if not groups[left]:
                    del groups[left], free[at]
            fit = left // length
            whole = min(rows, items // fit)
            if whole:
                put(left - fit * length, (*pattern, (length, fit)), whole)
            rows, items = rows - whole, items - whole * fit
            if rows and items:  # fewer than ``fit`` items are left: one row takes them
                put(left - items * length, (*pattern, (length, items)), 1)
                rows, items = rows - 1, 0
            if rows:
                put(left, pattern, rows)
    return [group for left in free for group in groups[left]]


def plan_epoch(
    drawn: np.ndarray,
    length_of_sample: np.ndarray,
    capacity: int,
    seed: int,
    epoch: int,
    images_of_sample: np.ndarray | None = None,
) -> EpochPlan:
    """Pack the samples that an epoch shows.

    Args:
        drawn: int64 (n,), samples of the epoch (``mix.draw_epoch``), none longer than ``capacity``.
        length_of_sample: int32 positions of every sample of the blend, image tokens counted.
        images_of_sample: int32 images of every sample of the blend; none where not given.
    """
    lengths = length_of_sample[drawn]
    counts = np.bincount(lengths, minlength=capacity + 1)
    # Samples by length; equal lengths in an order of this epoch, so that no dataset is packed before another.
    sorted_samples = drawn[np.lexsort((order_keys(drawn.size, "pool", seed, epoch), lengths))]
    next_of_length = np.concatenate(([0], np.cumsum(counts)[:-1]))
    row_of = np.empty(drawn.size, np.int64)
    num_rows = 0
    for pattern, rows in best_fit_decreasing(counts, capacity):
        for length, fit in pattern:
            start = next_of_length[length]
            row_of[start : start + fit * rows] = np.repeat(np.arange(num_rows, num_rows + rows), fit)
            next_of_length[length] += fit * rows
        num_rows += rows
    place_of_row = np.empty(num_rows, np.int64)
    place_of_row[permutation(num_rows, "rows", seed, epoch)] = np.arange(num_rows)
    row_of = place_of_row[row_of]
    inside = np.lexsort((order_keys(drawn.size, "inside", seed, epoch), row_of))
    first_of_row = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows))))
    samples = sorted_samples[inside]
    if length_of_sample.size <= np.iinfo(np.int32).max:
        samples = samples.astype(np.int32)
    images = np.zeros(num_rows, np.int32)
    if images_of_sample is not None and num_rows:
        images = np.add.reduceat(images_of_sample[samples], first_of_row[:-1]).astype(np.int32)
    return EpochPlan(first_of_row, samples, images)


def quantiles_of(lengths: np.ndarray) -> dict[str, int]:
    """Least, median, the smallest length that 99 % do not exceed, and most; each is the length of a sample."""
    kinds = {"least": (0, "lower"), "median": (50, "lower"), "p99": (99, "higher"), "most": (100, "lower")}
    return {name: int(np.percentile(lengths, percent, method=rule)) for name, (percent, rule) in kinds.items()}
