"""SIGINT (Ctrl-C) and SIGTERM end a command in one line that says what is kept and how to go on.

Training has its own way (``train.guard``): there the signal is noted, and the ranks save the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REPEAT_S = 3.0
"""A signal within this time of the first is the same request (timeout and Slurm tell a process twice)."""


class Stopped(KeyboardInterrupt):
    """A signal that asks for the end. ``kept`` says what is left of the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.kept = ""

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f"; {self.kept}" if self.kept else "")


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises ``Stopped``; one that comes ``REPEAT_S`` later ends the process.

    A signal that is ignored already (``nohup``, a shell's background) stays ignored.
    """
    first_s: float | None = None

    def stop(number: int, _frame: object) -> None:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic()
            raise Stopped(number)
        if time.monotonic() - first_s > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # None is a handler that is not Python's; it could not be put back.
    heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def keeping(kept: str | Callable[[], str]) -> Iterator[None]:
    """Names what is left of the work inside when a signal stops it; a function is asked at that moment."""
    try:
        yield
    except Stopped as stop:
        stop.kept = stop.kept or (kept if isinstance(kept, str) else kept())
        raise
