"""What users have, as one normal form: a record with image names and the turns of a dialogue.

Formats: ``llava`` (conversations, also under the misspelt key of LLaVA-Med's alignment file), ``messages`` (chat
JSONL), ``caption`` (a table of image and text), ``vqa`` (a table of image, question and answer), ``mcq`` (with options:
OmniMedVQA's files), ``dicom`` (a table of texts keyed by SOP or study UID, and a tree of files). A record that cannot
be used carries the reason; it is never left out silently.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import IMAGE_MARK, Turn
from megatron_medgpt.ingest.tables import ENDINGS, read_rows

FORMATS = ("auto", "llava", "messages", "caption", "vqa", "mcq", "dicom")
FIELDS = ("image", "text", "question", "answer", "id", "modality", "sop_uid", "study_uid")
"""What ``--map`` can name: field=column."""
CAPTION_PROMPTS = ("Describe the image.", "What does the image show?", "Explain the picture briefly.")
_NAMES = {
    "image": ("image", "img", "image_path", "img_path", "img_name", "file_name", "filename", "filepath", "figure_path",
              "path", "dicom", "images"),
    "text": ("caption", "text", "report", "description"),
    "question": ("question",),
    "answer": ("answer", "gt_answer"),
    "id": ("id", "question_id", "qid", "sample_id"),
    "modality": ("modality", "modality_type"),
    "sop_uid": ("sopinstanceuid", "sop_instance_uid", "sop_uid"),
    "study_uid": ("studyinstanceuid", "study_instance_uid", "study_uid"),
}  # fmt: skip
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LONGEST_TEXT = 200_000


@dataclass(frozen=True, slots=True)
class Record:
    """One input record in normal form. ``problem`` is the reason why it cannot be a sample, else empty."""

    number: int
    """Place in the inputs, from 0; the only name of a record that is ever written."""
    images: tuple[str, ...] = ()
    """Relative to the image root."""
    turns: tuple[Turn, ...] = ()
    modality: str = ""
    source_id: str = ""
    """The record's own id, or a digest of its content; only its keyed hash is written."""
    problem: str = ""


class RecordError(Exception):
    """A record that cannot be used; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table with a format and the columns that were chosen. Iterate with ``read``."""

    path: Path
    format: str
    image_root: Path
    columns: dict[str, str] = field(default_factory=dict)
    uid_paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """SOP or study UID -> files of the tree, for ``dicom``."""

    def describe(self) -> str:
        """One line for the terminal: which format, and which column serves as what."""
        chosen = ", ".join(f"{name}={column}" for name, column in self.columns.items())
        return f"{self.path.name}: format {self.format}" + (f" ({chosen})" if chosen else "")

    def read(self, first_number: int = 0) -> Iterator[Record]:
        """Every record of the table, usable or not."""
        convert = _CONVERTERS[self.format]
        for number, row in enumerate(read_rows(self.path), first_number):
            if isinstance(row, str):
                yield Record(number, problem=row)
                continue
            try:
                yield self._record(number, row, convert)
            except RecordError as error:
                yield Record(number, problem=str(error))

    def _record(self, number: int, row: dict[str, Any], convert: Callable) -> Record:
        images, turns = convert(self, row)
        turns = _checked_turns(_with_marks(turns, len(images)), len(images))
        modality = row.get(self.columns.get("modality", "modality"))
        if not isinstance(modality, str):
            domain = row.get("domain")  # LLaVA-Med: {"chest_xray": true, "mri": false, ...}
            modality = next((k for k, v in domain.items() if v is True), "") if isinstance(domain, dict) else ""
        own = row.get(self.columns.get("id", "id"))
        content = json.dumps([images, [(t.role, t.text) for t in turns]])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return Record(number, images, turns, modality, f"id:{own}" if own not in (None, "") else digest)


