"""Is the answer read from the image? The same questions with an image that cannot help.

``blank_image`` shows a square of one colour, ``shuffled_image`` the picture of another question of the same type,
``text_only`` none at all. A benchmark of templates is partly answerable without its images; these say how far.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.question import Question

CONTROLS = ("blank_image", "shuffled_image", "text_only")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
SHUFFLE_SEED = 7


def apply_control(
    questions: Sequence[Question], control: str, *, mean: tuple[float, float, float] = CLIP_MEAN, size_px: int = 336
) -> list[Question]:
    """The same questions in the same order, their images replaced.

    ``mean`` (0..1) is the encoder's mean colour: a blank picture of it is zero after normalisation, up to the rounding
    to 8 bits.
    """
    if control == "blank_image":
        blank = blank_picture(mean, size_px)
        return [replace(question, image=blank) for question in questions]
    if control == "shuffled_image":
        return [replace(question, image=questions[place].image) for question, place in zip(questions, deal(questions))]
    if control == "text_only":
        return [replace(question, image=None) for question in questions]
    raise UsageError(f"control {control!r} is unknown; allowed: {', '.join(CONTROLS)}")


def blank_picture(mean: tuple[float, float, float], size_px: int) -> bytes:
    """PNG of ``size_px`` squared in one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size_px, size_px), tuple(round(255 * channel) for channel in mean)).save(buffer, "PNG")
    return buffer.getvalue()


def deal(questions: Sequence[Question]) -> list[int]:
    """For every question the place of the question whose picture it gets: a fixed permutation within each question
    type that leaves no question its own picture where the type has two pictures or more of which none fills half.

    The permutation knows nothing of answers, so the answer to the dealt picture is independent of the right option.
    """
    places = list(range(len(questions)))
    by_type: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        by_type.setdefault(question.question_type, []).append(place)
    random = np.random.default_rng(SHUFFLE_SEED)
    for members in by_type.values():
        order = [members[i] for i in random.permutation(len(members))]
        for place, dealt in zip(members, _without_fixed(members, order, [q.image_key for q in questions])):
            places[place] = dealt
    return places


def _without_fixed(members: list[int], order: list[int], keys: list[str]) -> list[int]:
    """Swap away the places that would get their own picture; what cannot be mended (too few pictures) stays."""
    order = list(order)
    for i, member in enumerate(members):
        if keys[member] != keys[order[i]]:
            continue
        for step in range(1, len(members)):
            j = (i + step) % len(members)
            if keys[member] != keys[order[j]] and keys[members[j]] != keys[order[i]]:
                order[i], order[j] = order[j], order[i]
                break
    return order
