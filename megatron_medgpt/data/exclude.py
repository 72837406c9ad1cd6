"""Samples to leave out, by id: what a leakage audit lists, for ``medgpt ingest --exclude`` and ``stages.*.exclude``."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_medgpt.config.errors import UsageError


def read_excluded(path: str | Path | None, *, field: str = "--exclude ") -> frozenset[str]:
    """Sample ids of a JSONL file with a ``sample_id`` a line; none without a file.

    Args:
        field: option or field that names the file, as an error says it.

    Raises:
        UsageError: missing, or a line without a ``sample_id``; names it.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{field}{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{field}{path} is not UTF-8 text") from None
    found = set()
    for number, line in enumerate(lines, 1):
        try:
            found.add(str(json.loads(line)["sample_id"]))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f'{field}{path} line {number}: expected {{"sample_id": ...}}') from None
    return frozenset(found)
