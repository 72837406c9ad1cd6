"""Timing in turns, and the ceilings of the machine, for ``bench.py``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

AHEAD_CYCLES = 2_000_000
"""For which the device waits before each timed call, a millisecond: the host gets ahead, as it is in training, and what
is timed is the device's work, not Python's."""


class Clock:
    """Times calls one after the other, each in its turn."""

    def __init__(self, device: torch.device, tiny: bool, deadline: float):
        self.device, self.iterations, self.deadline = device, 1 if tiny else 50, deadline
        self.flush = torch.empty(1 if device.type == "cpu" else 2**27, dtype=torch.uint8, device=device)

    def once_ms(self, call: Callable[[], object]) -> tuple[float, float]:
        """Of the device, and of the host until the call returns (with what it waits for the device)."""
        self.flush.zero_()  # the last call's data leaves the cache
        if self.device.type == "cpu":
            began = time.perf_counter()
            call()
            took = (time.perf_counter() - began) * 1e3
            return took, took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        began = time.perf_counter()
        call()
        host = (time.perf_counter() - began) * 1e3
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), host

    def compare(self, variants: dict[str, Callable[[], object]]) -> dict[str, dict]:
        """Median and 90th percentile of each variant, in ms, or why it was not timed."""
        results: dict[str, dict] = {}
        ready = {}
        for name, call in variants.items():
            try:
                for _ in range(1 if self.device.type == "cpu" else 3):
                    call()
                ready[name] = call
            except Exception as error:
                results[name] = {
                    "not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        for _ in range(self.iterations):
            for name, call in ready.items():
                times[name].append(self.once_ms(call))
            if time.monotonic() > self.deadline and all(len(t) >= 5 for t in times.values()):
                break
        for name, pairs in times.items():
            values, host = (sorted(column) for column in zip(*pairs))
            p90 = values[min(len(values) - 1, int(0.9 * len(values)))]
            middle = len(values) // 2
            results[name] = {"median_ms": values[middle], "p90_ms": p90, "n": len(values), "host_ms": host[middle]}
        return results


def ceilings(clock: Clock, tiny: bool) -> dict[str, float]:
    """Copy bandwidth (read and written bytes), bf16 and fp8 products, on random data."""
    n, size = (2**10, 64) if tiny else (2**30, 8192)
    source, target = torch.randn(n, device=clock.device), torch.empty(n, device=clock.device)
    a = torch.randn(size, size, device=clock.device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    calls: dict[str, Callable] = {"copy": lambda: target.copy_(source), "bf16": lambda: a @ b}
    if clock.device.type == "cuda":
        one = torch.ones((), device=clock.device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        calls["fp8"] = lambda: torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    times = clock.compare(calls)
    made = {"copy_gb_s": 8 * n / times["copy"]["median_ms"] / 1e6}
    for name in ("bf16", "fp8"):
        if "median_ms" in times.get(name, {}):
            made[f"{name}_tflop_s"] = 2 * size**3 / times[name]["median_ms"] / 1e9
    return made
