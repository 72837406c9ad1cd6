"""The audit: training datasets against evaluation sets, pictures and texts, with lists that ingest and report use.

``leakage.json`` holds the counts, the questions concerned and pairs of pictures to look at (``observe.report`` shows
them); ``exclude.jsonl`` one line per training sample to leave out (``stages.*.exclude``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.manifest import TOKENIZER
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.leakage.hashes import Hashes, hash_dataset, hash_questions
from megatron_medgpt.evaluate.leakage.nearest import pairs_within
from megatron_medgpt.evaluate.leakage.ngrams import TextIndex
from megatron_medgpt.evaluate.leakage.pairs import picture_pairs, text_pairs
from megatron_medgpt.evaluate.tasks.question import Question, Task
from megatron_medgpt.observe.whole import write_whole

_MESSAGE = re.compile(r"<\|message\|>(.*?)<\|(?:end|return)\|>", re.S)
_CONTROL = re.compile(r"<\|[a-z0-9_]+\|>")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What counts as a copy.

    Measured on 176 phantoms of four modalities: re-encoded as JPEG of quality 50, halved, doubled, 20 % brighter or
    30 % more contrast, a picture stays within 10 of 64 and 28 of 256 bits of itself (95 % within 6 and 20); two
    different ones are at least 6 and 46 bits apart. A crop of 3 % on every side is beyond it (median 6 and 40).
    """

    distance: int = 8
    """Of 64 bits: candidates."""
    confirm: int = 32
    """Of 256 bits: a candidate is a copy."""
    ngram: int = 8
    """Words of a run."""
    share: float = 0.7
    """Of a question's runs that one training text must hold (PaLM's audit, arXiv 2204.02311, took 70 % of 8-grams)."""
    template: int = 5
    """A run of words in more questions than this is the benchmark's template."""
    exclude_texts: bool = False
    """Also list training samples that only hold a question's text. Off: sets share wording without sharing cases."""
    workers: int = 1


@dataclass(kw_only=True)
class Found:
    """What one pair of a training dataset and the evaluation sets gave."""

    dataset: Dataset
    pairs: list[tuple[int, tuple[int, int], int, int]] = field(default_factory=list)
    """(picture of the evaluation, key of the stored image, coarse bits, fine bits); fine is -1 for an exact copy."""
    samples: dict[str, set[str]] = field(default_factory=dict)
    """Training sample id -> reasons."""


def run_audit(
    datasets: Sequence[Path | str], tasks: Sequence[Task], out: Path | str, settings: Settings | None = None, *,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare every dataset with every set, write ``leakage.json`` and ``exclude.jsonl`` into ``out``.

    Returns the content of ``leakage.json``.

    Raises:
        UsageError: not a dataset; ImageHash is not installed; two tasks of one name.
        WorkError: a dataset is damaged.
    """
    settings = settings or Settings()
    if len({task.name for task in tasks}) != len(tasks):
        raise UsageError("every task can be audited once; two of one name were given")
    opened = [Dataset(path) for path in datasets]
    questions = [question for task in tasks for question in task.questions]
    task_of = [task.name for task in tasks for _ in task.questions]
    pictures, picture_of = _distinct_pictures(questions)
    index = TextIndex([(q.question, q.answer) for q in questions], length=settings.ngram, template=settings.template)
    found, text_hits, unreadable = [], [], 0
    for dataset in opened:
        seen = hash_questions(
            pictures, dataset.manifest.store, workers=settings.workers, report=_named(report, "evaluation pictures")
        )
        unreadable = int((~seen.readable).sum())
        stored = hash_dataset(
            dataset, workers=settings.workers, report=_named(report, f"pictures of {dataset.folder.name}")
        )
        result = _matching_pictures(dataset, seen, stored, settings)
        text_hits += [(result, hit) for hit in _matching_texts(dataset, index, result, settings, report)]
        found.append(result)
    summary = _summary(found, text_hits, questions, task_of, picture_of, settings)
    summary["evaluation"] = [_of_task(task, picture_of, task_of) for task in tasks]
    summary["unreadable_pictures"] = unreadable
    summary["template"] = {"runs": index.num_template_runs, "questions": index.num_template_questions}
    summary["pairs"] = picture_pairs(
        [(result.dataset, result.pairs) for result in found], pictures, questions, picture_of, task_of
    )
    summary["text_pairs"] = text_pairs(
        [(result.dataset, hit, turns_of(result.dataset)) for result, hit in text_hits], questions, task_of
    )
    _write(Path(out), summary, found, {"picture", "text"} if settings.exclude_texts else {"picture"})
    return summary


def turns_of(dataset: Dataset) -> Callable[[int], list[str]]:
    """Reader of a dataset's texts: the turns of a sample in order, without marks and control tokens.

    Raises:
        UsageError: the dataset carries no tokenizer.
    """
    if not (dataset.folder / TOKENIZER).is_file():
        raise UsageError(f"{dataset.folder} has no {TOKENIZER}; its texts cannot be read, ingest it again")
    tokenizer = Tokenizer.load(dataset.folder / TOKENIZER)

    def read(number: int) -> list[str]:
        text = tokenizer.decode(dataset[number].token_ids, keep_control=True)
        return [_CONTROL.sub(" ", turn).strip() for turn in _MESSAGE.findall(text)]

    return read


def _distinct_pictures(questions: Sequence[Question]) -> tuple[list[Question], list[int | None]]:
    """One question per picture, and for every question the place of its picture among them (None without one)."""
    places: dict[str, int] = {}
    pictures: list[Question] = []
    picture_of: list[int | None] = []
    for question in questions:
        if question.image is None:
            picture_of.append(None)
            continue
        if question.image_key not in places:
            places[question.image_key] = len(pictures)
            pictures.append(question)
        picture_of.append(places[question.image_key])
    return pictures, picture_of


def _matching_pictures(dataset: Dataset, seen: Hashes, stored: Hashes, settings: Settings) -> Found:
    keys = [
        (shard, number)
        for shard, facts in enumerate(dataset.manifest.shards) for number in range(facts.num_images)
    ]  # fmt: skip
    result = Found(dataset=dataset)
    exact_of: dict[tuple[int, int], list[int]] = {}
    for place, (high, low) in enumerate(stored.exact.tolist()):
        exact_of.setdefault((high, low), []).append(place)
    readable = np.flatnonzero(seen.readable).tolist()
    exact = {(p, s) for p in readable for s in exact_of.get(tuple(seen.exact[p].tolist()), ())}
    result.pairs = [(picture, keys[place], 0, -1) for picture, place in sorted(exact)]
    wanted, kept = np.flatnonzero(seen.usable), np.flatnonzero(stored.usable)
    first, second, coarse = pairs_within(seen.coarse[wanted], stored.coarse[kept], settings.distance)
    first, second = wanted[first], kept[second]
    fine = np.bitwise_count(seen.fine[first] ^ stored.fine[second]).sum(axis=1, dtype=np.int64)
    near = fine <= settings.confirm
    for picture, place, bits, more in zip(*(part[near].tolist() for part in (first, second, coarse, fine))):
        if (picture, place) not in exact:
            result.pairs.append((picture, keys[place], bits, more))
    _mark_samples(dataset, result)
    return result


def _mark_samples(dataset: Dataset, result: Found) -> None:
    """Every training sample that shows one of the matched images."""
    if not result.pairs:
        return
    matched = {key for _, key, _, _ in result.pairs}
    for number in np.flatnonzero(dataset.num_images).tolist():
        sample = dataset[number]
        if matched.intersection(sample.image_keys):
            result.samples.setdefault(sample.sample_id, set()).add("picture")


def _matching_texts(
    dataset: Dataset, index: TextIndex, result: Found, settings: Settings,
    report: Callable[[str, int, int], None] | None,
) -> Iterator[Any]:  # fmt: skip
    read = turns_of(dataset)
    index.best.clear()
    for number in range(len(dataset)):
        for match in index.look_for(number, read(number)):
            if match.share >= settings.share:
                result.samples.setdefault(dataset.sample_id(number), set()).add("text")
        if report is not None and (number + 1) % 10_000 == 0:
            report(f"texts of {dataset.folder.name}", number + 1, len(dataset))
    yield from (match for match in index.best.values() if match.share >= settings.share)


def _summary(
    found: Sequence[Found], text_hits: Sequence[tuple[Found, Any]], questions: Sequence[Question],
    task_of: Sequence[str], picture_of: Sequence[int | None], settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    exact = {picture for result in found for picture, _, _, fine in result.pairs if fine < 0}
    near = {picture for result in found for picture, _, _, fine in result.pairs} - exact
    flagged: dict[str, dict[str, list[str]]] = {}
    texts = {hit.question for _, hit in text_hits}
    for number, question in enumerate(questions):
        reasons = [name for name, places in (("exact", exact), ("near", near)) if picture_of[number] in places]
        reasons += ["text"] if number in texts else []
        if reasons:
            flagged.setdefault(task_of[number], {})[question.question_id] = reasons
    return {
        "settings": {
            "distance_of_64": settings.distance, "confirm_of_256": settings.confirm, "ngram_words": settings.ngram,
            "share_of_ngrams": settings.share, "template_questions": settings.template,
        },
        "training": [
            {
                "dataset": result.dataset.folder.name, "fingerprint": result.dataset.fingerprint,
                "samples": len(result.dataset), "images": result.dataset.manifest.num_images,
                "samples_with_picture": sum("picture" in reasons for reasons in result.samples.values()),
                "samples_with_text": sum("text" in reasons for reasons in result.samples.values()),
                "exact_pairs": sum(fine < 0 for *_, fine in result.pairs),
                "near_pairs": sum(fine >= 0 for *_, fine in result.pairs),
            }
            for result in found
        ],
        "pictures": {"exact": len(exact), "near": len(near)},
        "questions": {
            "pictures": sum(picture_of[n] in exact or picture_of[n] in near for n in range(len(questions))),
            "texts": len(texts), "any": sum(map(len, flagged.values())), "of": len(questions),
        },
        "flagged": flagged,
    }  # fmt: skip


def _of_task(task: Task, picture_of: Sequence[int | None], task_of: Sequence[str]) -> dict[str, Any]:
    own = {picture for picture, name in zip(picture_of, task_of) if name == task.name and picture is not None}
    return {"task": task.name, "questions": len(task.questions), "pictures": len(own)}


def _named(report: Callable[[str, int, int], None] | None, what: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, total: report(what, done, total)


def _write(out: Path, summary: dict[str, Any], found: Sequence[Found], listed: set[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"sample_id": sample, "dataset": result.dataset.fingerprint, "reasons": sorted(reasons)}) + "\n"
        for result in found for sample, reasons in sorted(result.samples.items()) if reasons & listed
    ]  # fmt: skip
    summary["excluded_samples"] = len(lines)
    for name, text in (
        ("exclude.jsonl", "".join(lines)),
        ("leakage.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n"),
    ):
        write_whole(out / name, text)
