"""Samples to leave out, by id: what a leakage audit has found of an earlier dataset made with the same key."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_medgpt.config.errors import UsageError

EXCLUDED = "listed-in-exclude"
"""Reason of their rejects. They were wanted, so they do not count towards the reject rate."""


def read_excluded(path: str | Path | None) -> frozenset[str]:
    """Sample ids of a JSONL file with a ``sample_id`` a line; none without a file.

    Raises:
        UsageError: missing, or a line without a ``sample_id``; names it.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--exclude {path} cannot be read ({error})") from None
    found = set()
    for number, line in enumerate(lines, 1):
        try:
            found.add(str(json.loads(line)["sample_id"]))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f'--exclude {path} line {number}: expected {{"sample_id": ...}}') from None
    return frozenset(found)
