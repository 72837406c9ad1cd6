"""Open and yes/no questions (VQA-RAD, SLAKE, PathVQA) as MedEvalKit scores them, with token recall beside.

Closed yes/no: right when exactly one of the two words occurs and it is the answer. Other closed questions: equal after
dropping line breaks and full stops. Open: exact match, and F1 over the *sets* of white-space tokens. Everything is
lower-cased; answers announced by ``\\boxed{}``, ``<answer>`` or a phrase are cut out first. Two slips of the source are
mended (its issue 30): the space that "answer is" leaves in front no longer spoils an exact match, and SLAKE's
capitalised "Yes" is a yes/no question. ``recall`` is the open-set figure of LLaVA-Med's paper: the share of the
reference's tokens that the output contains.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medgpt.evaluate.scorers.stated import announced, boxed, tagged


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortScore:
    correct: bool
    f1: float
    recall: float


def short_prompt(question: str, answer: str, *, closed: bool) -> str:
    """The user's words, in MedEvalKit's form for the kind of question (yes/no, other closed, open)."""
    if answer.strip().lower() in ("yes", "no"):
        return f"{question}\nPlease output 'yes' or 'no'(no extra output)."
    if closed:
        return f"{question}\nAnswer the question using a single word or phrase."
    return f"{question}\nPlease answer the question concisely."


def score_short(answer: str, output: str, *, closed: bool) -> ShortScore:
    """Score one answer. ``closed`` says that the set marks the question as closed."""
    reference = answer.strip().lower()
    response = announced((boxed(output) or tagged(output)).strip().lower()).strip()
    plain = response.replace("\n", "").replace(".", "")
    f1, recall = token_f1(reference, response)
    if reference in ("yes", "no"):
        correct = (("yes" in plain) != ("no" in plain)) and reference in plain
    elif closed:
        correct = plain == reference
    else:
        correct = response == reference
    return ShortScore(correct=correct, f1=f1, recall=recall)


def token_f1(reference: str, response: str) -> tuple[float, float]:
    """(F1, recall) over the sets of white-space tokens; both empty is 1, one empty is 0."""
    wanted, given = set(reference.split()), set(response.split())
    if not wanted or not given:
        return (1.0, 1.0) if wanted == given else (0.0, 0.0)
    common = len(wanted & given)
    if common == 0:
        return 0.0, 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall), recall
