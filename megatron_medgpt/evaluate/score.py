"""Score recorded answers: the function behind ``medgpt score``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.paired import compare_with, items_path
from megatron_medgpt.evaluate.predictions import Prediction, read_predictions
from megatron_medgpt.evaluate.result import Item, summarise
from megatron_medgpt.evaluate.scorers import LIKELIHOOD, check_protocol, default_protocol, judge_losses, judge_text
from megatron_medgpt.evaluate.scorers.harmony import final_channel
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.evaluate.tasks.question import Question, Task
from megatron_medgpt.observe.whole import write_whole


def score(
    task: str, data_dir: Path | str, predictions: Path | str, protocol: str | None = None,
    out: Path | str | None = None, *, against: Path | str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a predictions file against a set and return the evaluation file's content.

    With ``out``, writes it there, and one line per question beside it (``NAME.items.jsonl``, for paired tests). With
    ``against``, another evaluation file of the same task and protocol, adds ``paired``: that run first, this second.

    Raises:
        UsageError: unknown task or protocol, a folder that is not the set's, an empty predictions file, or one of which
            no id belongs to the set; ``against`` is of another task or protocol, or of other questions.
    """
    loaded = load_task(task, data_dir, check_images=False)
    answers, repeated = read_predictions(predictions)
    known = {question.question_id for question in loaded.questions}
    unknown = sorted(answers.keys() - known)
    if len(unknown) == len(answers):
        raise UsageError(
            f"{predictions}: none of its {len(answers)} question ids is in {data_dir}; first: {unknown[0]!r}, "
            f"the set has e.g. {loaded.questions[0].question_id!r}"
        )
    if out is not None:
        refuse_folder(out)
    protocol = protocol or default_protocol(loaded.questions)
    check_protocol(protocol, loaded.questions)
    if protocol not in LIKELIHOOD and all(a.text is None and a.option_losses for a in answers.values()):
        raise UsageError(
            f"{predictions} holds option losses and no text, which --protocol {protocol} needs; "
            f"allowed: {', '.join(sorted(LIKELIHOOD))}"
        )
    summary, items = score_answers(loaded, answers, protocol)
    summary["predictions"] = {
        "file": Path(predictions).name, "given": len(answers),
        "unknown_ids": len(unknown), "unknown_examples": unknown[:3],
        "repeated_ids": repeated, "missing": len(known - answers.keys()),
    }  # fmt: skip
    if against is not None:
        summary["paired"] = compare_with(against, summary, {item.question.question_id: item.correct for item in items})
    if out is not None:
        write_result(out, summary, items)
    return summary


def score_answers(
    task: Task, answers: Mapping[str, Prediction], protocol: str | None = None
) -> tuple[dict[str, Any], list[Item]]:
    """The figures and the items for answers already in memory; the protocol defaults to the set's usual one."""
    protocol = protocol or default_protocol(task.questions)
    check_protocol(protocol, task.questions)
    items = [judge(protocol, question, answers.get(question.question_id)) for question in task.questions]
    return summarise(task, protocol, items), items


def judge(protocol: str, question: Question, prediction: Prediction | None) -> Item:
    """One question, one answer. Nothing answered, whatever the reason, is an item without verdict: wrong and failed.

    (MedEvalKit would credit an empty output as option A, the official scorer's runners drop failed questions from the
    denominator; here neither happens.)
    """
    if prediction is None:
        return Item(question=question, output=None, verdict=None, error="no prediction")
    if prediction.error is not None:
        return Item(question=question, output=prediction.text, verdict=None, error=prediction.error)
    if protocol in LIKELIHOOD:
        return _judge_likelihood(question, prediction)
    if prediction.text is None:
        return Item(question=question, output=None, verdict=None, error="no text")
    answer = final_channel(prediction.text)
    if answer is None or not answer.strip():
        error = "no final channel" if answer is None else "empty answer"
        return Item(
            question=question, output=prediction.text, verdict=None, error=error, truncated=prediction.truncated
        )
    return Item(
        question=question, output=answer, verdict=judge_text(protocol, question, answer), truncated=prediction.truncated
    )


def _judge_likelihood(question: Question, prediction: Prediction) -> Item:
    losses = prediction.option_losses
    if losses is None or len(losses) != len(question.options):
        found = (
            "no option_losses" if losses is None else f"{len(losses)} option_losses for {len(question.options)} options"
        )
        return Item(question=question, output=prediction.text, verdict=None, error=found)
    verdict = judge_losses(question, losses)
    text = question.options[verdict.choice] if verdict.choice is not None else None
    return Item(question=question, output=text, verdict=verdict, option_losses=losses)


def write_result(out: Path | str, summary: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write the evaluation file, and its items beside it; each appears whole or not at all."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_id": item.question.question_id,
            "correct": item.correct,
            "prediction": item.output,
            "answer": item.question.answer,
            **({"option_losses": item.option_losses} if item.option_losses is not None else {}),
            **({"error": item.error} if item.error is not None else {}),
        }
        for item in items
    ]
    write_whole(items_path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(out, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def refuse_folder(out: Path | str) -> None:
    """Raise UsageError where an evaluation file cannot be written: its name is a folder's, its folder's a file's, or
    nothing may be written there."""
    out = Path(out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file in it, e.g. {out / 'evaluation.json'}")
    there = next(place for place in out.absolute().parents if place.exists())
    if not there.is_dir():
        raise UsageError(f"--out {out}: {there} is a file; name a file in a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: no permission to write in {there}; name a file in another folder")
