"""Validation inside a stage, without leaving its layout: loss on fixed rows, accuracy on fixed questions."""

from __future__ import annotations

import math

from megatron_medgpt.evaluate.command import sample
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.evaluate.score import score_answers
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.train.build import Parts, image_spec

PROTOCOL = "chat-likelihood"
"""The question as in training, each option as the answer; the lowest mean loss is the choice."""


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
        figures["option_accuracy"] = option_accuracy(parts, forward)
    return figures


def option_accuracy(parts: Parts, forward: LayoutForward) -> float:
    """Share of the stage's questions whose answer has the lowest mean loss among its options."""
    if parts.questions is None:
        task = sample(load_task("omnimedvqa", parts.stage.questions), parts.stage.num_questions)
        engine = LikelihoodEngine(
            forward, tokenizer=parts.tokenizer, image=image_spec(parts.config),
            sequence_length=parts.stage.sequence_length, num_rows=parts.stage.micro_batch_rows,
            reader=parts.config.image_reader,
        )  # fmt: skip
        parts.questions = (task, engine)  # kept for the stage: its pixels are decoded once
    task, engine = parts.questions
    answers = {answer.question_id: answer for answer in engine.answers(task.questions, PROTOCOL)}
    summary, _ = score_answers(task, answers, PROTOCOL)
    return summary["accuracy"]