def open_source(
    path: str | Path,
    *,
    format: str = "auto",
    image_root: str | Path | None = None,
    mapping: dict[str, str] | None = None,
) -> Source:
    """Find out what a file or folder is.

    Raises:
        UsageError: it is missing, of no known shape, or of several (the message says what to set).
    """
    path, mapping = Path(path), dict(mapping or {})
    if format not in FORMATS:
        raise UsageError(f"--format {format}; allowed: {', '.join(FORMATS)}")
    for name in mapping:
        if name not in FIELDS:
            raise UsageError(f"--map {name}={mapping[name]}; allowed fields: {', '.join(FIELDS)}")
    if not path.exists():
        raise UsageError(f"input {path} does not exist")
    table = _table_in(path) if path.is_dir() else path
    root = Path(image_root) if image_root else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise UsageError(f"--image-root {root} is not a folder")
    first = next((row for row in read_rows(table) if isinstance(row, dict)), None)
    if first is None:
        raise UsageError(f"{table} holds no readable records; expected a JSON array, JSONL, CSV or TSV")
    columns = _columns(first, mapping, table)
    chosen = _detect(first, columns, table) if format == "auto" else format
    missing = [name for name in _NEEDED[chosen] if name not in columns]
    if missing:
        raise UsageError(f"{table} has no column for {missing[0]}; name it with --map {missing[0]}=COLUMN")
    source = Source(path=table, format=chosen, image_root=root, columns=columns)
    if chosen != "dicom":
        return source
    from megatron_medgpt.ingest.identity import files_by_uid

    key = "SOPInstanceUID" if "sop_uid" in columns else "StudyInstanceUID"
    return Source(path=table, format=chosen, image_root=root, columns=columns, uid_paths=files_by_uid(root, key))


def _table_in(folder: Path) -> Path:
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    if len(tables) == 1:
        return tables[0]
    names = ", ".join(p.name for p in tables[:5]) or "none"
    raise UsageError(
        f"{folder} must hold exactly one table (json, jsonl, csv, tsv), found {names}; name the file itself"
    )


def _columns(row: dict[str, Any], mapping: dict[str, str], table: Path) -> dict[str, str]:
    columns = {}
    for name, known in _NAMES.items():
        if name in mapping:
            if mapping[name] not in row:
                raise UsageError(f"--map {name}={mapping[name]}: {table} has only the columns {', '.join(row)}")
            columns[name] = mapping[name]
            continue
        found = [column for column in row if column.lower() in known]
        if len(found) > 1 and name in ("image", "text"):
            raise UsageError(
                f"{table} has several columns for {name}: {', '.join(found)}; choose with --map {name}={found[0]}"
            )
        if found:
            columns[name] = found[0]
    return columns


_NEEDED: dict[str, tuple[str, ...]] = {
    "llava": (), "messages": (), "caption": ("image", "text"), "vqa": ("image", "question", "answer"),
    "mcq": ("image", "question", "answer"), "dicom": ("text",),
}  # fmt: skip


def _detect(row: dict[str, Any], columns: dict[str, str], table: Path) -> str:
    if _dialogue_key(row):
        return "llava"
    if isinstance(row.get("messages"), list):
        return "messages"
    if {"image", "question", "answer"} <= columns.keys():
        return "mcq" if "option_A" in row else "vqa"
    if "image" in columns and "text" in columns:
        return "caption"
    if "text" in columns and ("sop_uid" in columns or "study_uid" in columns):
        return "dicom"
    raise UsageError(
        f"{table} is of no known shape; its columns are {', '.join(map(str, row))}; "
        "name them, e.g. --map image=COLUMN,text=COLUMN"
    )


def _dialogue_key(row: dict[str, Any]) -> str | None:
    # LLaVA-Med's alignment file spells it without its third s.
    return next((key for key in ("conversations", "conversatons") if isinstance(row.get(key), list)), None)


def _names(value: Any) -> tuple[str, ...]:
    if value in (None, ""):
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise RecordError("image-is-not-a-name")
    return tuple(names)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RecordError("text-is-not-a-string")
    return value


