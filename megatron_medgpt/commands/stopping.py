"""SIGINT (Ctrl-C) and SIGTERM end a command in one line that says what is kept and how to go on.

Training has its own way (``train.guard``): there the signal is noted, and the ranks save the same step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_S = 3.0
"""A signal within this time of the first is the same request (timeout and Slurm tell a process twice)."""

WAIT_S = 0.05
"""Between looks whether an import is over."""


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
    """Inside, the first SIGINT or SIGTERM raises ``Stopped``, after the import if there is one under way; one that
    comes ``REPEAT_S`` later ends the process.

    A signal that is ignored already (``nohup``, a shell's background) stays ignored.
    """
    first_s: float | None = None
    is_ours = False
    raised: Stopped | None = None

    def tell_again(number: int) -> None:
        nonlocal is_ours
        is_ours = True
        os.kill(os.getpid(), number)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first_s, is_ours, raised
        insists = first_s is not None and not is_ours and time.monotonic() - first_s > REPEAT_S
        first_s, is_ours = first_s or time.monotonic(), False
        if insists:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif raised is not None:
            return
        elif _is_importing(frame):
            later = threading.Timer(WAIT_S, tell_again, (number,))
            later.daemon = True
            later.start()
        else:
            raised = Stopped(number)
            raise raised

    # None is a handler that is not Python's; it could not be put back.
    heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except Exception:
        if raised is not None:  # what a library has made of it: OmegaConf 2.3 an error about a key
            raise raised from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being read in. An exception is no end there: extensions that call back into Python while they
    register themselves (torch 2.13) abort, with a page of C++ frames."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def keeping(kept: str | Callable[[], str]) -> Iterator[None]:
    """Names what is left of the work inside when a signal stops it; a function is asked at that moment."""
    try:
        yield
    except Stopped as stop:
        stop.kept = stop.kept or (kept if isinstance(kept, str) else kept())
        raise
