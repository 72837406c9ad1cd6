"""OmniMedVQA (Hu et al., CVPR 2024): the folder of its release, and of everything written in its format.

``QA_information/Open-access/*.json`` holds one array per source dataset; ``gt_answer`` is the *text* of an option,
options C and D may be absent, ``image_path`` is relative to the folder. The restricted-access part has questions
without images (Multi-Modality-Arena issues 20 and 22) and is not read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.question import Problem, Question, Task, make_task
from megatron_medgpt.evaluate.tasks.table import read_rows, text_field

QUESTIONS = Path("QA_information") / "Open-access"
OPTIONS = ("option_A", "option_B", "option_C", "option_D")

OPEN_ACCESS_BY_MODALITY = {
    "CT(Computed Tomography)": 15_808, "MR (Mag-netic Resonance Imaging)": 31_877, "X-Ray": 7_916,
    "ultrasound": 10_991, "Dermoscopy": 6_679, "Fundus Photography": 5_398,
    "OCT (Optical Coherence Tomography": 4_646, "Microscopy Images": 5_680,
}  # fmt: skip
"""Questions of the open-access part by modality (Med-R1, arXiv 2503.13939, table of the set; names as the files spell
them). They add up to one less than the total below, which is the published count."""
OPEN_ACCESS_BY_TYPE = {
    "Anatomy Identification": 16_448, "Disease Diagnosis": 55_387, "Lesion Grading": 2_098,
    "Modality Recognition": 11_565, "Other Biological Attributes": 3_498,
}  # fmt: skip
"""By question type, from the same table; they add up to the total."""
OPEN_ACCESS_TOTAL = 88_996
"""Questions of the open-access part (Lingshu's evaluation counts the same)."""
_LOG = logging.getLogger("megatron_medgpt.evaluate")


def load_omnimedvqa(folder: Path, *, name: str = "omnimedvqa", check_images: bool = True) -> Task:
    """Read a folder in OmniMedVQA's layout.

    Raises:
        UsageError: the layout is not there, or an entry misses a field; names the file and the entry.
    """
    files = sorted((folder / QUESTIONS).glob("*.json"))
    if not files:
        raise UsageError(
            f"{folder}: no {QUESTIONS}/*.json; --data must be the folder that holds QA_information and Images"
        )
    questions: list[Question] = []
    outside: list[Problem] = []
    for path in files:
        for number, row in enumerate(read_rows(path)):
            where = f"{path} entry {number}"
            relative = text_field(row, ("image_path",), where)
            question_id = text_field(row, ("question_id",), where)
            image = folder / relative if _stays_inside(relative) else None
            if image is None:
                outside.append(Problem(kind="image_outside_folder", question_id=question_id, detail=relative))
            questions.append(
                Question(
                    question_id=question_id,
                    question=text_field(row, ("question",), where),
                    answer=text_field(row, ("gt_answer",), where),
                    options=tuple(str(row[key]) for key in OPTIONS if row.get(key) is not None),
                    image=image,
                    modality=text_field(row, ("modality_type",), where, default="unknown"),
                    question_type=text_field(row, ("question_type",), where, default="unknown"),
                    dataset=text_field(row, ("dataset",), where, default=path.stem),
                )
            )
    task = make_task(name, folder, questions, check_images=check_images)
    # Training watches its phantoms through this reader by the set's own name; those are not meant to be the real set.
    phantoms = name == "phantoms" or all(question.dataset.startswith("Phantom") for question in questions)
    notes = () if phantoms else tuple(count_differences(questions))
    if notes:
        _LOG.warning("%s is not the published open-access part: %s", folder, "; ".join(notes))
    return Task(name=name, questions=task.questions, problems=task.problems + tuple(outside), notes=notes)


def count_differences(questions: Sequence[Question]) -> list[str]:
    """Where a set differs from the published counts of the open-access part, one sentence per total, modality or type.

    Figures on a part of the set are not the figures that others print. The one question by which the published table of
    modalities falls short of the published total is allowed for.
    """
    found = [] if len(questions) == OPEN_ACCESS_TOTAL else [_differs("questions", len(questions), OPEN_ACCESS_TOTAL)]
    found += _differences((_folded(q.modality) for q in questions), OPEN_ACCESS_BY_MODALITY, slack=1)
    return found + _differences((_folded(q.question_type) for q in questions), OPEN_ACCESS_BY_TYPE, slack=0)


def _differences(names: Iterable[str], published: Mapping[str, int], *, slack: int) -> list[str]:
    counts = Counter(names)
    found = [
        _differs(name, counts.get(_folded(name), 0), number)
        for name, number in published.items() if not number <= counts.get(_folded(name), 0) <= number + slack
    ]  # fmt: skip
    known = {_folded(name) for name in published}
    return found + [
        f"{count:,} of {name!r}, which is not in the table" for name, count in counts.items() if name not in known
    ]


def _differs(name: str, found: int, published: int) -> str:
    return f"{found:,} {name}, published {published:,}"


def _folded(name: str) -> str:
    """Letters and digits in lower case: files and tables differ in case, blanks and a bracket that is never closed."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _stays_inside(relative: str) -> bool:
    path = PurePosixPath(relative.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts
