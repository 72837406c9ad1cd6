"""Which column of a table serves as what, and which format that makes it. What is ambiguous is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_medgpt.config.errors import UsageError

FORMATS = ("auto", "llava", "messages", "caption", "vqa", "mcq", "dicom")
FIELDS = (
    "image", "text", "question", "answer", "options", "label", "id", "modality", "licence", "sop_uid", "series_uid",
    "study_uid", "body_part", "view", "laterality",
)  # fmt: skip
"""What ``--map`` can name: field=column. ``id=`` alone tells records apart by their content."""
NEEDED: dict[str, tuple[str, ...]] = {
    "llava": (), "messages": (), "caption": ("image", "text"), "vqa": ("image", "question", "answer"),
    "mcq": ("image", "question", "answer", "options"), "dicom": ("text",),
}  # fmt: skip
UID_KEYWORDS = {"sop_uid": "SOPInstanceUID", "series_uid": "SeriesInstanceUID", "study_uid": "StudyInstanceUID"}
"""Field -> DICOM attribute, the finest first: a table may have several of these columns."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".dcm")
_NAMES = {
    "image": ("image", "img", "image_path", "img_path", "img_name", "file_name", "filename", "filepath", "figure_path",
              "path", "dicom", "images"),
    "text": ("caption", "text", "report", "description"),
    "question": ("question",),
    "answer": ("answer", "gt_answer", "answers"),
    "options": ("options", "choices"),
    "label": ("answer_label", "answer_idx", "correct_choice_idx"),
    "id": ("id", "question_id", "qid", "sample_id"),
    "modality": ("modality", "modality_type"),
    "licence": ("license", "licence", "license_code"),
    "sop_uid": ("sopinstanceuid", "sop_instance_uid", "sop_uid"),
    "series_uid": ("seriesinstanceuid", "series_instance_uid", "series_uid"),
    "study_uid": ("studyinstanceuid", "study_instance_uid", "study_uid"),
    "body_part": ("body_part", "bodypart", "body part", "bodypartexamined", "body_part_examined", "anatomy",
                  "anatomical_region", "location"),
    "view": ("view", "view_position", "viewposition", "projection"),
    "laterality": ("laterality", "image_laterality", "imagelaterality", "side"),
}  # fmt: skip
_OPTION = re.compile(r"(?:(option|choice)[ _]?)?([A-H])", re.IGNORECASE)


def choose_columns(row: Mapping[str, Any], mapping: Mapping[str, str], table: object) -> dict[str, str]:
    """Field -> column, by ``--map`` where it says so, else by name.

    Raises:
        UsageError: ``--map`` names a column that is not there, or several columns could be the image or the text.
    """
    columns = {}
    for name, known in _NAMES.items():
        if name in mapping:
            if mapping[name] not in row and (name, mapping[name]) != ("id", ""):
                listed = ", ".join(map(in_print, row))
                raise UsageError(f"--map {name}={mapping[name]}: {table} has only the columns {listed}")
            columns[name] = mapping[name]
            continue
        found = [column for column in row if isinstance(column, str) and column.strip().lower() in known]
        if len(found) > 1 and name in ("image", "text"):
            raise UsageError(
                f"{table} has several columns for {name}: {', '.join(found)}; choose with --map {name}={found[0]}"
            )
        if found:
            columns[name] = found[0]
    if "options" not in columns and (family := option_columns(row)):
        columns["options"] = "..".join((family[0][1], family[-1][1]))
    if "image" not in columns and _names_a_picture(row.get("name")):
        columns["image"] = "name"  # ROCO
    return columns


def option_columns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(letter, column) of a row with a column for each option: ``option_A``, ``Choice A`` or just ``A``."""
    found = []
    for column in row:
        match = _OPTION.fullmatch(column) if isinstance(column, str) else None
        if match and (match[1] or match[2].isupper()):
            found.append((match[2].upper(), column))
    return sorted(found) if len(found) > 1 else []


def _names_a_picture(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(IMAGE_ENDINGS)


def in_print(name: object) -> str:
    """A name from a file on one line: what is not printable (line feeds, a terminal's control codes) is spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def dialogue_key(row: Mapping[str, Any]) -> str | None:
    """The key of a LLaVA dialogue; LLaVA-Med's alignment file spells it without its third s."""
    return next((key for key in ("conversations", "conversatons") if isinstance(row.get(key), list)), None)


def detect_format(row: Mapping[str, Any], columns: Mapping[str, str], table: object) -> str:
    """The format of a table by its first record.

    Raises:
        UsageError: of no known shape, or of two.
    """
    has_dialogue, has_messages = dialogue_key(row) is not None, isinstance(row.get("messages"), list)
    if has_dialogue and has_messages:
        raise UsageError(f"{table} has conversations and messages; choose with --format llava or --format messages")
    if has_dialogue or has_messages:
        return "llava" if has_dialogue else "messages"
    if {"image", "question", "answer"} <= columns.keys() or {"image", "question", "label"} <= columns.keys():
        if "options" in columns:
            return "mcq"
        if "text" in columns:
            raise UsageError(
                f"{table} has a question and a text ({columns['question']}, {columns['text']}); choose with "
                "--format vqa or --format caption"
            )
        return "vqa"
    if "image" in columns and "text" in columns:
        return "caption"
    if "text" in columns and not UID_KEYWORDS.keys().isdisjoint(columns):
        return "dicom"
    raise UsageError(
        f"{table} is of no known shape; its columns are {', '.join(map(in_print, row))}; "
        "name them, e.g. --map image=COLUMN,text=COLUMN"
    )
