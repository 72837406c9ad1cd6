"""Rows of the files in which evaluation sets come: JSON, JSON lines, CSV, Parquet. Also a user's own table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.question import Question, Task, make_task

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of one table; the format follows from the suffix.

    Raises:
        UsageError: the file is missing, not UTF-8, or not what its suffix says; names the place.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    text = read_text(path)
    if path.suffix == ".jsonl":
        # splitlines would also cut at U+2028 and the like, which may stand in a text.
        lines = enumerate(text.split("\n"), 1)
        rows = [_json(path, line, f"line {number}") for number, line in lines if line.strip()]
    elif path.suffix == ".json":
        rows = _json(path, text, "the file")
        if isinstance(rows, dict):
            rows = next((value for value in rows.values() if isinstance(value, list)), None)
    elif path.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ","))
    else:
        raise UsageError(f"{path}: {path.suffix or 'no suffix'} is not a table; allowed: {', '.join(TABLE_SUFFIXES)}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: expected a list of objects, one per question")
    return rows


def read_text(path: Path) -> str:
    """The file as UTF-8 (a byte order mark is dropped); raises UsageError naming the first wrong byte."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def text_field(row: Mapping[str, Any], names: tuple[str, ...], where: str, *, default: str | None = None) -> str:
    """The first of the named fields that is there, as text; a missing one without default is a UsageError."""
    for name in names:
        value = row.get(name)
        if value is not None:
            return value if isinstance(value, str) else str(value)
    if default is not None:
        return default
    raise UsageError(f"{where}: no field {' or '.join(names)}; found: {', '.join(map(str, row)) or 'nothing'}")


def image_field(value: Any, root: Path) -> Path | bytes | None:
    """An image cell of a table: a path below ``root``, or the bytes that Parquet files of datasets carry."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return root / str(value)


def load_table(data: Path, *, check_images: bool = True) -> Task:
    """A user's own table: one file with ``question``, ``answer`` and, as wanted, ``question_id``, ``image``,
    ``options`` (a list, or ``option_A`` ... ``option_Z``), ``modality``, ``question_type``.

    ``data`` is the file, or a folder with one ``questions.*`` table; image paths are relative to the table's folder.
    """
    path = data if data.is_file() else one_file(data, [f"questions{suffix}" for suffix in TABLE_SUFFIXES])
    questions = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} entry {number}"
        options = row.get("options")
        if isinstance(options, str):
            options = _json(path, options, f"options of entry {number}") if options.strip() else None
        if options is None:
            options = [row[key] for key in sorted(row) if key.startswith("option_") and row[key] not in (None, "")]
        questions.append(
            Question(
                question_id=text_field(row, ("question_id", "id", "qid"), where, default=f"{path.stem}_{number:06d}"),
                question=text_field(row, ("question",), where),
                answer=text_field(row, ("answer", "gt_answer"), where),
                options=tuple(str(option) for option in options),
                image=image_field(row.get("image", row.get("image_path")), path.parent),
                modality=text_field(row, ("modality", "modality_type"), where, default="unknown"),
                question_type=text_field(row, ("question_type",), where, default="unknown"),
                dataset=text_field(row, ("dataset",), where, default=path.stem),
            )
        )
    return make_task("table", path, questions, check_images=check_images)


def one_file(folder: Path, names: list[str]) -> Path:
    """The first of the named files that the folder holds; UsageError lists what was looked for."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{folder}: none of {', '.join(names)} is there")


def _json(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path}: {what} is not JSON ({error})") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise UsageError(f"{path}: not a Parquet file ({error})") from None
    return _share_images(rows)


def _share_images(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one copy of the bytes of a picture that many questions ask about (PathVQA: 858 pictures, 6,719 rows)."""
    pool: dict[bytes, bytes] = {}
    for row in rows:
        image = row.get("image")
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            image["bytes"] = pool.setdefault(image["bytes"], image["bytes"])
    return rows
