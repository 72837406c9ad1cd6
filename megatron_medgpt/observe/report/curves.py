"""metrics.jsonl read for plotting: series over the steps of a whole run, thinned to what a picture can show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import WorkError

POINTS = 320
"""Points of a drawn curve; longer series are averaged in as many bins, their extremes kept as a band."""


@dataclass(frozen=True, slots=True)
class Span:
    """Steps of one stage, in the run's own count."""

    name: str
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: ``ys`` over ``xs``; ``lows`` and ``highs`` where several steps were averaged into a point."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()

    @property
    def last(self) -> float:
        return self.ys[-1]


@dataclass(frozen=True, slots=True)
class Metrics:
    """All rows of a run in order. ``row["x"]`` is the step counted over all stages, even where ``step`` restarts."""

    rows: tuple[dict[str, Any], ...]
    skipped: int
    """Lines that were not JSON objects with a step (a run killed while writing leaves one)."""

    @property
    def stages(self) -> list[Span]:
        spans: list[Span] = []
        for row in self.rows:
            name = str(row.get("stage", "training"))
            if spans and spans[-1].name == name:
                spans[-1] = Span(name, spans[-1].first, row["x"])
            else:
                spans.append(Span(name, row["x"], row["x"]))
        return spans

    def series(self, key: str, *, thin: bool = True) -> Series | None:
        """The finite numbers of one key; None where no row has any."""
        points = [(row["x"], float(row[key])) for row in self.rows if _is_number(row.get(key))]
        if not points:
            return None
        return _thinned(points) if thin else Series(*zip(*points))

    def total(self, key: str) -> float:
        return math.fsum(float(row[key]) for row in self.rows if _is_number(row.get(key)))

    def latest(self, prefix: str) -> dict[str, Any]:
        """The newest values below a prefix: ``{"ct image": ...}`` of the keys ``expert_load/ct image``, ..."""
        start = f"{prefix}/"
        for row in reversed(self.rows):
            found = {key[len(start) :]: value for key, value in row.items() if key.startswith(start)}
            if found:
                return found
        return {}

    def totals(self, prefix: str) -> dict[str, float]:
        """Sums over all rows of every key below a prefix, largest first."""
        names = {key for row in self.rows for key in row if key.startswith(f"{prefix}/")}
        sums = {name[len(prefix) + 1 :]: self.total(name) for name in names}
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; an absent file is a run without steps.

    Raises:
        WorkError: the file is there and no line of it can be read.
    """
    if not path.is_file():
        return Metrics((), 0)
    rows, skipped, offset, previous = [], 0, 0.0, -math.inf
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, TypeError, KeyError):
            skipped += bool(line.strip())
            continue
        if step + offset < previous:
            offset = previous
        row["x"] = previous = step + offset
        rows.append(row)
    if skipped and not rows:
        raise WorkError(f"{path}: none of its {skipped} lines is a JSON object with a step")
    return Metrics(tuple(rows), skipped)


def _thinned(points: Sequence[tuple[float, float]]) -> Series:
    if len(points) <= POINTS:
        return Series(*zip(*points))
    xs, ys, lows, highs = [], [], [], []
    for i in range(POINTS):
        part = points[i * len(points) // POINTS : (i + 1) * len(points) // POINTS]
        values = [y for _, y in part]
        xs.append(math.fsum(x for x, _ in part) / len(part))
        ys.append(math.fsum(values) / len(values))
        lows.append(min(values))
        highs.append(max(values))
    return Series(tuple(xs), tuple(ys), tuple(lows), tuple(highs))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
