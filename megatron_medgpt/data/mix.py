"""Which samples an epoch shows: a pure function of (dataset hashes, weights, seed, epoch).

Orders are made by sorting keys of a fixed integer hash, not by a library's random generator: numpy promises no stable
streams across versions, and a resumed run must see the same order whatever is installed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dataset of a blend."""

    fingerprint: str
    num_samples: int
    weight: float
    """Passes over the dataset per epoch; fractions continue in the next epoch where this one stopped."""


def order_keys(count: int, *purpose: str | int) -> np.ndarray:
    """uint64 (count,): a key per number 0 .. count-1, as if random, fixed by ``purpose``.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter that starts at a hash of the purpose.
    """
    start = hashlib.sha256("\x1f".join(map(str, purpose)).encode()).digest()[:8]
    with np.errstate(over="ignore"):
        keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys += np.uint64(int.from_bytes(start, "little"))
        keys ^= keys >> np.uint64(30)
        keys *= np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(27)
        keys *= np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    return keys


def permutation(count: int, *purpose: str | int) -> np.ndarray:
    """int64 (count,): the numbers 0 .. count-1 in an order fixed by ``purpose``."""
    return np.argsort(order_keys(count, *purpose), kind="stable")


def draw_epoch(members: Sequence[Member], seed: int, epoch: int) -> np.ndarray:
    """Samples of an epoch, numbered through the blend (samples of the first dataset, then of the second, ...).

    Each dataset is an endless row of passes, every pass in an order of its own; epoch e shows the places
    ``[w n e, w n (e + 1))`` of it. So a weight of 1 shows every sample once an epoch and 0.25 once in four epochs.
    """
    parts = []
    offset = 0
    for number, member in enumerate(members):
        share = Fraction(str(member.weight)) * member.num_samples
        place, end = math.floor(share * epoch), math.floor(share * (epoch + 1))
        while place < end:
            passes, start = divmod(place, member.num_samples)
            taken = min(end - place, member.num_samples - start)
            # The number of the dataset is part of the purpose: a dataset named twice is shown in two orders.
            order = permutation(member.num_samples, "pass", seed, number, member.fingerprint, passes)
            parts.append(order[start : start + taken] + offset)
            place += taken
        offset += member.num_samples
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def whole_passes(members: Sequence[Member]) -> bool:
    """Whether every epoch shows the same samples, only in another order."""
    return all(float(member.weight).is_integer() for member in members)
