"""What every reader of an evaluation set hands out: questions, and the problems found in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_medgpt.config.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about one image. ``options`` is empty for an open question."""

    question_id: str
    question: str
    answer: str
    """Text of the right option, or the reference answer of an open question."""
    options: tuple[str, ...] = ()
    image: Path | bytes | None = field(default=None, repr=False)
    """Path of the image file, or its encoded bytes where the set stores them in a table; None without image."""
    modality: str = "unknown"
    question_type: str = "unknown"
    dataset: str = ""

    @property
    def answer_index(self) -> int | None:
        """Place of the answer among the options; None when it is not one of them (then no answer is right).

        The last place where options repeat, as the letter protocol counts it (MedEvalKit ``construct_messages``).
        """
        places = [i for i, option in enumerate(self.options) if option == self.answer]
        return places[-1] if places else None

    @property
    def image_key(self) -> str:
        """Equal for questions about the same picture; the resampling unit of the bootstrap."""
        if isinstance(self.image, bytes):
            return f"bytes:{hash(self.image)}"
        return str(self.image) if self.image is not None else f"question:{self.question_id}"

    def image_bytes(self) -> bytes:
        """Encoded bytes of the image (JPEG, PNG).

        Raises:
            UsageError: the question has no image, or its file cannot be read.
        """
        if self.image is None:
            raise UsageError(f"question {self.question_id} has no image")
        if isinstance(self.image, bytes):
            return self.image
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise UsageError(
                f"question {self.question_id}: image {self.image} cannot be read: {error.strerror}"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something wrong with one question of a set. The question stays in the denominator."""

    kind: str
    """``answer_not_among_options``, ``repeated_id``, ``missing_image``, ``image_outside_folder``,
    ``repeated_option``, ``option_count`` or ``empty_reference``."""
    question_id: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An evaluation set as it was read: every question of the files, in order, and what is wrong with them."""

    name: str
    questions: tuple[Question, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    """What is odd about the set as a whole, in sentences: counts that are not the published ones."""

    @property
    def problem_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for problem in self.problems:
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
        return counts


def make_task(name: str, source: Path, questions: list[Question], *, check_images: bool = True) -> Task:
    """Check the questions of a set and give repeated ids a suffix, so that every question can be answered.

    A repeated id becomes ``id#2``, ``id#3``, ... in file order: nothing leaves the denominator. Scoring recorded
    predictions needs no images (``check_images=False``).

    Raises:
        UsageError: there is no question at all.
    """
    if not questions:
        raise UsageError(f"{source}: no questions found for task {name}; is this the folder of that set?")
    problems: list[Problem] = []
    unique: list[Question] = []
    seen: dict[str, int] = {}
    present: dict[Path, bool] = {}
    for question in questions:
        seen[question.question_id] = times = seen.get(question.question_id, 0) + 1
        if times > 1:
            problems.append(_problem("repeated_id", question, f"occurrence {times}"))
            question = _renamed(question, f"{question.question_id}#{times}")
        unique.append(question)
        problems.extend(_option_problems(question))
        if check_images and isinstance(question.image, Path):
            if question.image not in present:
                present[question.image] = question.image.is_file()
            if not present[question.image]:
                problems.append(_problem("missing_image", question, str(question.image)))
    return Task(name=name, questions=tuple(unique), problems=tuple(problems))


def _option_problems(question: Question) -> list[Problem]:
    if not question.options:
        return []
    found = []
    if len(question.options) < 2:
        found.append(_problem("option_count", question, f"{len(question.options)} option"))
    if len(set(question.options)) != len(question.options):
        found.append(_problem("repeated_option", question, " | ".join(question.options)))
    if question.answer not in question.options:
        found.append(_problem("answer_not_among_options", question, f"{question.answer!r}"))
    return found


def _problem(kind: str, question: Question, detail: str) -> Problem:
    return Problem(kind=kind, question_id=question.question_id, detail=detail)


def _renamed(question: Question, question_id: str) -> Question:
    return Question(
        question_id=question_id, question=question.question, answer=question.answer, options=question.options,
        image=question.image, modality=question.modality, question_type=question.question_type,
        dataset=question.dataset,
    )  # fmt: skip
