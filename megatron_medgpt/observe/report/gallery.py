"""Pictures with the question, the options, and what the model answered.

Beside an evaluation file ``NAME.json`` lies ``NAME.gallery.json``, a list of ``{"image_png_base64" or "image" (path
beside the file), "question", "options", "answer", "prediction", "correct", "modality", "question_type"}``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.observe.report.evaluation import modality_name

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


def galleries(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The galleries of the evaluations, in their order; what lies as ``gallery.json`` alone comes last."""
    found = [
        {"name": f"{result['task']}, {result['protocol']}", "cards": cards}
        for result in results
        if (cards := view(folder / Path(result["file"]).with_suffix(".gallery.json").name))
    ]
    if cards := view(folder / "gallery.json"):
        found.append({"name": "pictures", "cards": cards})
    return found


def view(path: Path) -> list[dict[str, Any]]:
    """Cards of the gallery, wrong answers between the right ones as the file orders them; empty without a file.

    Raises:
        WorkError: the file is not such a list, or a picture it names is missing or lies outside its folder.
    """
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{path} is not JSON ({error})") from None
    if not isinstance(entries, list):
        raise WorkError(f"{path} must hold a list of pictures, found {type(entries).__name__}")
    return [_card(path, place, entry) for place, entry in enumerate(entries)]


def _card(path: Path, place: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not {"question", "answer", "prediction", "correct"} <= entry.keys():
        raise WorkError(f"{path} entry {place}: needs question, answer, prediction and correct")
    options = [
        {"text": option, "right": option == entry["answer"], "chosen": option == entry["prediction"]}
        for option in entry.get("options") or []
    ]
    modality, kind = modality_name(entry.get("modality") or ""), entry.get("question_type") or ""
    return {
        "source": _source(path, place, entry),
        "alt": f"{modality or 'Medical'} image. {entry['question']} Right answer: {entry['answer']}.",
        "question": entry["question"],
        "options": options,
        "answer": entry["answer"],
        "prediction": entry["prediction"] or "no answer",
        "listed": any(option["chosen"] for option in options),
        "correct": bool(entry["correct"]),
        "modality": modality,
        "question_type": kind,
    }


def _source(path: Path, place: int, entry: Mapping[str, Any]) -> str:
    """The picture as a ``data:`` URL, so that the page is one file."""
    if entry.get("image_png_base64"):
        return f"data:image/png;base64,{entry['image_png_base64']}"
    name = str(entry.get("image") or "")
    picture = (path.parent / name).resolve()
    if not name or path.parent.resolve() not in picture.parents or picture.suffix.lower() not in KINDS:
        raise WorkError(f"{path} entry {place}: image {name!r} must be a PNG or JPEG below {path.parent}")
    try:
        data = picture.read_bytes()
    except OSError as error:
        raise WorkError(f"{path} entry {place}: image {name!r} cannot be read ({error.strerror})") from None
    return f"data:image/{KINDS[picture.suffix.lower()]};base64,{base64.b64encode(data).decode()}"
