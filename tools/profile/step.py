"""Benchmark of the training step: ours against the same model in plain transformers, on the same data.

    python tools/profile/step.py --workload tiny --workload small --steps 20 --out step.json

Both sides start from the same weights, take the same batches, run in one process with the same threads, and take turns
step by step, so that whatever else the machine does meets both. Losses are compared at every step: a benchmark of two
different computations says nothing. Peak memory is measured in a process of its own for each side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from workload import WORKLOADS, Workload, make_batches

from megatron_medgpt.parallel.groups import destroy_groups, start, stop

from ours import OurSide  # isort: skip  (after the engine was prepared)
from plain import PlainSide  # isort: skip

LARGEST_DIFFERENCE = 1e-2
"""Relative, of losses and gradient norms. The same function in fp32 differs by 1e-7 at first, and drifts: Adam's first
updates have the size of the rate whatever the gradient's, so a gradient that is rounding turns into a whole step; 3e-5
after 20 steps. Another function is off by more than this at once."""


def measure(workload: Workload, world, *, experts: str, steps: int, warmup: int) -> dict:
    """Alternate the sides over ``warmup + steps`` steps; the figures are of the last ``steps``."""
    plain_side = PlainSide(workload, experts)
    our_side = OurSide(workload, world, plain_side.weights(), num_steps=warmup + steps)
    sides = {"ours": our_side, "transformers": plain_side}
    wall = {name: [] for name in sides}
    cpu = {name: [] for name in sides}
    worst = {"loss": 0.0, "grad_norm": 0.0}
    for step in range(warmup + steps):
        batches = make_batches(workload, step)
        found = {}
        for name in sorted(sides, reverse=step % 2 == 1):  # neither side always comes first
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            found[name] = sides[name].step(batches)
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
        for what, mine, theirs in zip(worst, found["ours"], found["transformers"]):
            worst[what] = max(worst[what], abs(mine / theirs - 1))
        if max(worst.values()) > LARGEST_DIFFERENCE:
            raise SystemExit(
                f"{workload.name}: the sides do not compute the same; (loss, norm) of step {step}: {found}"
            )
    destroy_groups()
    figures = {name: _figures(workload, wall[name][warmup:], cpu[name][warmup:]) for name in sides}
    ratios = [theirs / mine for theirs, mine in zip(cpu["transformers"][warmup:], cpu["ours"][warmup:])]
    return {
        "workload": workload.name,
        "parameters": sum(parameter.numel() for parameter in plain_side.model.parameters()),
        "tokens_per_step": workload.tokens_per_step,
        "experts_of_transformers": experts,
        "largest_relative_difference": worst,
        **figures,
        "speed_up_wall": figures["transformers"]["median_s"] / figures["ours"]["median_s"],
        "speed_up_cpu": statistics.median(ratios),
    }


def _figures(workload: Workload, wall: list[float], cpu: list[float]) -> dict[str, float]:
    median = statistics.median(wall)
    return {
        "median_s": median,
        "p90_s": sorted(wall)[round(0.9 * (len(wall) - 1))],
        "cpu_median_s": statistics.median(cpu),
        "tokens_per_s": workload.tokens_per_step / median,
    }


def peak_memory_bytes(side: str, workload: Workload, experts: str, threads: int) -> int:
    """Peak resident memory of three steps of one side, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, "--workload", workload.name]
    command += ["--experts", experts, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return int(done.stdout.split()[-1])


def _print_peak_memory(side: str, workload: Workload, world, experts: str) -> None:
    plain_side = PlainSide(workload, experts)
    if side == "ours":
        weights = plain_side.weights()
        del plain_side
        runner = OurSide(workload, world, weights, num_steps=3)
        del weights
    else:
        runner = plain_side
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports and of building
    for step in range(3):
        runner.step(make_batches(workload, step))
    status = Path("/proc/self/status").read_text()
    print(1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))


def machine(threads: int) -> dict[str, str | int]:
    from megatron.core import __version__ as engine

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":unknown")
    return {
        "cpu": model.split(":", 1)[1].strip(), "cores": os.cpu_count() or 0, "threads": threads,
        "python": host.python_version(), "torch": torch.__version__, "megatron_core": engine,
        "transformers": transformers.__version__,
    }  # fmt: skip


def table(results: list[dict]) -> str:
    lines = ["| workload | parameters | side | median s | p90 s | CPU s | tokens/s | peak GiB |", "|" + "---|" * 8]
    for result in results:
        for side in ("ours", "transformers"):
            f = result[side]
            lines.append(
                f"| {result['workload']} | {result['parameters'] / 1e6:.1f} M | {side} | {f['median_s']:.3f} | "
                f"{f['p90_s']:.3f} | {f['cpu_median_s']:.3f} | {f['tokens_per_s']:,.0f} | "
                f"{f.get('peak_memory_bytes', float('nan')) / 2**30:.2f} |"
            )
        lines.append(f"| | | times faster | x{result['speed_up_wall']:.2f} | | x{result['speed_up_cpu']:.2f} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS), help="may be given several times")
    parser.add_argument("--experts", default="grouped_mm", choices=("eager", "grouped_mm"), help="of transformers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out: two processes fewer")
    parser.add_argument("--memory-of", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [WORKLOADS[name] for name in options.workload or WORKLOADS]
    world = start()
    if options.memory_of:
        _print_peak_memory(options.memory_of, chosen[0], world, options.experts)
        stop()
        return
    results = []
    for workload in chosen:
        result = measure(workload, world, experts=options.experts, steps=options.steps, warmup=options.warmup)
        for side in () if options.no_memory else ("ours", "transformers"):
            peak = peak_memory_bytes(side, workload, options.experts, options.threads)
            result[side]["peak_memory_bytes"] = peak
        results.append(result)
    stop()
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(options.threads), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
