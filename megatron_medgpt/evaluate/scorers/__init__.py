"""Protocols by name: what the user is told, and what counts as right. Pure functions of text.

A protocol is a pair of a prompt and a rule; a number without its protocol means nothing. Published OmniMedVQA figures
are mostly ``letter``; the benchmark's own are ``official-qa`` and ``official-prefix``. ``chat-likelihood`` is this
project's: the option with the lowest mean cross-entropy as the assistant's answer to the bare question, in the chat
form the model was trained on; it has no published figures and is what training watches. ``report`` is for written
reports: its figures are BLEU and ROUGE over the whole set (``scorers.text``), its accuracy the share of exact matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.scorers.letter import letter_prompt, means_answer, parse_choice
from megatron_medgpt.evaluate.scorers.official import lowest_loss, most_similar, prefix_prompt, qa_prompt
from megatron_medgpt.evaluate.scorers.short import score_short, short_prompt
from megatron_medgpt.evaluate.scorers.text import written
from megatron_medgpt.evaluate.tasks.question import Question

GENERATIVE = ("official-qa", "letter", "short-answer", "report")
LIKELIHOOD = ("official-prefix", "chat-likelihood")
PROTOCOLS = GENERATIVE + LIKELIHOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a protocol makes of one answer."""

    correct: bool
    parsed: bool
    """False when the rule's last resort decided (similarity in ``letter``), or nothing could be read at all."""
    choice: int | None = None
    """Place of the option that was taken."""
    f1: float | None = None
    recall: float | None = None


def check_protocol(protocol: str, questions: Sequence[Question]) -> None:
    """Raise UsageError unless the protocol exists and fits the questions (options or none)."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol {protocol!r} is unknown; allowed: {', '.join(PROTOCOLS)}")
    reports = sum(question.question_type == "report" for question in questions)
    if reports and protocol != "report":
        raise UsageError(f"protocol {protocol} does not score written reports ({reports} here); use --protocol report")
    if protocol == "report" and reports < len(questions):
        raise UsageError(f"protocol report needs a set of reports; {len(questions) - reports} questions are none")
    if protocol in ("short-answer", "report"):
        return
    without = sum(not question.options for question in questions)
    if without:
        raise UsageError(
            f"protocol {protocol} needs options, and {without} of {len(questions)} questions have none; "
            "use --protocol short-answer"
        )


def default_protocol(questions: Sequence[Question]) -> str:
    """``letter`` for multiple choice, ``short-answer`` for open questions, ``report`` for written reports."""
    if questions[0].question_type == "report":
        return "report"
    return "letter" if all(question.options for question in questions) else "short-answer"


def prompt(protocol: str, question: Question) -> str:
    """The user's words, without the image."""
    if protocol == "official-qa":
        return qa_prompt(question.question, question.options)
    if protocol == "letter":
        return letter_prompt(question.question, question.options)
    if protocol == "official-prefix":
        return prefix_prompt(question.question)
    if protocol in ("chat-likelihood", "report"):
        return question.question
    return short_prompt(question.question, question.answer, closed=question.question_type == "closed")


def judge_text(protocol: str, question: Question, output: str) -> Verdict:
    """Score the final channel of a generated answer under a generative protocol.

    ``short-answer`` on a multiple-choice question compares with the text of the right option.
    """
    if protocol == "official-qa":
        choice = most_similar(question.options, output)
        correct = choice is not None and question.options[choice] == question.answer
        return Verdict(correct=correct, parsed=choice is not None, choice=choice)
    if protocol == "letter":
        parsed = parse_choice(question.options, output)
        correct = means_answer(parsed, question.options, question.answer)
        return Verdict(correct=correct, parsed=not parsed.by_similarity, choice=parsed.index)
    if protocol == "short-answer":
        score = score_short(question.answer, output, closed=question.question_type == "closed")
        return Verdict(correct=score.correct, parsed=bool(output.strip()), f1=score.f1, recall=score.recall)
    if protocol == "report":
        return Verdict(correct=written(output) == written(question.answer), parsed=True)
    raise UsageError(f"protocol {protocol} scores option losses, not text; give option_losses in the predictions")


def judge_losses(question: Question, option_losses: Sequence[float]) -> Verdict:
    """Score mean cross-entropies (nats), one per option in order, under a likelihood protocol."""
    choice = lowest_loss(option_losses) if len(option_losses) == len(question.options) else None
    correct = choice is not None and question.options[choice] == question.answer
    return Verdict(correct=correct, parsed=choice is not None, choice=choice)
