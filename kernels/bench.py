"""Time the kernels beside what a user would pick instead, in one run, on one GPU.

    python kernels/bench.py --out DIR [--tokens 8192,16384] [--shapes 20b,120b,120b-ep8] [--seconds 300] [--only KINDS]
                            [--tiny]

Variants of a case take turns, iteration by iteration, on random data; the median and the 90th percentile of the
device's time are reported, the host's beside them, and FLOPs count unpadded rows. The ceilings (copy bandwidth, bf16
and fp8 products) are taken in the same run. Every variant is compared with the reference before it is timed, at the
size that is timed, with every gradient: no speed is reported for a wrong answer. Cases that no longer fit in
``--seconds`` are counted, and the exit code is 75: another call with the same ``--out`` and commit measures those
alone. ``--tiny`` runs every path at toy size, also on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import goals
from bench_clock import Clock, ceilings
from bench_moe import LIGER, frozen_case, liger_case, moe_case, products_case
from bench_rows import conversion_case, movement_case, projector_case
from bench_schedules import schedules_case
from bench_schedules import told as schedules_told
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import cases as mlp_cases
from medgpt_kernels.projector import cases as projector_cases

LEFT_OUT = 75
"""Exit code where time ran out, EX_TEMPFAIL."""
KINDS = ("moe", "schedules", "products", "frozen", "conversions", "movement", "projector", "liger")


def table(results: list[dict], ceiling: dict[str, float]) -> str:
    lines = ["ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in ceiling.items())]
    for result in results:
        if "tests" in result:
            lines.append(f"{result['case']:44} the tests of its kernels have NOT PASSED: no goal is judged by it")
        for part in ("forward", "forward_backward"):
            for name, row in result.get(part, {}).items():
                if "not_run" in row:
                    lines.append(f"{result['case']:44} {part:16} {name:30} not run: {row['not_run'][:80]}")
                    continue
                extra = (
                    f"{row['tflop_s']:8.1f} TFLOP/s"
                    if "tflop_s" in row
                    else f"{row['gb_s']:8.1f} GB/s"
                    if "gb_s" in row
                    else ""
                )
                lines.append(
                    f"{result['case']:44} {part:16} {name:30} {row['median_ms']:9.3f} ms"
                    f" (p90 {row['p90_ms']:.3f}, host {row['host_ms']:.3f}) {extra}"
                    + (f" {row['of_ceiling']:6.1%} of the ceiling" if "of_ceiling" in row else "")
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for bench.json and bench.txt")
    parser.add_argument("--tokens", default="8192,16384")
    parser.add_argument("--shapes", default="20b,120b-ep8,120b")
    parser.add_argument("--seconds", type=float, default=300.0, help="no case starts after this")
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds of cases, by commas: {' '.join(KINDS)}")
    parser.add_argument("--unproven", default="", help="kinds whose kernels' tests have not passed: measured last")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, one iteration: proves that every path runs")
    parser.add_argument("--commit", default="", help="what is measured; the checkout's HEAD when not given")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = triton_refusal(torch.empty(0, device=device))
    if refusal or (device.type == "cpu" and not args.tiny):
        print(f"bench.py: {refusal or 'no GPU; only --tiny runs without one'}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    clock = Clock(device, args.tiny, deadline)
    unproven = set(args.unproven.split(","))
    plan = [case for case in cases(clock, args) if case[0] in args.only.split(",")]
    plan.sort(key=lambda case: case[0] in unproven)
    ceiling = ceilings(clock, args.tiny)
    results, left_out, failed = measured_before(args.out, args.commit), 0, 0
    done = {result["key"] for result in results}
    for kind, key, case in plan:
        if key in done:
            continue
        if time.monotonic() > deadline:
            left_out += 1
            continue
        try:
            results.append({"key": key, **case(), **({"tests": "not passed"} if kind in unproven else {})})
        except Exception as error:  # a failed case is named, and the others are still measured
            failed += not isinstance(error, torch.OutOfMemoryError)
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            results.append({"key": key, "case": f"{kind}, failed", "forward": {"all": {"not_run": why}}})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(args.out, results, ceiling, left_out, args.commit)
    write(args.out, results, ceiling, left_out, args.commit)
    print(report(results, ceiling))
    print(f"{left_out} cases did not fit in {args.seconds:g} s; {failed} failed")
    return 1 if failed else LEFT_OUT if left_out else 0


def measured_before(out: pathlib.Path, commit: str) -> list[dict]:
    """What an earlier call measured of this commit on this kind of machine, failed cases left out."""
    path = out / "bench.json"
    found = json.loads(path.read_text()) if path.is_file() else {"machine": {}, "results": []}
    if any(found["machine"].get(name) != machine(commit)[name] for name in ("device", "torch", "commit")):
        return []
    return [result for result in found["results"] if not result["case"].endswith(", failed")]


def cases(clock: Clock, args: argparse.Namespace) -> list[tuple[str, str, Callable[[], dict]]]:
    """What is measured, the most wanted first: kind, name, and the call."""
    if args.tiny:
        tiny = {
            "schedules": lambda: schedules_case(clock, (64, 32, 3, 2), 24, True),
            "moe": lambda: moe_case(clock, (40, 24, 3, 2), 48, "zipf", True, not_liger),
            "products": lambda: products_case(clock, (64, 32, 3, 2), 24, True),
            "frozen": lambda: frozen_case(clock, (64, 32, 3, 2), 24, True),
            "conversions": lambda: conversion_case(clock, (1, 16, 64)),
            "movement": lambda: movement_case(clock, 48, 40, 3, 2, True),
            "projector": lambda: projector_case(clock, "tiny", (1, 4, 2, 16, 24, 32)),
            "liger": lambda: liger_case(clock, (64, 32, 3, 2), 24, True),
        }
        return [(kind, f"{kind} tiny", case) for kind, case in tiny.items()]
    shapes, tokens = args.shapes.split(","), [int(t) for t in args.tokens.split(",")]
    moe = [
        ("moe", f"moe {s} T={t} {r}", lambda s=s, t=t, r=r: moe_case(clock, mlp_cases.BENCH[s], t, r, False))
        for t in tokens
        for s in shapes
        for r in ("balanced", "zipf")
    ]
    shape = mlp_cases.BENCH["20b"]
    first = ("moe", moe[0][1], lambda: moe_case(clock, mlp_cases.BENCH[shapes[0]], tokens[0], "balanced", False,
                                                not_liger))  # fmt: skip
    liger = ("liger", "liger 20b", lambda: liger_case(clock, shape, 8192, False))
    others = [
        ("products", "products 20b", lambda: products_case(clock, shape, 8192, False)),
        ("frozen", "frozen 20b", lambda: frozen_case(clock, shape, 8192, False)),
        ("conversions", "conversions 20b", lambda: conversion_case(clock, (32, 5760, 2880))),
        ("movement", "movement 20b", lambda: movement_case(clock, 8192, 2880, 32, 4, False)),
        *(("projector", f"projector {n}", lambda n=n, s=s: projector_case(clock, n, s))
          for n, s in projector_cases.BENCH.items()),
    ]  # fmt: skip
    schedules = ("schedules", "schedules 20b", lambda: schedules_case(clock, shape, 8192, False))
    return [first, schedules, *others, liger, *moe[1:]]


def not_liger(name: str) -> bool:
    return name != LIGER


def report(results: list[dict], ceiling: dict[str, float]) -> str:
    parts = (table(results, ceiling), schedules_told(results), goals.told(goals.judge(results, ceiling)))
    return "\n\n".join(part for part in parts if part)


def machine(commit: str) -> dict[str, str]:
    commit = commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit,
    }  # fmt: skip


def write(out: pathlib.Path, results: list[dict], ceiling: dict[str, float], left_out: int, commit: str) -> None:
    goals.add_fractions(results, ceiling)
    found = {
        "machine": machine(commit), "ceilings": ceiling, "goals": goals.judge(results, ceiling), "left_out": left_out,
        "results": results,
    }  # fmt: skip
    for name, text in (("bench.json", json.dumps(found, indent=1)), ("bench.txt", report(results, ceiling))):
        whole = out / f".{name}"  # replaced at once: whoever is killed leaves the old file or the new
        whole.write_text(text + "\n")
        whole.replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
