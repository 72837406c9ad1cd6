"""Tables of records on disk: JSON arrays, JSONL, CSV, TSV. A row that cannot be read is given as its reason."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_LARGEST_FIELD = 1_000_000


def read_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Rows of a table as dicts; a row that cannot be read is the reason instead.

    Raises:
        UsageError: the file as a whole cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            with open(path, "rb") as file:
                for line in file:
                    if line.strip():
                        yield _parsed(line)
        elif suffix == ".json":
            rows = _json(path.read_bytes())
            if not isinstance(rows, list):
                raise UsageError(f"{path} is not a JSON array of records; write one record a line and name it .jsonl")
            yield from (row if isinstance(row, dict) else "not-a-record" for row in rows)
        elif suffix in (".csv", ".tsv"):
            text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
            csv.field_size_limit(_LARGEST_FIELD)
            for row in csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ","):
                whole = None not in row and None not in row.values()
                yield dict(row) if whole else "wrong-number-of-columns"
        else:
            raise UsageError(f"{path} has the ending {suffix or 'none'}; allowed: {', '.join(ENDINGS)}")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _json(content: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(content.decode("utf-8-sig"), parse_constant=refuse)


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        row = _json(line)
    except UnicodeDecodeError:
        return "not-utf-8"
    except (ValueError, RecursionError):
        return "not-json"
    return row if isinstance(row, dict) else "not-a-record"
