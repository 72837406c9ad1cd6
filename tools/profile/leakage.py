"""Time of the leakage audit's search: 10^6 stored hashes against 10^5 asked ones, beside faiss where it is there.

    python tools/profile/leakage.py            # --stored 1000000 --wanted 100000 --distance 8

Two kinds of hashes: spread evenly over all values, and clustered as pictures of one kind are (1,000 centres, 12 bits
changed). Before anything is timed, the search must find exactly the pairs that comparing everything finds on a part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from megatron_medgpt.evaluate.leakage.nearest import pairs_within

CENTRES, CHANGED = 1_000, 12


def changed(hashes: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    for _ in range(bits):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, hashes.size).astype(np.uint64))
    return hashes


def hashes_of(kind: str, stored: int, wanted: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(wanted, stored); one in a hundred of the wanted is a stored one with three bits changed."""
    draw = lambda count: rng.integers(0, 1 << 64, count, dtype=np.uint64)  # noqa: E731
    if kind == "even":
        lots, asked = draw(stored), draw(wanted)
    else:
        centres = draw(CENTRES)
        lots, asked = (changed(centres[rng.integers(0, CENTRES, n)], CHANGED, rng) for n in (stored, wanted))
    planted = max(1, wanted // 100)
    asked[:planted] = changed(lots[:planted], 3, rng)
    return asked, lots


def check(wanted: np.ndarray, stored: np.ndarray, distance: int) -> None:
    wanted, stored = wanted[:500], stored[:50_000]
    bits = np.bitwise_count(wanted[:, None] ^ stored[None])
    everything = set(zip(*(places.tolist() for places in np.nonzero(bits <= distance))))
    first, second, _ = pairs_within(wanted, stored, distance)
    if set(zip(first.tolist(), second.tolist())) != everything or not everything:
        raise SystemExit("the search does not find what comparing everything finds; nothing is timed")


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def by_faiss(wanted: np.ndarray, stored: np.ndarray, distance: int) -> int:
    """faiss's exhaustive search of binary codes."""
    import faiss

    faiss.omp_set_num_threads(2)
    index = faiss.IndexBinaryFlat(64)
    index.add(stored.view(np.uint8).reshape(-1, 8))
    limits, _, _ = index.range_search(wanted.view(np.uint8).reshape(-1, 8), distance + 1)  # below, not up to
    return int(limits[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", type=int, default=1_000_000)
    parser.add_argument("--wanted", type=int, default=100_000)
    parser.add_argument("--distance", type=int, default=8)
    parser.add_argument("--peer", action="store_true", help="also faiss (pip install faiss-cpu)")
    given = parser.parse_args()
    for kind in ("even", "clustered"):
        wanted, stored = hashes_of(kind, given.stored, given.wanted, np.random.default_rng(0))
        check(wanted, stored, given.distance)
        sides = {"ours": lambda: len(pairs_within(wanted, stored, given.distance)[0])}  # noqa: B023
        if given.peer:
            sides["faiss"] = lambda: by_faiss(wanted, stored, given.distance)  # noqa: B023
        for side, work in sides.items():
            found, wall, cpu = timed(work)
            print(f"{kind:9} {side:5} {found:>10,} pairs  {wall:6.1f} s wall  {cpu:6.1f} s CPU", flush=True)


if __name__ == "__main__":
    main()
