"""The schedules of the grouped products beside one another, for ``bench.py``: which of them ``auto`` should take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from bench_clock import Clock
from bench_moe import LIMIT, random_tokens
from medgpt_kernels.grouped_mlp import cases as mlp_cases
from medgpt_kernels.grouped_mlp import launch, routed, routed_reference
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route
from torch import Tensor

TAKEN = next(iter(launch.SCHEDULES))
"""What ``auto`` takes."""
BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""Of the whole output's relative error: bf16 keeps 8 bits, E4M3 4."""


def schedules_case(clock: Clock, shape: tuple[int, int, int, int], T: int, tiny: bool) -> dict:
    """The layer behind the index, forward, and with every gradient, under each schedule in bf16 and fp8."""
    H, F, E, K = shape
    given = {**mlp_cases.inputs(16, H, F, E, K, dtype=torch.bfloat16, seed=0, spread=1.0, device=clock.device),
             **random_tokens(T, H, K, clock.device)}  # fmt: skip
    experts = route_cases.balanced_experts(T, E, K).to(clock.device)
    index = route.index(experts, E, tile=16 if tiny else 128, implementation="triton")
    leaves = [value.requires_grad_() for value in given.values()]
    grad = torch.randn_like(leaves[0])
    calls: dict[str, Callable[[], Tensor]] = {}
    for precision in BOUNDS:
        for name in launch.SCHEDULES:
            calls[f"{precision}, {name}"] = lambda n=name, p=precision: routed.routed_mlp(
                leaves[0], leaves[1], index, *leaves[2:], limit=LIMIT, precision=p, implementation=n
            )
    right, wrong = checked(calls, given, experts)

    def forward(call):
        with torch.no_grad():
            return call()

    times = {
        "forward": clock.compare({n: (lambda c=c: forward(c)) for n, c in right.items()}),
        "forward_backward": clock.compare(
            {n: (lambda c=c: torch.autograd.grad(c(), leaves, grad)) for n, c in right.items()}
        ),
    }
    for part, factor in (("forward", 1), ("forward_backward", 3)):
        for row in times[part].values():
            if "median_ms" in row:
                row["tflop_s"] = factor * 6.0 * T * K * H * F / row["median_ms"] / 1e9
    times["forward"].update(wrong)
    return {"case": f"schedules T={T} H={H} E={E} K={K} balanced", **times}


def checked(calls: dict, given: dict[str, Tensor], experts: Tensor) -> tuple[dict, dict]:
    """Calls whose first tokens come out right, and why the others are left out."""
    few = min(64, experts.shape[0])
    args = [given[name].detach() for name in given]
    exact = routed_reference.routed_mlp(
        args[0][:few].double(), args[1][:few].double(), experts[:few], *(a.double() for a in args[2:]), limit=LIMIT
    )
    right, wrong = {}, {}
    for name, call in calls.items():
        try:
            error = float((call().detach()[:few].double() - exact).norm() / exact.norm())
        except Exception as problem:
            wrong[name] = {"not_run": f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"}
            continue
        if error <= BOUNDS[name.split(",")[0]]:
            right[name] = call
        else:
            wrong[name] = {"not_run": f"wrong answer: relative error {error:.3g}"}
    return right, wrong


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
