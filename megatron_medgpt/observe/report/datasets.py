"""What the run was trained on: every dataset with its share of each stage, its modalities and its rejects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medgpt.observe.report.files import read_json


def datasets(config: Mapping[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """One row per dataset of the run's blends, in their order; ``facts`` from its dataset.json where it is to be found.

    The share of a dataset in a stage is weight x samples over the same of all datasets of the stage (a weight is the
    number of passes an epoch makes over it); None where a dataset.json of the stage is gone.
    """
    rows: dict[str, dict[str, Any]] = {}
    for stage in config.get("stages") or []:
        blend = []
        for entry in stage.get("data") or []:
            path = Path(str(entry.get("path", "")))
            row = rows.setdefault(str(path), {"name": path.name, "stages": [], "facts": _facts(path, run_dir)})
            blend.append((row, float(entry.get("weight", 1))))
        whole = all(row["facts"] for row, _ in blend)
        total = sum(weight * row["facts"]["num_samples"] for row, weight in blend) if whole else 0
        for row, weight in blend:
            share = weight * row["facts"]["num_samples"] / total if total else None
            row["stages"].append({"name": stage.get("name"), "weight": weight, "share": share})
    return list(rows.values())


def _facts(path: Path, run_dir: Path) -> dict[str, Any] | None:
    """dataset.json of a dataset; a relative path is looked for from the run upwards (it may have been moved with its
    data), then from here."""
    run_dir = run_dir.resolve()
    bases = (run_dir, *run_dir.parents, Path())
    found = (base / path / "dataset.json" for base in bases)
    return next((read_json(file, {}) for file in found if file.is_file()), None)
