"""Written reports about images: MIMIC-CXR in the layout of its release, or a table of images and reports.

The reference is the report's findings section (its impression, or the whole text, where there is none), with white
space made single. Whether the findings are *clinically* right is not measured here; see ``scorers.text``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.question import Problem, Question, Task, make_task
from megatron_medgpt.evaluate.tasks.table import TABLE_SUFFIXES, image_field, one_file, read_rows, read_text, text_field

REPORT = "report"
"""Question type of these questions."""
PROMPT = "Write the findings section of the report for this image."
FRONTAL = ("PA", "AP")
"""View positions that are shown, the better first; a study without one shows its first image."""
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /()-]{3,40}):", re.M)
_SPLIT, _METADATA = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"


def load_reports(folder: Path, *, split: str = "test", check_images: bool = True) -> Task:
    """A set of reports.

    Either MIMIC-CXR-JPG's folder (``mimic-cxr-2.0.0-split.csv``, with ``...-metadata.csv`` for the views, and
    ``files/pNN/pSUBJECT/sSTUDY/DICOM.jpg``) with MIMIC-CXR's reports (``files/pNN/pSUBJECT/sSTUDY.txt``) laid into the
    same tree: one question per study of the split, about its best frontal image. Or ``reports.*``, a table of ``image``
    and ``report`` (or ``findings``).

    Raises:
        UsageError: neither is there, or a field is missing.
    """
    if (folder / _SPLIT).is_file():
        return _load_mimic(folder, split, check_images)
    path = one_file(folder, [f"reports{suffix}" for suffix in TABLE_SUFFIXES])
    questions = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} entry {number}"
        report = text_field(row, ("findings", "report", "text"), where)
        questions.append(
            _question(
                text_field(row, ("question_id", "id", "study_id"), where, default=f"{path.stem}_{number:06d}"), report,
                image_field(row.get("image", row.get("image_path")), path.parent),
                text_field(row, ("modality",), where, default="X-Ray"), path.stem,
            )
        )  # fmt: skip
    return _with_empty("reports", path, questions, check_images)


def findings(report: str) -> str:
    """The findings section of a report, else its impression, else all of it; white space made single."""
    sections: dict[str, str] = {}
    marks = list(_HEADING.finditer(report))
    for place, mark in enumerate(marks):
        end = marks[place + 1].start() if place + 1 < len(marks) else len(report)
        sections.setdefault(mark[1].strip(), report[mark.end() : end])
    chosen = next((sections[name] for name in ("FINDINGS", "IMPRESSION") if sections.get(name, "").strip()), report)
    return " ".join(chosen.split())


def _load_mimic(folder: Path, split: str, check_images: bool) -> Task:
    views = {}
    if (folder / _METADATA).is_file():
        views = {row.get("dicom_id"): row.get("ViewPosition") for row in read_rows(folder / _METADATA)}
    studies: dict[tuple[str, str], list[str]] = {}
    for number, row in enumerate(read_rows(folder / _SPLIT)):
        where = f"{folder / _SPLIT} entry {number}"
        if text_field(row, ("split",), where) == split:
            key = (text_field(row, ("subject_id",), where), text_field(row, ("study_id",), where))
            studies.setdefault(key, []).append(text_field(row, ("dicom_id",), where))
    questions = []
    for (subject, study), images in studies.items():
        patient = folder / "files" / f"p{subject[:2]}" / f"p{subject}"
        path = patient / f"s{study}.txt"
        if not path.is_file():
            raise UsageError(f"{path} is missing; lay MIMIC-CXR's reports into the tree of MIMIC-CXR-JPG")
        image = patient / f"s{study}" / f"{_best_view(images, views)}.jpg"
        questions.append(_question(f"s{study}", read_text(path), image, "X-Ray", "MIMIC-CXR"))
    return _with_empty("reports", folder, questions, check_images)


def _best_view(images: list[str], views: Mapping[Any, Any]) -> str:
    return next((image for view in FRONTAL for image in images if views.get(image) == view), images[0])


def _question(question_id: str, report: str, image: Path | bytes | None, modality: str, dataset: str) -> Question:
    return Question(
        question_id=question_id, question=PROMPT, answer=findings(report), image=image, modality=modality,
        question_type=REPORT, dataset=dataset,
    )  # fmt: skip


def _with_empty(name: str, source: Path, questions: list[Question], check_images: bool) -> Task:
    task = make_task(name, source, questions, check_images=check_images)
    empty = tuple(
        Problem(kind="empty_reference", question_id=question.question_id, detail="the report has no text")
        for question in task.questions if not question.answer
    )  # fmt: skip
    return Task(name=name, questions=task.questions, problems=task.problems + empty)
