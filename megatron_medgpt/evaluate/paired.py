"""Is one run better than another on the same questions? McNemar's exact test on the questions where they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact test: under no difference each discordant question is a fair coin (McNemar 1947).

    ``only_first`` questions were right in the first run alone, ``only_second`` in the second alone.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    largest = max(logs)
    tail = math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs)
    return min(1.0, 2 * tail)


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> dict[str, Any]:
    """Paired comparison of two runs, each ``{question_id: right}``.

    Raises:
        UsageError: the runs did not answer the same questions.
    """
    if first.keys() != second.keys():
        apart = len(first.keys() ^ second.keys())
        raise UsageError(
            f"the two runs differ in {apart} questions ({len(first)} and {len(second)} in all); a paired test needs "
            "the same in both: was one of them made with --limit?"
        )
    if not first:
        raise UsageError("the two runs hold no question")
    only_first = sum(first[key] and not second[key] for key in first)
    only_second = sum(second[key] and not first[key] for key in first)
    return {
        "n": len(first),
        "only_first": only_first,
        "only_second": only_second,
        "difference": round((only_second - only_first) / len(first), 6),
        "p_value": mcnemar_exact(only_first, only_second),
    }


def compare_with(other: Path | str, summary: Mapping[str, Any], verdicts: Mapping[str, bool]) -> dict[str, Any]:
    """Paired comparison of a finished evaluation (first) with one in memory (second).

    Raises:
        UsageError: ``other`` is no evaluation file, or of another task, protocol or set of questions.
    """
    other = Path(other)
    finished = _read_evaluation(other)
    apart = [key for key in ("task", "protocol") if finished[key] != summary[key]]
    if apart:
        raise UsageError(
            f"--against {other} has {apart[0]} {finished[apart[0]]}, this run {summary[apart[0]]}; "
            "only figures of one task and protocol can be compared"
        )
    return {"against": other.name} | compare(read_verdicts(items_path(other)), verdicts)


def _read_evaluation(path: Path) -> dict[str, Any]:
    mend = "give the file that medgpt eval or medgpt score wrote with --out"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--against {path}: {error.strerror}; {mend}") from None
    except ValueError:
        raise UsageError(f"--against {path} is no JSON; {mend}") from None
    lacks = [key for key in ("task", "protocol") if not isinstance(content, dict) or key not in content]
    if lacks:
        raise UsageError(f"--against {path} is no evaluation file (no {lacks[0]!r} in it); {mend}")
    if not items_path(path).is_file():
        raise UsageError(f"--against {path}: {items_path(path).name} is missing beside it; a paired test needs it")
    return content


def items_path(out: Path | str) -> Path:
    """Where the verdicts of single questions stand beside an evaluation file."""
    return Path(out).with_suffix(".items.jsonl")


def read_verdicts(path: Path | str) -> dict[str, bool]:
    """``{question_id: right}`` of an ``*.items.jsonl`` file that an evaluation wrote beside its result."""
    verdicts = {}
    try:
        # An answer may hold U+2028, at which splitlines would cut.
        lines = list(filter(None, Path(path).read_text(encoding="utf-8").split("\n")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} is no text; make it again with medgpt eval or medgpt score") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            verdicts[str(row["question_id"])] = bool(row["correct"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path} line {number} is no verdict of an evaluation; make it again with medgpt eval or medgpt score"
            ) from None
    return verdicts
