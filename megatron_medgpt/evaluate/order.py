"""The order in which questions are asked: neighbours of like length, so that batches hold little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
BUCKET_POSITIONS = 32


def by_length(things: Sequence[T], lengths: Sequence[int]) -> list[T]:
    """Longest first, in buckets; within a bucket the order stays, so that questions about one picture stay together."""
    return [thing for _, thing in sorted(zip(lengths, things), key=lambda pair: -(pair[0] // BUCKET_POSITIONS))]
