"""Tables of records: JSON arrays, JSONL, CSV, TSV and parquet, local or behind an fsspec URL.

They are read piece by piece, so that a table may be larger than the memory. A row that cannot be read is given as its
reason; a table whose structure is broken is refused as a whole, because nobody can count what follows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.ingest.sources.columns import in_print
from megatron_medgpt.ingest.sources.place import Place, name_of, open_place

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LARGEST_RECORD_BYTES = 64 << 20
"""One record of a JSON table; images as ``data:`` URIs lie inside."""
_LARGEST_FIELD = 1_000_000
_PIECE_BYTES = 1 << 18
_ROWS_AT_ONCE = 64
_UTF_8_BOM = b"\xef\xbb\xbf"
_UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def ending_of(place: Place) -> str:
    name = name_of(place).lower()
    return name[name.rfind(".") :] if "." in name else ""


def read_rows(place: Path | str) -> Iterator[dict[str, Any] | str]:
    """Rows of a table as dicts; a row that cannot be read is the reason instead.

    Raises:
        UsageError: the file as a whole cannot be read.
    """
    readers = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_array, ".csv": _csv, ".tsv": _tsv,
        ".parquet": _parquet,
    }  # fmt: skip
    reader = readers.get(ending_of(place))
    if reader is None:
        raise UsageError(f"{place} has the ending {ending_of(place) or 'none'}; allowed: {', '.join(ENDINGS)}")
    with open_place(place) as file:
        try:
            _refuse_utf_16(file)
            yield from reader(file)
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise UsageError(f"{place} cannot be read: {' '.join(str(error).split())}") from error


def _refuse_utf_16(file: io.BufferedReader) -> None:
    if file.peek(2)[:2] in _UTF_16_BOMS:
        raise ValueError("it is UTF-16; save it as UTF-8, e.g. iconv -f UTF-16 -t UTF-8 OLD > NEW")


class _Refused(dict):
    """An object of a JSON table that cannot be taken at its word."""

    reason = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    reason = "duplicate-key" if len(made) != len(pairs) else ""
    for value in made.values():
        for inner in value if isinstance(value, list) else (value,):
            if isinstance(inner, _Refused):
                reason = reason or inner.reason
            elif inner is _NOT_A_NUMBER:
                reason = "not-json"
    if not reason:
        return made
    refused = _Refused(made)
    refused.reason = reason
    return refused


_NOT_A_NUMBER = object()
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: _NOT_A_NUMBER)


def _row(value: Any) -> dict[str, Any] | str:
    if isinstance(value, _Refused):
        return value.reason
    return value if isinstance(value, dict) else "not-a-record"


def parse_json(content: bytes) -> Any:
    """One JSON text; an object with a repeated key or NaN is ``_Refused`` and ``row_of`` gives its reason.

    Raises:
        ValueError: not UTF-8, not JSON, or too deep.
    """
    try:
        text = content.removeprefix(_UTF_8_BOM).decode("utf-8")
        value, end = _DECODER.raw_decode(text.lstrip(" \t\r\n"))
        if text.lstrip(" \t\r\n")[end:].strip(" \t\r\n"):
            raise ValueError("more than one JSON text")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def row_of(content: bytes) -> dict[str, Any] | str:
    """One JSON record, or the reason why it is none."""
    try:
        return _row(parse_json(content))
    except UnicodeDecodeError:
        return "not-utf-8"
    except ValueError:
        return "not-json"


def _json_lines(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    while line := file.readline(LARGEST_RECORD_BYTES + 1):
        if len(line) > LARGEST_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_PIECE_BYTES)
            yield "over-long"
        elif line.strip():
            yield row_of(line)


def _json_array(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    window = _Window(file)
    if window.next_character() != "[":
        raise ValueError("it is not a JSON array of records; write one record a line and name it .jsonl")
    window.at += 1
    is_first = True
    while (character := window.next_character()) != "]":
        if not is_first:
            if character != ",":
                raise ValueError("its array breaks off or is no JSON")
            window.at += 1
        yield _row(window.next_value())
        is_first = False
    window.at += 1
    if window.next_character():
        raise ValueError("something stands behind its array")


class _Window:
    """A piece of a JSON text that moves through its file."""

    def __init__(self, file: IO[bytes]) -> None:
        # Bytes that are not UTF-8 become surrogates: the record that holds them is refused, not the table.
        self._file = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        self._text, self.at = "", 0

    def _grow(self) -> bool:
        kept = self._text[self.at :]
        if len(kept) > LARGEST_RECORD_BYTES:
            raise ValueError(f"a record is larger than {LARGEST_RECORD_BYTES >> 20} MiB, or is no JSON")
        piece = self._file.read(max(_PIECE_BYTES, len(kept)))  # doubling: a large record is not decoded often
        self._text, self.at = kept + piece, 0
        return bool(piece)

    def next_character(self) -> str:
        """What stands next behind blanks; empty at the end."""
        while True:
            while self.at < len(self._text):
                if self._text[self.at] not in " \t\r\n":
                    return self._text[self.at]
                self.at += 1
            if not self._grow():
                return ""

    def next_value(self) -> Any:
        """Decode the value that comes next and move behind it."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
                if end < len(self._text) or not self._grow_or_end():
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                # What is wrong well before the end stays wrong with more text.
                cut_short = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if not cut_short or not self._grow():
                    raise ValueError(f"its array breaks off or is no JSON ({error.msg})") from error

    def _grow_or_end(self) -> bool:
        """A number at the very end may go on in the next piece."""
        at, kept = self.at, self._text
        if self._grow():
            return True
        self._text, self.at = kept, at
        return False


def _csv(file: IO[bytes], delimiter: str = "") -> Iterator[dict[str, Any] | str]:
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    head = text.readline(_LARGEST_FIELD)
    if head.strip("\r\n").lower() in ("sep=;", "sep=,", "sep=\t"):  # how Excel is told
        delimiter, head = head[4], text.readline(_LARGEST_FIELD)
    csv.field_size_limit(_LARGEST_FIELD)
    # Strict: a quote that is never closed would otherwise swallow every row after it, uncounted.
    rows = csv.DictReader(chain((head,), text), delimiter=delimiter or _delimiter_of(head), strict=True)
    names = [name for name in rows.fieldnames or [] if name]  # spreadsheets leave columns without a name at the right
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two of its columns are called {in_print(twice[0])}; rename one")
    try:
        for row in rows:
            if None in row or None in row.values():
                yield "wrong-number-of-columns"
            elif any("\udc80" <= character <= "\udcff" for value in row.values() for character in value):
                yield "not-utf-8"
            elif any(row.values()):  # else an empty line, as a spreadsheet writes it
                yield dict(row)
    except csv.Error as error:
        what = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
        raise ValueError(f"the record at line {rows.line_num + 1}: {what}; mend its quotes, or use JSONL") from error


def _delimiter_of(head: str) -> str:
    """A comma; where the first line has none, the semicolon or tab that spreadsheets write in many countries."""
    found = [character for character in ";\t" if character in head]
    return "," if "," in head or not found else found[0]


def _tsv(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    return _csv(file, "\t")


def _parquet(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("parquet needs pyarrow; pip install 'megatron-medgpt[parquet]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            try:
                rows = batch.to_pylist()
            except (UnicodeDecodeError, OverflowError):
                rows = [_parquet_row(batch, number) for number in range(batch.num_rows)]
            yield from rows
    except pyarrow.lib.ArrowException as error:
        raise ValueError(str(error)) from error


def _parquet_row(batch: Any, number: int) -> dict[str, Any] | str:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return "not-utf-8"
    except OverflowError:
        return "number-out-of-range"
