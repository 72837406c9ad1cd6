"""The letter protocol that today's medical leaderboards print: MedEvalKit's prompt and its order of parsing.

Source of the rules: ``utils/question_formats.py``, ``utils/utils.py`` (``judge_multi_choice``) and
``utils/OmniMedVQA/OmniMedVQA.py`` of that repository, restated here. Their oddities are kept, for without them the
number is another number: similarity is the last resort, and an output that shares nothing with any option counts as
option A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from string import ascii_lowercase, ascii_uppercase

from megatron_medgpt.evaluate.scorers.stated import announced, tagged


def letter_prompt(question: str, options: Sequence[str]) -> str:
    """The user's words of the letter protocol (not the reasoning mode)."""
    lines = "\n".join(lettered(options))
    return (
        f"\nQuestion: {question}\nOptions: \n{lines}\nAnswer with the option's letter from the given choices directly."
    )


def lettered(options: Sequence[str]) -> list[str]:
    """``A. first option``, ``B. second option``, ..."""
    return [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which option an output means under the letter protocol."""

    index: int
    stated: str
    """The few characters that were read as the answer."""
    by_similarity: bool
    """No letter was stated; the option most similar to the response was taken."""


def parse_choice(options: Sequence[str], output: str) -> Choice:
    """Read an output as the letter protocol does.

    The order: the ``<answer>`` tag; a first paragraph that is a letter, else a last paragraph that begins with a letter
    and a full stop; what the response announces (see ``stated.announced``); of that the text before the first full
    stop and behind its last colon, if it is a letter; else similarity of the response to ``a. option text``.
    """
    letters = ascii_lowercase[: len(options)]
    response = _paragraph_letter(tagged(output).lower(), letters)
    response = announced(response).strip().lower().replace("\n", "")
    stated = response.split(".")[0].split(":")[-1]
    if _is_letter(stated, letters):
        return Choice(index=letters.index(stated), stated=stated, by_similarity=False)
    ratios = [SequenceMatcher(None, choice.lower(), response).ratio() for choice in lettered(options)]
    nearest = max(range(len(ratios)), key=ratios.__getitem__)
    return Choice(index=nearest, stated=stated, by_similarity=True)


def judge_letter(options: Sequence[str], answer: str, output: str) -> bool:
    """Whether the output is right under the letter protocol.

    ``answer`` is the text of the right option (the last of equal ones). An answer that is not among the options is
    compared as it stands, so that hardly any output can meet it.
    """
    return means_answer(parse_choice(options, output), options, answer)


def means_answer(choice: Choice, options: Sequence[str], answer: str) -> bool:
    """``judge_letter`` for an output that is already read."""
    letters = ascii_lowercase[: len(options)]
    places = [i for i, option in enumerate(options) if option == answer]
    wanted = letters[places[-1]] if places else answer.strip().lower()
    return wanted in (choice.stated, letters[choice.index], lettered(options)[choice.index].lower())


def _paragraph_letter(response: str, letters: str) -> str:
    paragraphs = response.split("\n\n")
    last = paragraphs[-1].split(".")[0]
    if _is_letter(paragraphs[0], letters):
        return paragraphs[0]
    return last if _is_letter(last, letters) else response


def _is_letter(text: str, letters: str) -> bool:
    return len(text) == 1 and text in letters
