"""Has the training data seen the evaluation? Pictures by exact and perceptual hash, questions and answers by n-gram.

    python tools/data/audit_leakage.py --train data/align data/instruct --eval omnimedvqa=OmniMedVQA \
        --out runs/a/leakage

Writes leakage.json (`medgpt report runs/a` shows it, with the pictures side by side and the accuracy without the
questions concerned) and exclude.jsonl: `medgpt train ... stages.align.exclude=runs/a/leakage/exclude.jsonl` leaves
those samples out of a stage, `medgpt ingest ... --exclude` out of a dataset. Needs ImageHash:
pip install 'megatron-medgpt[leakage]'.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.evaluate.leakage.audit import Settings, run_audit
from megatron_medgpt.evaluate.leakage.nearest import LARGEST_RADIUS
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.evaluate.tasks.question import Task


def tasks(pairs: list[str]) -> list[Task]:
    """Evaluation sets of TASK=FOLDER arguments."""
    loaded = []
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals:
            raise UsageError(f"--eval {pair}: expected TASK=FOLDER, e.g. omnimedvqa=OmniMedVQA")
        loaded.append(load_task(name, folder))
    return loaded


def progress(what: str, done: int, total: int) -> None:
    if 10 * done // total > 10 * (done - 1) // total:  # every tenth
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def settings(given: argparse.Namespace) -> Settings:
    if not 0 <= given.distance <= LARGEST_RADIUS:
        raise UsageError(f"--distance {given.distance} must be from 0 to {LARGEST_RADIUS}")
    if not 0 < given.share <= 1:
        raise UsageError(f"--share {given.share} must be above 0 and at most 1")
    if given.ngram < 2:
        raise UsageError(f"--ngram {given.ngram} must be at least 2")
    workers = given.workers or len(os.sched_getaffinity(0))
    return Settings(
        distance=given.distance, confirm=given.confirm, ngram=given.ngram, share=given.share,
        template=given.template, exclude_texts=given.exclude_texts, workers=workers,
    )  # fmt: skip


def main() -> None:
    usual = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="dataset folders")
    parser.add_argument("--eval", nargs="+", required=True, metavar="TASK=FOLDER", help="evaluation sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for leakage.json and exclude.jsonl")
    parser.add_argument("--distance", type=int, default=usual.distance, help="bits of 64: candidates")
    parser.add_argument("--confirm", type=int, default=usual.confirm, help="bits of 256: a candidate is a copy")
    parser.add_argument("--ngram", type=int, default=usual.ngram, help="words of a run")
    parser.add_argument("--share", type=float, default=usual.share, help="of a question's runs in one training text")
    parser.add_argument("--template", type=int, default=usual.template, help="a run in more questions tells nothing")
    parser.add_argument("--exclude-texts", action="store_true", help="list samples that only share text, too")
    parser.add_argument("--workers", type=int, default=0, help="processes that hash pictures; 0 uses every core")
    given = parser.parse_args()
    summary = run_audit(given.train, tasks(given.eval), given.out, settings(given), report=progress)
    questions, pictures = summary["questions"], summary["pictures"]
    print(
        f"{questions['any']} of {questions['of']} questions are touched: {questions['pictures']} by "
        f"{pictures['exact']} equal and {pictures['near']} near pictures, {questions['texts']} by text; "
        f"{summary['excluded_samples']} training samples listed in {given.out / 'exclude.jsonl'}"
    )


if __name__ == "__main__":
    try:
        main()
    except MedgptError as error:
        print(f"audit_leakage: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
