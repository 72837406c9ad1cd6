"""Time the kernels beside what a user would pick instead, in one run, on one GPU.

    python kernels/bench.py --out DIR [--tokens 8192,16384] [--shapes 20b,120b,120b-ep8] [--seconds 300] [--tiny]

Variants of a case take turns, iteration by iteration, on random data; the median and the 90th percentile are reported,
and FLOPs count unpadded rows. The ceilings (copy bandwidth, bf16 and fp8 products) are taken in the same run. Every
variant's output is compared with the reference before it is timed: no speed is reported for a wrong answer. Cases that
no longer fit in ``--seconds`` are named, not dropped silently. ``--tiny`` runs every path at toy size, also on a CPU.
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
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import peers
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import cases as mlp_cases
from medgpt_kernels.grouped_mlp import routed, routed_reference
from medgpt_kernels.mx import op as mx
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import cases as projector_cases
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route

LIMIT = peers.LIMIT


class Clock:
    """Times calls one after the other, each in its turn."""

    def __init__(self, device: torch.device, tiny: bool, deadline: float):
        self.device, self.iterations, self.deadline = device, 1 if tiny else 50, deadline
        self.flush = torch.empty(1 if device.type == "cpu" else 2**27, dtype=torch.uint8, device=device)

    def once_ms(self, call: Callable[[], object]) -> float:
        self.flush.zero_()  # the last call's data leaves the cache
        if self.device.type == "cpu":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

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
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(self.iterations):
            for name, call in ready.items():
                times[name].append(self.once_ms(call))
            if time.monotonic() > self.deadline and all(len(t) >= 5 for t in times.values()):
                break
        for name, values in times.items():
            values.sort()
            p90 = values[min(len(values) - 1, int(0.9 * len(values)))]
            results[name] = {"median_ms": values[len(values) // 2], "p90_ms": p90, "n": len(values)}
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
        calls["fp8"] = lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    times = clock.compare(calls)
    made = {"copy_gb_s": 8 * n / times["copy"]["median_ms"] / 1e6}
    for name in ("bf16", "fp8"):
        if "median_ms" in times.get(name, {}):
            made[f"{name}_tflop_s"] = 2 * size**3 / times[name]["median_ms"] / 1e9
    return made


def moe_variants(
    given: dict[str, Tensor], experts: Tensor, num_experts: int, tile: int
) -> dict[str, Callable[..., Tensor]]:
    """Ours and the peers as functions of (x, weights, w1, b1, w2, b2); the index is part of what is timed."""
    _, H, G = given["gate_up_EHG"].shape

    def index() -> route.RowIndex:
        return route.index(experts, num_experts, tile=tile, implementation="triton")

    def ours(precision: str) -> Callable[..., Tensor]:
        return lambda x, w, *rest: routed.routed_mlp(
            x, w, index(), *rest, limit=LIMIT, precision=precision, implementation="triton"
        )

    def through(peer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, *rest: peer(x, w, experts, *rest)

    def late(make: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
        made: list = []

        def call(x, w, *rest):
            if not made:
                made.append(make())
            return made[0](x, w, experts, *rest)

        return call

    variants = {
        "ours bf16": ours("bf16"),
        "ours fp8": ours("fp8"),
        "torch grouped_mm, eager": through(peers.grouped_mm),
    }
    if given["x_TH"].is_cuda:
        variants["torch grouped_mm, compiled"] = through(torch.compile(peers.grouped_mm, dynamic=False))
    variants["megatron-core order"] = through(peers.megatron_core)
    variants["transformers"] = late(lambda: peers.transformers_experts(num_experts, H, G // 2, given["x_TH"].device))
    variants["liger (no bias, plain SwiGLU)"] = late(peers.liger)
    return variants


def check_variants(variants: dict, given: dict[str, Tensor], experts: Tensor) -> tuple[dict, dict]:
    """Variants whose output is right, and why the others are left out. The bound is on the whole output's error."""
    args = [given[name].double() for name in given]
    exact = routed_reference.routed_mlp(*args[:2], experts, *args[2:], limit=LIMIT)
    right, wrong = {}, {}
    for name, call in variants.items():
        limit = 0.15 if "fp8" in name else 0.02  # E4M3 keeps 4 bits, bf16 8
        try:
            error = float((call(*given.values()).double() - exact).norm() / exact.norm())
        except Exception as problem:
            wrong[name] = {"not_run": f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"}
            continue
        if error <= limit or name.startswith("liger"):
            right[name] = call
        else:
            wrong[name] = {"not_run": f"wrong answer: relative error {error:.3g}"}
    return right, wrong


def moe_case(clock: Clock, shape: tuple[int, int, int, int], T: int, routing: str, tiny: bool) -> dict:
    H, F, E, K = shape
    experts = (
        route_cases.balanced_experts(T, E, K) if routing == "balanced" else route_cases.zipf_experts(T, E, K, seed=0)
    )
    experts = experts.to(clock.device)
    tile = 16 if tiny else 128
    few = min(T, 64)
    small = mlp_cases.inputs(few, H, F, E, K, dtype=torch.bfloat16, seed=0, spread=1.0, device=clock.device)
    variants = moe_variants(small, experts[:few].contiguous(), E, tile)
    _, wrong = check_variants(variants, small, experts[:few])
    given = {**small, **_tokens(T, H, K, clock.device)}
    variants = {n: c for n, c in moe_variants(given, experts, E, tile).items() if n not in wrong}
    flops = 6.0 * T * K * H * F
    forward = clock.compare({name: (lambda c=call: _no_grad(c, given)) for name, call in variants.items()})
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    grad = torch.randn_like(given["x_TH"])

    def both(call):
        return lambda: torch.autograd.grad(call(*leaves.values()), list(leaves.values()), grad, allow_unused=True)

    backward = clock.compare({name: both(call) for name, call in variants.items()})
    saved = {}
    if clock.device.type == "cuda":
        for name, call in variants.items():
            before = torch.cuda.memory_allocated()
            try:
                out = call(*leaves.values())
                saved[name] = torch.cuda.memory_allocated() - before
                del out
            except Exception as error:
                print(f"{name}: saved memory was not measured: {type(error).__name__}: {error}", file=sys.stderr)
                saved[name] = None
    for table, factor in ((forward, 1), (backward, 3)):
        for row in table.values():
            if "median_ms" in row:
                row["tflop_s"] = factor * flops / row["median_ms"] / 1e9
    return {
        "case": f"moe T={T} H={H} E={E} K={K} {routing}", "forward": {**forward, **wrong},
        "forward_backward": backward, "saved_bytes": saved,
    }  # fmt: skip


def _tokens(T: int, H: int, K: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(T, H, generator=generator, device=device).to(torch.bfloat16)
    return {"x_TH": x, "weights_TK": torch.softmax(torch.randn(T, K, generator=generator, device=device), -1)}


def _no_grad(call: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return call(*given.values())


def movement_case(clock: Clock, T: int, H: int, E: int, K: int, tiny: bool) -> dict:
    """Index, permute and combine beside argsort, index_select and index_add."""
    experts = route_cases.zipf_experts(T, E, K, seed=0).to(clock.device)
    given = _tokens(T, H, K, clock.device)
    index = route.index(experts, E, tile=16 if tiny else 128, implementation="triton")
    rows = permute.permute(given["x_TH"], index, implementation="triton")
    weights, x = given["weights_TK"], given["x_TH"]
    order = torch.argsort(experts.flatten())
    token, y = order // K, rows[: T * K]
    times = clock.compare({
        "ours index": lambda: route.index(experts, E, tile=16 if tiny else 128, implementation="triton"),
        "argsort and bincount": lambda: peers._sorted(experts, E),
        "ours permute": lambda: permute.permute(x, index, implementation="triton"),
        "ours permute to fp8": lambda: permute.pack_fp8(x, index, implementation="triton"),
        "index_select": lambda: x.index_select(0, token),
        "ours combine": lambda: permute.combine(rows, weights, index, implementation="triton"),
        "index_add": lambda: torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order, None].to(y.dtype)),
    })  # fmt: skip
    moved = (T * K + T) * H * 2
    return {"case": f"movement T={T} H={H} E={E} K={K}", "forward": times, "combine_floor_bytes": moved}


def projector_case(clock: Clock, name: str, sizes: tuple) -> dict:
    images, side, fold, width, inner, hidden = sizes
    made = {"device": clock.device, "dtype": torch.bfloat16}
    per_image = (side // fold) ** 2
    places = [i * (per_image + 64) + 32 + t for i in range(images) for t in range(per_image)]
    S = images * (per_image + 64)
    at = projector.placement(
        range(images * per_image), places, num_images=images, side=side, fold=fold, device=clock.device
    )
    D = width * fold * fold
    shapes = ((S, 1, hidden), (images, side * side, width), (inner, D), (inner,), (hidden, inner), (hidden,))
    leaves = [(torch.randn(s, **made) * (0.02 if len(s) == 2 else 1)).requires_grad_() for s in shapes]
    mask = torch.zeros(S, 1, 1, dtype=torch.bool, device=clock.device)
    mask[at.place_N.long()] = True

    def ours():
        return projector.project_into(leaves[0], leaves[1], at, *leaves[2:], implementation="triton")

    def eager():
        text, features, w1, b1, w2, b2 = leaves
        grid = features.view(images, side // fold, fold, side // fold, fold, width)
        rows = grid.transpose(2, 3).reshape(-1, D)
        rows = torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(rows, w1, b1)), w2, b2)
        return text.masked_scatter(mask, rows)

    grad = torch.randn(S, 1, hidden, **made)
    rows = torch.randn(len(places), hidden, **made)
    text = leaves[0].detach()
    flat, place = text.view(-1, hidden), at.place_N.long()
    forward = clock.compare({
        "ours": ours, "eager": eager,
        "merge alone, index_copy": lambda: flat.clone().index_copy_(0, place, rows),
        "merge alone, masked_scatter": lambda: text.masked_scatter(mask, rows),
    })  # fmt: skip
    both = {
        name: (lambda c=c: torch.autograd.grad(c(), leaves, grad)) for name, c in (("ours", ours), ("eager", eager))
    }
    return {"case": f"projector {name}", "forward": forward, "forward_backward": clock.compare(both)}


def conversion_case(clock: Clock, shape: tuple[int, int, int]) -> dict:
    E, N, K = shape
    w = torch.randn(shape, device=clock.device, dtype=torch.bfloat16)
    blocks, scales = mx.quantise_mxfp4(w)
    names = ["triton"] + (["cuda"] if clock.device.type == "cuda" else [])
    calls: dict[str, Callable] = {}
    for name in names:
        calls[f"mxfp4 to bf16, {name}"] = lambda n=name: mx.dequantise_mxfp4(blocks, scales, implementation=n)
        calls[f"mxfp4 to e4m3, {name}"] = lambda n=name: mx.mxfp4_to_e4m3(blocks, scales, implementation=n)
        calls[f"bf16 to mxfp4, {name}"] = lambda n=name: mx.quantise_mxfp4(w, implementation=n)
    calls["bf16 to e4m3 tiles"] = lambda: mx.quantise_tiles(w, implementation="triton")
    times = clock.compare(calls)
    values = E * N * K
    size = {"mxfp4 to bf16": 2 + 17 / 32, "mxfp4 to e4m3": 1 + 17 / 32, "bf16 to mxfp4": 2 + 17 / 32, "bf16 to e4m3": 3}
    for name, row in times.items():
        if "median_ms" in row:
            bytes_each = next(v for key, v in size.items() if name.startswith(key))
            row["gb_s"] = values * bytes_each / row["median_ms"] / 1e6
    return {"case": f"conversions E={E} N={N} K={K}", "forward": times}


def table(results: list[dict], ceiling: dict[str, float]) -> str:
    lines = ["ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in ceiling.items())]
    for result in results:
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
                    f" (p90 {row['p90_ms']:.3f}) {extra}"
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for bench.json and bench.txt")
    parser.add_argument("--tokens", default="8192,16384")
    parser.add_argument("--shapes", default="20b,120b-ep8,120b")
    parser.add_argument("--seconds", type=float, default=300.0, help="no case starts after this")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, one iteration: proves that every path runs")
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
    if args.tiny:
        moe = [((40, 24, 3, 2), 48, "zipf")]
        plan = [lambda: conversion_case(clock, (1, 16, 64)), lambda: movement_case(clock, 48, 40, 3, 2, True),
                lambda: projector_case(clock, "tiny", (1, 4, 2, 16, 24, 32))]  # fmt: skip
    else:
        tokens = [int(t) for t in args.tokens.split(",")]
        moe = [(mlp_cases.BENCH[s], t, r) for t in tokens for s in args.shapes.split(",") for r in ("balanced", "zipf")]
        plan = [
            lambda: conversion_case(clock, (32, 5760, 2880)),
            lambda: movement_case(clock, 8192, 2880, 32, 4, False),
        ]
        plan += [lambda n=n, s=s: projector_case(clock, n, s) for n, s in projector_cases.BENCH.items()]
    plan = [lambda m=m: moe_case(clock, m[0], m[1], m[2], args.tiny) for m in moe[:2]] + plan + [
        lambda m=m: moe_case(clock, m[0], m[1], m[2], args.tiny) for m in moe[2:]
    ]  # fmt: skip
    ceiling = ceilings(clock, args.tiny)
    results, left_out = [], 0
    for case in plan:
        if time.monotonic() > deadline:
            left_out += 1
            continue
        try:
            results.append(case())
        except torch.OutOfMemoryError as error:
            results.append({"case": "out of memory", "forward": {"all": {"not_run": str(error).splitlines()[0][:200]}}})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(args.out, results, ceiling, left_out)
    write(args.out, results, ceiling, left_out)
    print(table(results, ceiling))
    print(f"{left_out} cases did not fit in {args.seconds:g} s")
    return 0


def write(out: pathlib.Path, results: list[dict], ceiling: dict[str, float], left_out: int) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit,
    }  # fmt: skip
    (out / "bench.json").write_text(
        json.dumps({"machine": machine, "ceilings": ceiling, "left_out": left_out, "results": results}, indent=1) + "\n"
    )
    (out / "bench.txt").write_text(table(results, ceiling) + "\n")


if __name__ == "__main__":
    sys.exit(main())
