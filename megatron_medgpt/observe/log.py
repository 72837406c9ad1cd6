"""The log of a run: rank 0 tells its story on the console, other ranks speak only when something is wrong."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import TextIO

PACKAGE = "megatron_medgpt"
KERNELS = "medgpt_kernels"
"""Its ops say once which implementation they chose."""


class _Line(logging.Formatter):
    """``12:03:59 message``; the level only where it is a warning or worse, the rank only where it is not 0."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        rank = f"rank {self._rank}: " if self._rank else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{clock} {rank}{level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _CurrentStderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now: a live progress bar puts itself there so that lines go above it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class sets it once; there is nothing to keep."""


def set_up_log(rank: int = 0, *, debug: bool = False, file: Path | None = None) -> None:
    """Send the package's log lines to stderr (and to ``file``), once per process; calling it again replaces them.

    Args:
        rank: of this process. Above 0 only warnings are shown, each with its rank.
        debug: show debug lines, of every rank, and the libraries' warnings.
        file: log file of this rank, with everything the console shows; opened for appending.
    """
    handlers: list[logging.Handler] = [_CurrentStderr()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Line(rank))
    for logger in map(logging.getLogger, (PACKAGE, KERNELS)):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
    if not debug:
        # Every rank would print the engine's notes that TransformerEngine and apex are missing; doctor says it once.
        for module in (r"megatron\.core", r"torch\.distributed", r"torch\.utils\.cpp_extension"):
            warnings.filterwarnings("ignore", module=module)


def say_platform(platform: str, layout: str, world_size: int) -> None:
    """One line at the start of a run: on what it runs and how it is split."""
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    logging.getLogger(PACKAGE).info("running on %s, %s, layout %s", platform, processes, layout)
