"""Evaluation sets by name. ``load_task`` is the door."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.tasks.omnimedvqa import load_omnimedvqa
from megatron_medgpt.evaluate.tasks.question import Task
from megatron_medgpt.evaluate.tasks.reports import load_reports
from megatron_medgpt.evaluate.tasks.table import load_table
from megatron_medgpt.evaluate.tasks.vqa import load_path_vqa, load_pmc_vqa, load_slake, load_vqa_rad

TASKS = {
    "omnimedvqa": load_omnimedvqa,
    "phantoms": partial(load_omnimedvqa, name="phantoms"),
    "vqa-rad": load_vqa_rad,
    "slake": load_slake,
    "path-vqa": load_path_vqa,
    "pmc-vqa-v1": partial(load_pmc_vqa, version=1),
    "pmc-vqa-v2": partial(load_pmc_vqa, version=2),
    "reports": load_reports,
    "table": load_table,
}


def check_task(name: str, data_dir: Path | str) -> None:
    """Raise UsageError for an unknown task or a place that is not there; nothing is read yet."""
    if name not in TASKS:
        raise UsageError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}")
    if not Path(data_dir).exists():
        raise UsageError(f"--data {data_dir}: no such folder")


def load_task(name: str, data_dir: Path | str, *, check_images: bool = True) -> Task:
    """Read an evaluation set.

    Raises:
        UsageError: an unknown task, a missing folder, or files that are not the set's.
    """
    check_task(name, data_dir)
    return TASKS[name](Path(data_dir), check_images=check_images)
