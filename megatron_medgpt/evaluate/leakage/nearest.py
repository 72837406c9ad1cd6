"""All pairs of 64-bit hashes that differ in few bits, without comparing everything with everything.

Multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012): a hash is cut into four bands of 16 bits. Give band i a radius
r_i; two hashes that differ in more than r_i bits in every band differ in at least sum(r_i + 1) bits. So with
sum(r_i + 1) = r + 1 it is enough to look into the buckets of each band that lie within its own radius. The result is
exact.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from megatron_medgpt.config.errors import WorkError

BANDS, BAND_BITS = 4, 16
LARGEST_RADIUS = 11
"""Above it a band is searched with 3 bits changed (697 buckets a query), which no longer beats comparing everything."""
MOST_PAIRS = 50_000_000
_PAIRS_AT_ONCE = 1 << 20
"""Candidates in memory of one thread: 16 MB of places and hashes, which stays near the processor."""


def pairs_within(
    wanted: np.ndarray, stored: np.ndarray, radius: int, *, threads: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of a wanted and a stored hash that differ in at most ``radius`` bits.

    Args:
        wanted, stored: uint64 (n,) and (m,). Equal values within one of them cost nothing extra in the search.
        radius: 0 to 11.

    Returns:
        (places in ``wanted``, places in ``stored``, bits), int64, ordered by place in ``wanted``, then bits, then place
        in ``stored``.

    Raises:
        WorkError: more than ``MOST_PAIRS`` pairs; the radius takes different pictures for copies.
    """
    if not 0 <= radius <= LARGEST_RADIUS:
        raise ValueError(f"radius {radius} must be from 0 to {LARGEST_RADIUS}")
    unique_wanted, group_of_wanted = np.unique(wanted, return_inverse=True)
    unique_stored, group_of_stored = np.unique(stored, return_inverse=True)
    first, second = _unique_pairs(unique_wanted, unique_stored, radius, threads)
    return _spread(wanted, stored, (first, second), group_of_wanted, group_of_stored)


def _unique_pairs(wanted: np.ndarray, stored: np.ndarray, radius: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for values that do not repeat: places of both sides, each pair once."""
    found: list[np.ndarray] = []
    for band in range(BANDS):
        masks = _masks((radius + 1) // BANDS - 1 + (band < (radius + 1) % BANDS))
        bucket_of_stored = _band(stored, band)
        order = np.argsort(bucket_of_stored, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(bucket_of_stored, minlength=1 << BAND_BITS))])
        bucket_of_wanted = _band(wanted, band)
        # Neighbours in this order ask for the same buckets, which are then still in the cache.
        queries = np.argsort(bucket_of_wanted, kind="stable")
        arguments = (queries, bucket_of_wanted[queries], wanted, stored[order], order, starts, radius)
        with ThreadPoolExecutor(threads) as pool:
            pieces = [pool.submit(_in_buckets, mask, *arguments) for mask in masks]
            for piece in pieces:
                found.append(piece.result())
                if sum(map(len, found)) > MOST_PAIRS:
                    pool.shutdown(cancel_futures=True)
                    raise WorkError(f"more than {MOST_PAIRS:,} pairs differ in at most {radius} bits; lower --distance")
    keys = np.unique(np.concatenate(found))
    return keys // max(len(stored), 1), keys % max(len(stored), 1)


def _masks(radius: int) -> list[int]:
    """Every way to change at most ``radius`` bits of a band; none for -1."""
    return [
        sum(1 << bit for bit in bits) for count in range(radius + 1) for bits in combinations(range(BAND_BITS), count)
    ]


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return ((hashes >> np.uint64(BAND_BITS * band)) & np.uint64((1 << BAND_BITS) - 1)).astype(np.int64)


def _in_buckets(
    mask: int, queries: np.ndarray, buckets: np.ndarray, wanted: np.ndarray, stored: np.ndarray, order: np.ndarray,
    starts: np.ndarray, radius: int,
) -> np.ndarray:  # fmt: skip
    """Keys (place in wanted * number stored + place in stored) of the pairs within the radius.

    ``stored`` is ordered by bucket, ``order`` gives its places, ``starts`` where each bucket begins; ``mask`` turns the
    queries' own ``buckets`` into those that are looked into.
    """
    buckets = buckets ^ mask
    found: list[np.ndarray] = []
    low, counts = starts[buckets], starts[buckets + 1] - starts[buckets]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(queries):
        done = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        some = counts[begin:end]
        within = np.arange(ends[end - 1] - done) - np.repeat(ends[begin:end] - some - done, some)
        places = np.repeat(low[begin:end], some) + within
        values = np.repeat(wanted[queries[begin:end]], some)
        near = np.flatnonzero(np.bitwise_count(values ^ stored[places]) <= radius)
        if near.size:
            asked = np.repeat(np.arange(begin, end), some)[near]
            found.append(queries[asked] * len(stored) + order[places[near]])
        begin = end
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _spread(
    wanted: np.ndarray, stored: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], of_wanted: np.ndarray,
    of_stored: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """From values that do not repeat back to the places of all equal ones."""
    first, second = pairs
    for place, groups in ((0, of_wanted), (1, of_stored)):
        order = np.argsort(groups, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(groups))])
        chosen = first if place == 0 else second
        counts = starts[chosen + 1] - starts[chosen]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - counts, counts)
        members = order[np.repeat(starts[chosen], counts) + within]
        first, second = (members, np.repeat(second, counts)) if place == 0 else (np.repeat(first, counts), members)
    bits = np.bitwise_count(wanted[first] ^ stored[second]).astype(np.int64)
    order = np.lexsort((second, bits, first))
    return first[order], second[order], bits[order]
