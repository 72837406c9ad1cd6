"""What a person looks at: pictures of the evaluation beside the training pictures they were taken for."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.evaluate.leakage.hashes import question_picture, stored_picture
from megatron_medgpt.evaluate.leakage.ngrams import TextMatch
from megatron_medgpt.evaluate.tasks.question import Question

SHOWN = 24
"""Half of them the nearest, half the farthest that still count: these show whether the bounds are right."""
SIDE_PX = 224
_EXCERPT = 280
Pair = tuple[int, tuple[int, int], int, int]


def picture_pairs(
    found: Sequence[tuple[Dataset, Sequence[Pair]]], pictures: Sequence[Question], questions: Sequence[Question],
    picture_of: Sequence[int | None], task_of: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs with both pictures as PNG: one per evaluation picture (its nearest), the nearest first."""
    nearest: dict[int, tuple[Dataset, Pair]] = {}
    for dataset, pairs in found:
        for pair in pairs:
            known = nearest.get(pair[0])
            if known is None or (pair[3], pair[2]) < (known[1][3], known[1][2]):
                nearest[pair[0]] = (dataset, pair)
    ordered = sorted(nearest.values(), key=lambda entry: (entry[1][3], entry[1][2], entry[1][0]))
    if len(ordered) > SHOWN:
        ordered = [*ordered[: SHOWN // 2], *ordered[-(SHOWN - SHOWN // 2) :]]
    asked: dict[int, list[int]] = {}
    for number, picture in enumerate(picture_of):
        if picture is not None:
            asked.setdefault(picture, []).append(number)
    shown = []
    for dataset, (picture, key, coarse, fine) in ordered:
        about = asked[picture]
        store = dataset.manifest.store if dataset.manifest.store.kind == "pixels" else None
        shown.append(
            {
                "kind": "exact" if fine < 0 else "near", "bits_of_64": coarse, "bits_of_256": max(fine, 0),
                "task": task_of[about[0]], "question_ids": [questions[n].question_id for n in about[:3]],
                "num_questions": len(about), "question": questions[about[0]].question,
                "dataset": dataset.folder.name, "image": f"{dataset.manifest.shards[key[0]].name} image {key[1]}",
                "evaluation_png_base64": _png(question_picture(pictures[picture], store)),
                "training_png_base64": _png(stored_picture(dataset, key)),
            }
        )  # fmt: skip
    return shown


def text_pairs(
    hits: Sequence[tuple[Dataset, TextMatch, Callable[[int], list[str]]]], questions: Sequence[Question],
    task_of: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Questions and the training texts that hold them, the most complete first."""
    ordered = sorted(hits, key=lambda entry: (-entry[1].share, entry[1].question))[:SHOWN]
    return [
        {
            "task": task_of[hit.question], "question_id": questions[hit.question].question_id, "share": hit.share,
            "question": _short(f"{questions[hit.question].question} {questions[hit.question].answer}"),
            "training_text": _short(" ".join(read(hit.sample))), "dataset": dataset.folder.name,
            "sample_id": dataset.sample_id(hit.sample),
        }
        for dataset, hit, read in ordered
    ]  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"


def _png(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
