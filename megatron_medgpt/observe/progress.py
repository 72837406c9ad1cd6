"""Progress of a stage: a live line on a terminal, one plain line per interval in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

_SMOOTHING = 0.1
"""Weight of the newest step in the running mean of seconds per step."""


class Bar:
    """One bar, redrawn in place on a terminal; elsewhere ``on`` is false and nothing is drawn.

    Args:
        total: None where it is not known.
        transient: leave nothing behind at the end.
    """

    def __init__(
        self, name: str, *, total: int | None, done: int = 0, stream: TextIO | None = None, transient: bool = False
    ) -> None:
        stream = stream or sys.stderr
        self._bar: RichProgress | None = None
        if stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[figures]}"))
            self._bar = RichProgress(*columns, console=Console(file=stream), refresh_per_second=4, transient=transient)
            self._task = self._bar.add_task(name, total=total, completed=done, figures="starting")
            self._bar.start()

    @property
    def on(self) -> bool:
        return self._bar is not None

    def update(self, done: int, figures: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Progress:
    """Shows where a stage stands. Used by rank 0 alone.

    On a terminal a bar is redrawn in place; elsewhere (a pipe, a Slurm log) one line is logged every ``interval``
    steps, without carriage returns. Written to stderr, so that a command's result on stdout stays clean.

    Args:
        name: of the stage.
        total_steps: steps of the stage.
        done_steps: steps taken before (on resume).
        interval: steps between lines where there is no terminal.
        stream: where to; decides between the two forms by ``isatty``.
    """

    def __init__(
        self, *, name: str, total_steps: int, done_steps: int = 0, interval: int = 10, stream: TextIO | None = None
    ) -> None:
        self._name, self._total, self._done, self._interval = name, total_steps, done_steps, max(1, interval)
        self._seconds_per_step: float | None = None
        self._last_s = time.monotonic()
        self._bar = Bar(name, total=total_steps, done=done_steps, stream=stream)

    def step(self, record: Mapping[str, Any]) -> None:
        """Take one step's record (see ``MetricsWriter.write``); its ``stage_step`` says how far the stage is."""
        self._done = int(record.get("stage_step", self._done + 1))
        now = time.monotonic()
        seconds, self._last_s = now - self._last_s, now
        if self._seconds_per_step is None:
            self._seconds_per_step = seconds
        self._seconds_per_step += _SMOOTHING * (seconds - self._seconds_per_step)
        figures = describe_step(record, remaining_s=self._seconds_per_step * (self._total - self._done))
        if self._bar.on:
            self._bar.update(self._done, f"{self._done}/{self._total}  {figures}")
        elif self._done % self._interval == 0 or self._done == self._total or "validation_loss" in record:
            log.info("%s %d/%d  %s", self._name, self._done, self._total, figures)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar.on:
            self._bar.say(text)
        else:
            log.info("%s", text)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def describe_step(record: Mapping[str, Any], *, remaining_s: float | None = None) -> str:
    """A step's figures in one line: those of loss, speed and time that the record holds."""
    forms = (
        ("loss", "loss {:.4f}", 1.0), ("validation_loss", "validation {:.4f}", 1.0),
        ("option_accuracy", "accuracy {:.3f}", 1.0), ("grad_norm", "grad {:.2f}", 1.0), ("lr", "lr {:.2e}", 1.0),
        ("tokens_per_s", "{:,.0f} tokens/s", 1.0), ("mfu", "MFU {:.1f} %", 100.0),
    )  # fmt: skip
    parts = [form.format(record[key] * scale) for key, form, scale in forms if record.get(key) is not None]
    if remaining_s is not None:
        parts.append(f"{duration(remaining_s)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3:07 min``, ``5:12 h``, ``2 d 4 h``."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
