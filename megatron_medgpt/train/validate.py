"""Validation inside a stage, without leaving its layout: loss on fixed rows, accuracy on fixed questions."""

from __future__ import annotations

import math

from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.command import sample
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.evaluate.score import score_answers
from megatron_medgpt.evaluate.scorers import check_protocol
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.train.build import Parts, image_spec


def validate(parts: Parts) -> dict[str, float]:
    """Figures of the stage's validation data and questions, equal on every rank. Collective.

    The rows are the first ``validation_rows`` of the validation blend, rounded up to whole micro-batches, the same
    ones every time.
    """
    forward = LayoutForward(parts.chunks, parts.groups, parts.device)
    figures: dict[str, float] = {}
    if parts.validation is not None:
        per_round = parts.stage.micro_batch_rows * parts.layout.data
        rounds = max(1, math.ceil(parts.stage.validation_rows / per_round))
        losses = forward.mean_loss([parts.read(parts.validation, 0, i) for i in range(rounds)])
        figures["validation_loss"] = losses
        figures["validation_ppl"] = math.exp(min(losses, 50.0))
    if parts.stage.questions is not None:
        figures |= option_figures(parts, forward)
    return figures


def option_figures(parts: Parts, forward: LayoutForward) -> dict[str, float]:
    """Share of the stage's questions whose answer has the lowest mean loss among its options, of all and of every
    modality and kind; and the mean loss (nats a token) of the right options that were scored."""
    protocol = parts.stage.question_protocol
    if parts.questions is None:
        whole = load_task(parts.stage.question_task, parts.stage.questions)
        check_protocol(protocol, whole.questions)
        engine = LikelihoodEngine(
            forward, tokenizer=parts.tokenizer, image=image_spec(parts.config),
            sequence_length=parts.stage.sequence_length, num_rows=parts.stage.micro_batch_rows,
            source=PixelSource(image_spec(parts.config), parts.config.image_reader, device=parts.device),
        )  # fmt: skip
        parts.questions = (sample(whole, parts.stage.num_questions), engine)  # its pixels are decoded once a stage
    task, engine = parts.questions
    answers = {answer.question_id: answer for answer in engine.answers(task.questions, protocol)}
    summary, items = score_answers(task, answers, protocol)
    right = [
        item.option_losses[item.question.answer_index]
        for item in items
        if item.option_losses is not None and item.question.answer_index is not None
    ]
    figures = {"option_accuracy": summary["accuracy"], "option_failed": float(summary["failed"])}
    figures["option_loss"] = sum(right) / len(right) if right else math.nan
    for table in ("by_modality", "by_question_type"):
        figures |= {f"option_accuracy/{name}": cell["accuracy"] for name, cell in summary[table].items()}
    return figures
