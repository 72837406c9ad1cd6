"""Evaluate an engine on a set: answers, controls, result. The function behind ``medgpt eval``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.controls import apply_control
from megatron_medgpt.evaluate.engine import Engine
from megatron_medgpt.evaluate.predictions import AnswerFile, Prediction, read_predictions
from megatron_medgpt.evaluate.result import Item
from megatron_medgpt.evaluate.score import score_answers, write_result
from megatron_medgpt.evaluate.scorers import check_protocol, default_protocol
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.evaluate.tasks.question import Question, Task

DEFAULT_CONTROLS = ("blank_image", "shuffled_image")


def run_eval(
    task: str | Task,
    data_dir: Path | str,
    out: Path | str,
    *,
    engine: Engine,
    protocol: str | None = None,
    controls: Sequence[str] = DEFAULT_CONTROLS,
    limit: int | None = None,
    writes: bool = True,
    report: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[Item]]:
    """Answer every question, then again under each control, and write the evaluation file ``out``.

    Beside ``NAME.json`` stand ``NAME.answers.jsonl`` (and one per control), written as answers come: the same call
    after a kill answers only what is missing. With several ranks all of them call this, the engine's ``answers`` yields
    the same on each, rank 0 has ``writes=True`` and says what is answered already (``engine.from_first_rank``).
    ``limit`` takes an evenly spread sample. ``report(what, done, total)`` is called as answers come. The blank picture
    has the mean colour of the engine's own encoder where the engine knows it (``engine.image``), CLIP's otherwise.

    Returns the evaluation file's content and the items without control.

    Raises:
        UsageError: unknown names, a folder that is not the set's, an answers file of another model or set.
    """
    task = load_task(task, data_dir) if isinstance(task, str) else task
    if limit is not None:
        task = sample(task, limit)
    protocol = protocol or default_protocol(task.questions)
    check_protocol(protocol, task.questions)
    spec = getattr(engine, "image", None)
    blank = {} if spec is None else {"mean": spec.mean, "size_px": spec.size_px}
    controlled = {name: apply_control(task.questions, name, **blank) for name in controls}
    out = Path(out)
    results = {}
    for name, questions in {"": list(task.questions), **controlled}.items():
        answers = _answers(engine, questions, protocol, out, name, writes, report)
        results[name] = score_answers(task, answers, protocol)
    summary, items = results.pop("")
    summary["engine"] = engine.description
    summary["settings"] = _settings(engine, protocol)
    summary["controls"] = {name: control["accuracy"] for name, (control, _) in results.items()}
    summary["controls_ci95"] = {name: control["ci95"] for name, (control, _) in results.items()}
    summary["controls_failed"] = {name: control["failed"] for name, (control, _) in results.items()}
    if writes:
        write_result(out, summary, items)
    return summary, items


def sample(task: Task, limit: int) -> Task:
    """``limit`` questions of a set, evenly spread over its order, the same ones every time."""
    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    n = len(task.questions)
    if limit >= n:
        return task
    places = [i * n // limit for i in range(limit)]
    questions = tuple(task.questions[place] for place in places)
    kept = {question.question_id for question in questions}
    problems = tuple(problem for problem in task.problems if problem.question_id in kept)
    return Task(name=task.name, questions=questions, problems=problems)


def _answers(
    engine: Engine,
    questions: Sequence[Question],
    protocol: str,
    out: Path,
    control: str,
    writes: bool,
    report: Callable[[str, int, int], None] | None,
) -> dict[str, Prediction]:
    path = out.with_suffix(f".{control}.answers.jsonl" if control else ".answers.jsonl")
    begun: tuple[dict[str, Prediction], str | None] = ({}, None)
    with ExitStack() as opened:
        file = None
        if writes:
            file, before, refused = _begun(path, _identity(engine, questions, protocol, control), opened)
            begun = (before, refused)
        answers, refusal = getattr(engine, "from_first_rank", _as_it_is)(begun)
        if refusal is not None:
            raise UsageError(refusal)
        answers = dict(answers)
        open_questions = [q for q in questions if q.question_id not in answers or answers[q.question_id].error]
        for prediction in engine.answers(open_questions, protocol):
            if file is not None:
                file.write([prediction])
            answers[prediction.question_id] = prediction
            if file is not None and report is not None:
                report(control or "questions", len(answers), len(questions))
    return answers


def _as_it_is(value: Any) -> Any:
    return value


def _settings(engine: Engine, protocol: str) -> dict[str, Any]:
    return engine.settings(protocol) if hasattr(engine, "settings") else {}


def _identity(engine: Engine, questions: Sequence[Question], protocol: str, control: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.question_id, question.question, question.options]).encode())
    return {
        "engine": engine.description, "settings": _settings(engine, protocol), "protocol": protocol,
        "control": control, "questions_sha256": digest.hexdigest(),
    }  # fmt: skip


def _other_than(path: Path, key: str, begun: Any, now: Any) -> str:
    what = {"engine": "another model", "questions_sha256": "other questions (--data, --limit)"}.get(
        key, f"another {key}"
    )
    values = "" if key == "questions_sha256" else f" ({begun}, now {now})"
    return f"{path} was begun with {what}{values}; remove it or give another --out"


def _begun(
    path: Path, identity: dict[str, Any], opened: ExitStack
) -> tuple[AnswerFile | None, dict[str, Prediction], str | None]:
    """The file of answers, what was answered before, or why it must not be continued: another model or another set
    began it, or another process writes it."""
    note = path.with_suffix(".json")
    try:
        file = opened.enter_context(AnswerFile(path))
        if path.stat().st_size and note.exists():
            begun = json.loads(note.read_text(encoding="utf-8"))
            apart = [key for key in identity if begun.get(key) != identity[key]]
            if apart:
                return None, {}, _other_than(path, apart[0], begun.get(apart[0]), identity[apart[0]])
        else:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        return file, read_predictions(path, resuming=True)[0], None
    except UsageError as error:
        return None, {}, str(error)
    except (OSError, ValueError) as error:
        return None, {}, f"{path} cannot be continued ({error}); remove it and {note.name}, or give another --out"
