"""From verdicts to the evaluation file: counts, macro averages, tables, intervals.

Every question of the set is in every denominator. A question without an answer (no line, an engine's error, nothing
in the final channel) is wrong and counted in ``failed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_medgpt.evaluate.scorers import Verdict
from megatron_medgpt.evaluate.scorers.text import text_figures
from megatron_medgpt.evaluate.tasks.question import Question, Task

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_240
LONGEST_REASON, MOST_REASONS = 120, 8
DRAWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question with its answer and verdict; ``verdict`` is None where there was no answer."""

    question: Question
    output: str | None
    verdict: Verdict | None
    truncated: bool = False
    error: str | None = None
    option_losses: tuple[float, ...] | None = None

    @property
    def correct(self) -> bool:
        return self.verdict is not None and self.verdict.correct


def summarise(task: Task, protocol: str, items: Sequence[Item]) -> dict[str, Any]:
    """The evaluation file's figures for one set of answers (accuracies in 0..1, rounded to 6 places).

    ``accuracy`` follows the protocol's rule. ``accuracy_strict`` also counts as wrong what only the rule's last resort
    decided (``unparsed``). The interval resamples pictures, not questions: questions about one picture stand or fall
    together.
    """
    correct = np.array([item.correct for item in items], dtype=np.float64)
    unparsed = [item for item in items if item.verdict is not None and not item.verdict.parsed]
    by_modality = grouped(items, lambda item: item.question.modality)
    summary: dict[str, Any] = {
        "task": task.name,
        "protocol": protocol,
        "n": len(items),
        "correct": int(correct.sum()),
        "accuracy": rounded(correct.mean()),
        "macro_by_modality": rounded(np.mean([cell["accuracy"] for cell in by_modality.values()])),
        "by_modality": by_modality,
        "by_question_type": grouped(items, lambda item: item.question.question_type),
        "by_modality_and_question_type": {
            modality: grouped(
                [item for item in items if item.question.modality == modality], lambda item: item.question.question_type
            )
            for modality in by_modality
        },
        "by_dataset": grouped(items, lambda item: item.question.dataset),
        "unparsed": len(unparsed),
        "accuracy_strict": rounded((correct.sum() - sum(item.correct for item in unparsed)) / len(items)),
        "failed": sum(item.verdict is None for item in items),
        "truncated": sum(item.truncated for item in items),
        "ci95": bootstrap_interval(correct, [item.question.image_key for item in items]),
        "ci95_method": f"percentile bootstrap over pictures, {RESAMPLES} resamples",
        "chance": rounded(np.mean([1 / len(item.question.options) if item.question.options else 0 for item in items])),
        "problems": task.problem_counts,
        "controls": {},
    }
    scored = [item.verdict for item in items if item.verdict is not None and item.verdict.f1 is not None]
    if scored:
        summary["token_f1"] = rounded(sum(verdict.f1 or 0 for verdict in scored) / len(items))
        summary["token_recall"] = rounded(sum(verdict.recall or 0 for verdict in scored) / len(items))
    if summary["failed"]:
        summary["failed_reasons"] = _reasons(items)
    if protocol == "report":
        summary["text"] = text_figures([item.question.answer for item in items], [item.output for item in items])
    if task.notes:
        summary["notes"] = list(task.notes)
    return summary


def _reasons(items: Iterable[Item]) -> dict[str, int]:
    """Why questions have no answer, the most frequent first; the names of questions and files are taken out, a
    server's address is not."""
    reasons: dict[str, int] = {}
    for item in items:
        if item.verdict is None:
            words = str(item.error or "no answer").replace(item.question.question_id, "...")
            reason = re.sub(r"(?<!\S)(?!https?://)\S*/\S*", "FILE", words)[:LONGEST_REASON]
            reasons[reason] = reasons.get(reason, 0) + 1
    return dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_REASONS])


def grouped(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, dict[str, Any]]:
    """``{group: {n, correct, accuracy}}``, groups in alphabetical order."""
    counts: dict[str, list[int]] = {}
    for item in items:
        cell = counts.setdefault(key(item), [0, 0])
        cell[0] += 1
        cell[1] += item.correct
    return {
        name: {"n": n, "correct": right, "accuracy": rounded(right / n)} for name, (n, right) in sorted(counts.items())
    }


def bootstrap_interval(correct: np.ndarray, clusters: Sequence[str], *, level: float = 0.95) -> list[float]:
    """Percentile interval of the mean of ``correct`` (n,), resampling whole clusters with a fixed seed."""
    numbers: dict[str, int] = {}
    cluster_of = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    right = np.bincount(cluster_of, weights=correct)
    size = np.bincount(cluster_of)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    means: list[float] = []
    at_once = max(1, DRAWS_AT_ONCE // len(size))
    while len(means) < RESAMPLES:
        drawn = random.integers(0, len(size), (min(at_once, RESAMPLES - len(means)), len(size)))
        means += (right[drawn].sum(1) / size[drawn].sum(1)).tolist()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [rounded(low), rounded(high)]


def rounded(value: float) -> float:
    return round(float(value), 6)
