"""The threads of this process as the system sees them, those of libraries too."""

from __future__ import annotations

import time
from pathlib import Path

LONGEST_S = 300.0
"""For a thread to give itself its name, which is the first that it does: ends a hang."""


def names_of_threads() -> dict[str, str]:
    """Number -> name."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        try:
            found[folder.name] = (folder / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return found


def started_since(before: dict[str, str]) -> list[str]:
    """Names of the threads that were not there, when each has a name of its own."""
    end, of_the_process = time.monotonic() + LONGEST_S, Path("/proc/self/comm").read_text().strip()
    while True:
        names = [name for number, name in names_of_threads().items() if number not in before]
        if of_the_process not in names:
            return names
        assert time.monotonic() < end, names
        time.sleep(0.01)
