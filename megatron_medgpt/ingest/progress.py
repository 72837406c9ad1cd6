"""Progress of an ingest: records done, their rate, and the time that is left where the number of records is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_medgpt.ingest.sources import Source
from megatron_medgpt.ingest.sources.place import Place
from megatron_medgpt.ingest.sources.tables import ending_of, read_rows
from megatron_medgpt.observe.progress import Bar, duration

_SECONDS_BETWEEN_LINES = 5.0
_COUNTED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_LARGEST_COUNTED_BYTES = 1 << 31


def expected_records(sources: Sequence[Source]) -> int | None:
    """How many records the inputs hold, where that is quick to find out (tables on this machine); else None."""
    counts = [_rows_of(place) for source in sources for place in source.places]
    return None if None in counts else sum(count for count in counts if count is not None)


def _rows_of(place: Place) -> int | None:
    ending = ending_of(place)
    if not isinstance(place, Path) or ending not in _COUNTED or place.stat().st_size > _LARGEST_COUNTED_BYTES:
        return None
    if ending in (".jsonl", ".ndjson"):
        with open(place, "rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in read_rows(place))


class Progress:
    """A bar on a terminal (stderr), else one line every five seconds through ``echo``.

    Args:
        total: records of this ingest; None where it is not known.
    """

    def __init__(self, total: int | None, echo: Callable[[str], None]) -> None:
        self._total, self._echo = total, echo
        self._done = self._rejected = self._before = 0
        self._began = self._last = time.monotonic()
        self._bar = Bar("ingest", total=total, transient=True)

    def add(self, records: int, rejected: int, *, from_before: bool) -> None:
        """Count a finished shard. What an earlier run did (``from_before``) is no part of the rate."""
        self._done += records
        self._rejected += rejected
        self._before += records * from_before
        if self._bar.on:
            self._bar.update(self._done, self.figures())
        elif time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._echo(f"  {self.figures()}")
            self._last = time.monotonic()

    def figures(self) -> str:
        """``1200 of 5000 records, 310/s, 12 rejected, 0:12 min left``."""
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
        of = "" if self._total is None else f" of {self._total}"
        left = ""
        if self._total is not None and rate > 0:
            left = f", {duration((self._total - self._done) / rate)} left"
        return f"{self._done}{of} records, {rate:.0f}/s, {self._rejected} rejected{left}"

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
