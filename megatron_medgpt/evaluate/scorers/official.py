"""OmniMedVQA's own two protocols, as its repository runs them (OpenGVLab/Multi-Modality-Arena, ``MedicalEval/``).

``official-qa`` (Question-answering Score): options are shown as a Python list without letters; the prediction is the
option most similar to the output by ``difflib``. A bare letter therefore matches nothing, or the wrong option.

``official-prefix`` (Prefix-based Score): no options are shown; the prediction is the option whose text has the lowest
mean cross-entropy after the question. The released runners disagree: the LLaMA-Adapter-v2 and mPLUG-Owl ones pass the
bare question, the LLaVA-Med one passes the question with the candidate list; ours is the former, as the paper says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher


def qa_prompt(question: str, options: Sequence[str]) -> str:
    """The user's words of ``official-qa``. There is no space before "Here"; the list is Python's ``repr``."""
    return (
        f"{question}Here are {len(options)} candidate answers:{list(options)} Only return what you think is the "
        "correct answer from the candidate answers, do not return any other irrelevant text!"
    )


def most_similar(options: Sequence[str], output: str) -> int | None:
    """Place of the option most similar to the output (first of equals, case counts); None when nothing is shared.

    The argument order matters: ``SequenceMatcher`` is not symmetric, and treats characters that are frequent in a
    second string of 200 or more as noise.
    """
    ratios = [SequenceMatcher(None, option, output).ratio() for option in options]
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return best if ratios[best] > 0 else None


def prefix_prompt(question: str) -> str:
    """Text before the option in ``official-prefix`` (prompt variant 4 of the repository)."""
    return f"Question: {question} The answer is"


def prefix_continuation(option: str) -> str:
    """Text of an option whose tokens are scored in ``official-prefix``."""
    return f" {option}."


def lowest_loss(losses: Sequence[float]) -> int | None:
    """Place of the option with the lowest mean cross-entropy: ``argmax(softmax(1 / loss))`` of the repository.

    The first of equals. None when a loss is missing or not a number.
    """
    if not losses or any(not math.isfinite(loss) for loss in losses):
        return None
    return min(range(len(losses)), key=losses.__getitem__)
