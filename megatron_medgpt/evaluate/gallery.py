"""The pictures that the report shows: some right and some wrong answers, from every modality and kind of question."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.documents import encoded_picture
from megatron_medgpt.evaluate.result import Item
from megatron_medgpt.observe.whole import write_whole

THUMBNAIL_PX = 320


def write_gallery(items: Sequence[Item], path: Path | str, *, num_right: int = 8, num_wrong: int = 4) -> int:
    """Write ``NAME.gallery.json`` for ``observe.report``: the same choice for the same items; returns how many."""
    cards = []
    for wanted, count in ((True, num_right), (False, num_wrong)):
        cards += [card for item in _spread([i for i in items if i.correct == wanted]) if (card := _card(item))][:count]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_interleaved(cards), ensure_ascii=False))
    return len(cards)


def _spread(items: Sequence[Item]) -> list[Item]:
    """The items dealt round-robin over modality and kind of question, so that the first few are of many kinds."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.question.question_type, item.question.modality), []).append(item)
    # Diagonally: neighbours in the order differ in both respects.
    kinds = sorted({kind for kind, _ in groups})
    modalities = sorted({modality for _, modality in groups})
    order = [
        (kinds[(i + shift) % len(kinds)], modality)
        for shift in range(len(kinds))
        for i, modality in enumerate(modalities)
    ]
    queues = [groups[key] for key in order if key in groups]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[place] for place in range(min(longest, 32)) for queue in queues if place < len(queue)]


def _card(item: Item) -> dict[str, Any] | None:
    try:
        with Image.open(io.BytesIO(encoded_picture(item.question))) as picture:
            picture = picture.convert("RGB")
    except (UsageError, OSError):
        return None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    question = item.question
    chosen = item.verdict.choice if item.verdict is not None else None
    return {
        "image_png_base64": base64.b64encode(buffer.getvalue()).decode(),
        "question": question.question,
        "options": list(question.options),
        "answer": question.answer,
        "prediction": question.options[chosen] if chosen is not None else item.output,
        "correct": item.correct,
        "modality": question.modality,
        "question_type": question.question_type,
    }


def _interleaved(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Right and wrong ones mixed evenly."""
    right, wrong = ([card for card in cards if card["correct"] == value] for value in (True, False))
    placed = [((i + 0.5) / len(group), card) for group in (right, wrong) for i, card in enumerate(group)]
    return [card for _, card in sorted(placed, key=lambda pair: pair[0])]
