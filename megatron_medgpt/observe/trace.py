"""Where the time of a step goes: named spans, summed per step. Two clock readings per span and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class Trace:
    """Adds up the seconds of named spans.

    A nested span's time is taken off the span around it, so that the spans of a step add up to no more than the step.
    On CUDA a span measures what the host waited for; pass ``synchronize`` to measure what the device did.

        with trace.span("data"):
            batch = loader.take(...)
        seconds = trace.end_step()   # {"data": 0.003, "other": 0.001}
    """

    def __init__(self, synchronize: object = None) -> None:
        self._synchronize = synchronize if callable(synchronize) else None
        self._seconds: dict[str, float] = {}
        self._inner_seconds = [0.0]
        self._totals: dict[str, float] = {}
        self._step_start_s = time.perf_counter()
        self._total_s = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._synchronize is not None:
            self._synchronize()
        self._inner_seconds.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronize is not None:
                self._synchronize()
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner_seconds.pop()
            self._inner_seconds[-1] += elapsed
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def end_step(self) -> dict[str, float]:
        """Seconds of each span since the last call, with ``other`` for the rest of the time."""
        now = time.perf_counter()
        elapsed = now - self._step_start_s
        seconds, self._seconds = self._seconds, {}
        seconds["other"] = max(0.0, elapsed - sum(seconds.values()))
        for name, value in seconds.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        self._total_s += elapsed
        self._step_start_s = now
        self._inner_seconds = [0.0]
        return seconds

    def shares(self) -> dict[str, float]:
        """Share of the whole time (0 to 1) that each span has taken since the start, ``other`` included."""
        return {name: value / self._total_s for name, value in self._totals.items()} if self._total_s else {}

    def share_outside(self, *model_spans: str) -> float:
        """Share of the time outside the named spans: what data, logging and glue cost."""
        return sum(share for name, share in self.shares().items() if name not in model_spans)


_PROCESS = Trace()
"""The spans of this process. Time is one per process, so code deep inside need not be handed a trace."""


def span(name: str) -> AbstractContextManager[None]:
    """Count the block's seconds under ``name`` in this process's trace."""
    return _PROCESS.span(name)


def take_spans() -> dict[str, float]:
    """Seconds of each span of this process since the last call, with ``other`` for the rest of the time."""
    return _PROCESS.end_step()


def span_shares() -> dict[str, float]:
    """Share of each span in all the time that ``take_spans`` has closed."""
    return _PROCESS.shares()
