"""The leakage audit made ready for the page: what was found, pictures side by side, accuracy without what was found.

Read from ``leakage/leakage.json`` of the run folder (``tools/data/audit_leakage.py`` writes it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.observe.report.evaluation import answerer

NEEDED = {"training", "evaluation", "pictures", "questions", "flagged", "pairs", "text_pairs", "settings"}
SHOWN_TEXTS = 8


def view(run_dir: Path, results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Everything that the page shows of an audit; None where there was none.

    Raises:
        WorkError: the file is not an audit's.
    """
    path = run_dir / "leakage" / "leakage.json"
    if not path.is_file():
        return None
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{path} is not JSON ({error})") from None
    if not isinstance(audit, dict) or not audit.keys() >= NEEDED:
        raise WorkError(f"{path} is not the file of a leakage audit; run tools/data/audit_leakage.py again")
    return {
        "training": audit["training"],
        "evaluation": audit["evaluation"],
        "questions": audit["questions"],
        "pictures": audit["pictures"],
        "unreadable": audit.get("unreadable_pictures", 0),
        "settings": audit["settings"],
        "template": audit.get("template", {}).get("questions", 0),
        "excluded": audit.get("excluded_samples", 0),
        "pairs": [_pair(pair) for pair in audit["pairs"]],
        "texts": audit["text_pairs"][:SHOWN_TEXTS],
        "without": _without(run_dir / "eval", results, audit["flagged"]),
    }


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    exact = pair["kind"] == "exact"
    bits = f"{pair['bits_of_64']} of 64 and {pair['bits_of_256']} of 256 bits differ"
    return {**pair, "verdict": "equal pixels" if exact else bits, "exact": exact}


def _without(
    folder: Path, results: Sequence[Mapping[str, Any]], flagged: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[dict[str, Any]]:
    """Accuracy on the questions that the audit found, and on the others, for every evaluation with its items."""
    rows = []
    for result in results:
        found = flagged.get(result["task"], {})
        path = folder / Path(result["file"]).with_suffix(".items.jsonl").name
        if not found or not path.is_file():
            continue
        try:
            items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            verdicts = {str(item["question_id"]): bool(item["correct"]) for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise WorkError(f"{path} is not an items file of an evaluation ({error})") from None
        groups = {
            "pictures": {i for i, reasons in found.items() if {"exact", "near"} & set(reasons)} & verdicts.keys(),
            "any": found.keys() & verdicts.keys(),
        }
        rows.append(
            {
                "task": result["task"], "protocol": result["protocol"], "name": answerer(result),
                "all": _accuracy(verdicts, verdicts.keys()),
                "with_picture": _accuracy(verdicts, groups["pictures"]),
                "without_picture": _accuracy(verdicts, verdicts.keys() - groups["pictures"]),
                "without_any": _accuracy(verdicts, verdicts.keys() - groups["any"]),
            }
        )  # fmt: skip
    return rows


def _accuracy(verdicts: Mapping[str, bool], ids: Any) -> dict[str, Any] | None:
    right = [verdicts[i] for i in ids]
    return {"n": len(right), "accuracy": sum(right) / len(right)} if right else None
