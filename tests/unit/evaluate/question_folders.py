"""Small evaluation folders in the published layouts."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

KINDS = ("Modality Recognition", "Disease Diagnosis")
MODALITIES = ("CT(Computed Tomography)", "X-Ray")
OPTIONS = ("PET scan", "CT scan", "Blood test", "Fundus imaging")


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade % 256, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def omnimedvqa_folder(folder: Path, *, num_questions: int = 16, questions_per_image: int = 2) -> Path:
    """A folder in OmniMedVQA's layout; the right option moves on by one with every question."""
    (folder / "QA_information" / "Open-access").mkdir(parents=True)
    (folder / "Images").mkdir()
    rows = []
    for number in range(num_questions):
        name = f"Images/{number // questions_per_image}.png"
        (folder / name).write_bytes(picture(number // questions_per_image))
        rows.append(
            {
                "dataset": "Phantoms", "question_id": f"P_{number:04d}", "question_type": KINDS[number % 2],
                "question": f"What is number {number}?", "gt_answer": OPTIONS[number % 4], "image_path": name,
                "modality_type": MODALITIES[2 * number // num_questions],
                **{f"option_{letter}": text for letter, text in zip("ABCD", OPTIONS)},
            }
        )  # fmt: skip
    write_questions(folder, rows)
    return folder


def questions_file(folder: Path) -> Path:
    return folder / "QA_information" / "Open-access" / "Phantoms.json"


def read_questions(folder: Path) -> list[dict]:
    return json.loads(questions_file(folder).read_text())


def write_questions(folder: Path, rows: list[dict]) -> None:
    questions_file(folder).write_text(json.dumps(rows))


def write_predictions(path: Path, rows: dict[str, str | None]) -> Path:
    lines = [json.dumps({"question_id": key, "prediction": text}) for key, text in rows.items()]
    path.write_text("\n".join(lines) + "\n")
    return path
