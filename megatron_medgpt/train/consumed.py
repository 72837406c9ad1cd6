"""A fingerprint of every sample a run has consumed, equal for every layout.

Per step each rank adds up 63-bit hashes of its samples' ids; the sum over all data-parallel ranks goes into a hash
chain that the checkpoint keeps. Two runs with the same chain have used the same samples in the same steps: nothing was
lost or repeated by a crash, a resume or another number of ranks. The order within one step does not count, because
the loss of a step is a sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

START = "0" * 64
_MASK = (1 << 63) - 1


def sum_of_ids(sample_ids: Iterable[str]) -> int:
    """Sum of the ids' hashes modulo 2^63."""
    total = 0
    for sample_id in sample_ids:
        total += int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little") & _MASK
    return total & _MASK


def extend(chain: str, step_sum: int) -> str:
    """The chain after one more step. ``step_sum`` is the sum over all ranks; wrapped to 63 bits here."""
    return hashlib.sha256(f"{chain}:{step_sum & _MASK}".encode()).hexdigest()