def _from_llava(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    key = _dialogue_key(row)
    if key is None:
        raise RecordError("no-conversation")
    turns = []
    for turn in row[key]:
        if not isinstance(turn, dict):
            raise RecordError("bad-turn")
        turns.append(Turn(_role(turn.get("from")), _text(turn.get("value"))))
    return _names(row.get(source.columns.get("image", "image"))), turns


def _from_messages(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    if not isinstance(row.get("messages"), list):
        raise RecordError("no-conversation")
    turns = []
    for turn in row["messages"]:
        if not isinstance(turn, dict):
            raise RecordError("bad-turn")
        content = turn.get("content")
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {} for part in content]
            content = "".join(IMAGE_MARK if p.get("type") == "image" else _text(p.get("text")) for p in parts)
        turns.append(Turn(_role(turn.get("role")), _text(content)))
    return _names(row.get("images", row.get("image"))), turns


def _role(name: Any) -> str:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RecordError("unknown-role")
    return role


def _from_caption(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    images, text = _names(row.get(source.columns["image"])), _text(row.get(source.columns["text"])).strip()
    return images, _caption_turns(images, text)


def _caption_turns(images: tuple[str, ...], text: str) -> list[Turn]:
    if not images:
        raise RecordError("no-image")
    which = hashlib.sha256(json.dumps([images, text]).encode()).digest()[0] % len(CAPTION_PROMPTS)
    return [Turn("user", IMAGE_MARK * len(images) + "\n" + CAPTION_PROMPTS[which]), Turn("assistant", text)]


def _from_vqa(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    question, answer = (_text(row.get(source.columns[name])).strip() for name in ("question", "answer"))
    return _names(row.get(source.columns["image"])), [Turn("user", question), Turn("assistant", answer)]


def _from_mcq(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    images, turns = _from_vqa(source, row)
    options = [row[key] for key in sorted(row) if key.startswith("option_") and isinstance(row[key], str)]
    if turns[1].text not in options:
        raise RecordError("answer-is-no-option")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options))
    return images, [Turn("user", f"{turns[0].text}\n{listed}"), turns[1]]


def _from_dicom(source: Source, row: dict) -> tuple[tuple[str, ...], list[Turn]]:
    uid = row.get(source.columns.get("sop_uid") or source.columns["study_uid"])
    images = source.uid_paths.get(uid, ()) if isinstance(uid, str) else ()
    if not images:
        raise RecordError("missing-file")
    return images, _caption_turns(images, _text(row.get(source.columns["text"])).strip())


_CONVERTERS: dict[str, Callable[[Source, dict], tuple[tuple[str, ...], list[Turn]]]] = {
    "llava": _from_llava, "messages": _from_messages, "caption": _from_caption, "vqa": _from_vqa, "mcq": _from_mcq,
    "dicom": _from_dicom,
}  # fmt: skip


def _with_marks(turns: list[Turn], num_images: int) -> list[Turn]:
    """Where no mark stands at all (PubMedVision), the images come before the first question."""
    if num_images == 0 or any(IMAGE_MARK in turn.text for turn in turns):
        return turns
    for number, turn in enumerate(turns):
        if turn.role == "user":
            marked = Turn("user", IMAGE_MARK * num_images + "\n" + turn.text)
            return [*turns[:number], marked, *turns[number + 1 :]]
    raise RecordError("no-question")


def _checked_turns(turns: list[Turn], num_images: int) -> tuple[Turn, ...]:
    if sum(turn.text.count(IMAGE_MARK) for turn in turns) != num_images:
        raise RecordError("marks-and-images-differ")
    if not turns or turns[-1].role != "assistant":
        raise RecordError("no-answer")
    checked = []
    for turn in turns:
        if "\x00" in turn.text or any("\ud800" <= character <= "\udfff" for character in turn.text):
            raise RecordError("bad-characters")
        if len(turn.text) > _LONGEST_TEXT:
            raise RecordError("over-long")
        if turn.role == "assistant" and (not turn.text.strip() or IMAGE_MARK in turn.text):
            raise RecordError("image-in-answer" if turn.text.strip() else "empty-text")
        checked.append(Turn(turn.role, unicodedata.normalize("NFC", turn.text)))
    return tuple(checked)
