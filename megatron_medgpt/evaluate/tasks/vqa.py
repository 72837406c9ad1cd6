"""VQA-RAD, SLAKE, PathVQA and PMC-VQA in the layouts in which their authors and mirrors publish them."""

from __future__ import annotations

from pathlib import Path

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.question import Question, Task, make_task
from megatron_medgpt.evaluate.tasks.table import image_field, one_file, read_rows, text_field

CLOSED, OPEN = "closed", "open"


def load_vqa_rad(folder: Path, *, check_images: bool = True) -> Task:
    """VQA-RAD's test split: the OSF release (one JSON with ``qid``, ``phrase_type``, ``image_name``; the test split is
    every ``test_*`` phrase type) or the mirror's Parquet (image, question, answer)."""
    shards = _parquet_shards(folder, "test")
    if shards:
        return _load_parquet("vqa-rad", folder, shards, check_images)
    names = ["VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json", "testset.json", "test.json"]
    path = one_file(folder, names)
    images = _existing(folder, "VQA_RAD Image Folder", "images", "imgs")
    questions = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} entry {number}"
        if "phrase_type" in row and not str(row["phrase_type"]).startswith("test"):
            continue
        answer = text_field(row, ("answer",), where)
        questions.append(
            Question(
                question_id=text_field(row, ("qid", "question_id"), where),
                question=text_field(row, ("question",), where),
                answer=answer,
                image=image_field(row.get("image_name", row.get("image")), images),
                modality=text_field(row, ("image_organ",), where, default="unknown"),
                question_type=text_field(row, ("answer_type",), where, default=_kind(answer)).strip().lower(),
                dataset="VQA-RAD",
            )
        )
    return make_task("vqa-rad", path, questions, check_images=check_images)


def load_slake(folder: Path, *, check_images: bool = True, language: str | None = "en") -> Task:
    """SLAKE's ``test.json`` with ``imgs/``. English questions only unless ``language`` is None (then both)."""
    path = one_file(folder, ["test.json", "test.jsonl"])
    images = _existing(folder, "imgs", "images")
    questions = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} entry {number}"
        if language is not None and row.get("q_lang", language) != language:
            continue
        answer = text_field(row, ("answer",), where)
        questions.append(
            Question(
                question_id=text_field(row, ("qid",), where),
                question=text_field(row, ("question",), where),
                answer=answer,
                image=image_field(row.get("img_name"), images),
                modality=text_field(row, ("modality",), where, default="unknown"),
                question_type=text_field(row, ("answer_type",), where, default=_kind(answer)).lower(),
                dataset="SLAKE",
            )
        )
    return make_task("slake", path, questions, check_images=check_images)


def load_path_vqa(folder: Path, *, check_images: bool = True) -> Task:
    """PathVQA's test split: the mirror's Parquet, or a table ``test.*`` with image, question and answer."""
    shards = _parquet_shards(folder, "test")
    if shards:
        return _load_parquet("path-vqa", folder, shards, check_images)
    path = one_file(folder, ["test.json", "test.jsonl", "test.csv"])
    images = _existing(folder, "images/test", "images", "imgs")
    questions = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path} entry {number}"
        answer = text_field(row, ("answer",), where)
        name = text_field(row, ("image",), where)
        questions.append(
            Question(
                question_id=text_field(row, ("question_id", "qid"), where, default=f"path-vqa_{number:06d}"),
                question=text_field(row, ("question",), where),
                answer=answer,
                image=images / (name if Path(name).suffix else f"{name}.jpg"),
                question_type=_kind(answer),
                modality="Microscopy Images",
                dataset="PathVQA",
            )
        )
    return make_task("path-vqa", path, questions, check_images=check_images)


def load_pmc_vqa(folder: Path, *, version: int = 1, check_images: bool = True) -> Task:
    """PMC-VQA's test split: version 1 is ``test.csv`` (or the cleaned ``test_clean.csv``) with ``images/``, version 2
    (compound figures taken apart) is ``test_2.csv`` with ``figures/``. Options come as `` A:text ``; the letter and the
    colon are taken off."""
    path = one_file(folder, ["test_2.csv"] if version == 2 else ["test_clean.csv", "test.csv"])
    images = _existing(folder, *(("figures", "images_2", "images") if version == 2 else ("images",)))
    questions = []
    for number, row in enumerate(read_rows(path)):
        row = {key.strip().lower().replace(" ", "_"): value for key, value in row.items() if key is not None}
        where = f"{path} entry {number}"
        options = [text_field(row, (f"choice_{c}", f"choice{c}"), where) for c in "abcd"]
        options = [_without_letter(option, letter) for option, letter in zip(options, "ABCD")]
        answer = text_field(row, ("answer_label", "answer"), where).strip()
        if len(answer) == 1 and answer in "ABCD":
            answer = options["ABCD".index(answer)]
        questions.append(
            Question(
                question_id=text_field(row, ("index",), where, default=f"{number:06d}") or f"{number:06d}",
                question=text_field(row, ("question",), where).strip(),
                answer=_without_letter(answer, "ABCD"),
                options=tuple(options),
                image=image_field(text_field(row, ("figure_path",), where).strip(), images),
                dataset=f"PMC-VQA v{version}",
            )
        )
    return make_task(f"pmc-vqa-v{version}", path, questions, check_images=check_images)


def _load_parquet(name: str, folder: Path, shards: list[Path], check_images: bool) -> Task:
    questions = []
    for path in shards:
        for number, row in enumerate(read_rows(path)):
            where = f"{path} entry {number}"
            answer = text_field(row, ("answer",), where)
            questions.append(
                Question(
                    question_id=f"{name}_{len(questions):06d}",
                    question=text_field(row, ("question",), where),
                    answer=answer,
                    image=image_field(row.get("image"), folder),
                    question_type=_kind(answer),
                    modality="Microscopy Images" if name == "path-vqa" else "unknown",
                    dataset=name,
                )
            )
    return make_task(name, folder, questions, check_images=check_images)


def _parquet_shards(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    return sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"data/{split}*.parquet")])


def _existing(folder: Path, *names: str) -> Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def _kind(answer: str) -> str:
    return CLOSED if answer.strip().lower() in ("yes", "no") else OPEN


def _without_letter(option: str, letters: str) -> str:
    text = option.strip()
    return text[2:].strip() if len(text) > 1 and text[0] in letters and text[1] == ":" else text
