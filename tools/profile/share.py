"""Where the time of a run's steps went, from its metrics.jsonl: how much was not model arithmetic.

    python tools/profile/share.py RUN_DIR [--skip 2] [--json]

``model`` is the forward and backward passes; ``optimizer`` is clipping, AdamW and what surrounds them; the rest (data,
checks and logging, the loop) is overhead. Two sums are given: overhead alone, and overhead with the whole optimizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def shares(run: Path, skip: int) -> dict[str, float]:
    """Share (0 to 1) of each span in the time of all steps but the first ``skip`` of every stage, and the two sums.

    Validation and checkpoints are not steps and are not in it: the medians over steps are what is shared out.
    """
    spans: dict[str, list[float]] = {}
    seen: dict[str, int] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seen[record["stage"]] = seen.get(record["stage"], 0) + 1
        if seen[record["stage"]] <= skip:
            continue
        for key, value in record.items():
            if key.startswith("time/"):
                spans.setdefault(key.removeprefix("time/").removesuffix("_s"), []).append(value)
    if not spans:
        raise SystemExit(f"{run}/metrics.jsonl holds no spans after the first {skip} steps of its stages")
    medians = {name: sorted(values)[len(values) // 2] for name, values in spans.items()}
    total = sum(medians.values())
    found = {name: value / total for name, value in medians.items()}
    outside = 1 - found.get("model", 0.0)
    return {**found, "overhead": outside - found.get("optimizer", 0.0), "overhead and optimizer": outside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--skip", type=int, default=2, help="first steps of every stage that do not count")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = shares(options.run, options.skip)
    if options.json:
        print(json.dumps(found))
        return
    for name, share in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{name:24} {share:7.2%}")


if __name__ == "__main__":
    main()
