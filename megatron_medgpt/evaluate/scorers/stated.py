"""The part of an output that states its answer, cut out in MedEvalKit's order (``utils/utils.py``: ``extract``,
``parse_response``; its ``\\boxed{}`` reader is mathruler's)."""

from __future__ import annotations

ANSWER_PHRASES = (
    "**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:", "final answer",
    "final answer is",
)  # fmt: skip
"""Cut the response behind the last occurrence of each, in this order."""
_OPEN, _CLOSE, _BOX = "<answer>", "</answer>", "\\boxed{"


def tagged(text: str) -> str:
    """Contents of every ``<answer>...</answer>``, joined by spaces; the whole text where there is none."""
    found, place = [], 0
    while True:
        start = text.find(_OPEN, place)
        end = text.find(_CLOSE, start + len(_OPEN)) if start != -1 else -1
        if end == -1:
            return " ".join(found).strip() or text
        found.append(text[start + len(_OPEN) : end])
        place = end + len(_CLOSE)


def boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` with balanced braces; None where there is none."""
    start = text.rfind(_BOX)
    if start == -1:
        return None
    depth = 1
    for place in range(start + len(_BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOX) : place].strip()
    return None


def announced(response: str) -> str:
    """What a lower-case response announces as its answer: boxed, tagged, then behind each of ``ANSWER_PHRASES``.

    A response that speaks of "boxed" without a whole ``\\boxed{}`` reads as the word "none", as it does at the source.
    """
    if "boxed" in response:
        response = boxed(response) or "none"
    elif _OPEN in response:
        response = tagged(response)
    for phrase in ANSWER_PHRASES:
        response = response.split(phrase)[-1]
    return response
