"""The schedules of the grouped products beside one another, for ``bench.py``: which of them ``auto`` should take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from bench_clock import Clock
from bench_moe import BOUNDS, LIMIT, check_variants, random_tokens
from medgpt_kernels.grouped_mlp import cases as mlp_cases
from medgpt_kernels.grouped_mlp import launch, routed
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route
from torch import Tensor

TAKEN = next(iter(launch.SCHEDULES))
"""What ``auto`` takes."""


def schedules_case(clock: Clock, shape: tuple[int, int, int, int], T: int, tiny: bool) -> dict:
    """The layer behind the index, forward, and with every gradient, under each schedule in bf16 and fp8."""
    H, F, E, K = shape
    given = {**mlp_cases.inputs(16, H, F, E, K, dtype=torch.bfloat16, seed=0, spread=1.0, device=clock.device),
             **random_tokens(T, H, K, clock.device)}  # fmt: skip
    experts = route_cases.balanced_experts(T, E, K).to(clock.device)
    index = route.index(experts, E, tile=16 if tiny else 128, implementation="triton")
    grad = torch.randn_like(given["x_TH"])
    calls: dict[str, Callable[..., Tensor]] = {}
    for precision in BOUNDS:
        for name in launch.SCHEDULES:
            calls[f"{precision}, {name}"] = lambda x, w, *rest, n=name, p=precision: routed.routed_mlp(
                x, w, index, *rest, limit=LIMIT, precision=p, implementation=n
            )
    right, wrong = check_variants(calls, given, experts, grad)
    leaves = [value.requires_grad_() for value in given.values()]

    def forward(call):
        with torch.no_grad():
            return call(*leaves)

    times = {
        "forward": clock.compare({n: (lambda c=c: forward(c)) for n, c in right.items()}),
        "forward_backward": clock.compare(
            {n: (lambda c=c: torch.autograd.grad(c(*leaves), leaves, grad)) for n, c in right.items()}
        ),
    }
    for part, factor in (("forward", 1), ("forward_backward", 3)):
        for row in times[part].values():
            if "median_ms" in row:
                row["tflop_s"] = factor * 6.0 * T * K * H * F / row["median_ms"] / 1e9
    times["forward"].update(wrong)
    return {"case": f"schedules T={T} H={H} E={E} K={K} balanced", **times}


def told(results: Iterable[dict]) -> str:
    """The fastest schedule of each case, part and precision, beside the one that ``auto`` takes."""
    lines = []
    for result in results:
        if not result["case"].startswith("schedules "):
            continue
        for part in ("forward", "forward_backward"):
            for precision in BOUNDS:
                times = {n.split(", ")[1]: row["median_ms"] for n, row in result.get(part, {}).items()
                         if n.startswith(precision) and "median_ms" in row}  # fmt: skip
                if TAKEN in times:
                    best = min(times, key=times.__getitem__)
                    lines.append(
                        f"{result['case']}, {part}, {precision}: fastest {best}, {times[TAKEN] / times[best]:.3f} times"
                        f" as fast as {TAKEN}, which auto takes"
                    )
    return "\n".join(lines)
