"""The MoE layer beside its peers, its products alone, and experts that do not learn, for ``bench.py``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial

import peers
import torch
from bench_clock import Clock
from medgpt_kernels.grouped_mlp import cases as mlp_cases
from medgpt_kernels.grouped_mlp import routed, routed_reference
from medgpt_kernels.mx import op as mx
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route
from torch import Tensor

LIMIT = peers.LIMIT
LIGER = "liger (no bias, plain SwiGLU)"
ROUNDED = "ours fp8, weights rounded before"
BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""Of the relative error of an output or a gradient: bf16 keeps 8 bits, E4M3 4."""
LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {LIGER: peers.liger_layout}
"""Peers that keep weights in another layout than GPT-oss's, and how they get it, outside what is timed."""


def in_layout(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return LAYOUTS.get(name, dict)(given)


@functools.cache
def compiled(backend: str) -> Callable[..., Tensor]:
    """One for all cases, so that the same shapes are compiled once. At the default limit of 8 recompilations PyTorch
    would go on uncompiled without a word."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(peers.grouped_mm, dynamic=False, backend=backend)


def moe_variants(
    given: dict[str, Tensor], experts: Tensor, num_experts: int, tile: int
) -> dict[str, Callable[..., Tensor]]:
    """Ours and the peers as functions of (x, weights, w1, b1, w2, b2); the index is part of what is timed."""
    _, H, G = given["gate_up_EHG"].shape
    rounded: list = []

    def index() -> route.RowIndex:
        return route.index(experts, num_experts, tile=tile, implementation="triton")

    def ours(precision: str) -> Callable[..., Tensor]:
        return lambda x, w, *rest: routed.routed_mlp(
            x, w, index(), *rest, limit=LIMIT, precision=precision, implementation="triton"
        )

    def rounded_before(x, w, w1, b1, w2, b2):
        if not rounded:
            rounded.append(tuple(routed.to_fp8(stack, implementation="triton") for stack in (w1, w2)))
        return routed.routed_mlp(
            x, w, index(), w1, b1, w2, b2, limit=LIMIT, precision="fp8", rounded=rounded[0], implementation="triton"
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

    backend = "inductor" if given["x_TH"].is_cuda else "aot_eager"  # a rehearsal traces it and compiles nothing
    variants = {
        "ours bf16": ours("bf16"),
        "ours fp8": ours("fp8"),
        ROUNDED: rounded_before,
        "torch grouped_mm, eager": through(peers.grouped_mm),
        "torch grouped_mm, compiled": through(compiled(backend)),
        "megatron-core order": through(peers.megatron_core),
    }
    for name in ("eager", "grouped_mm"):
        variants[f"transformers, {name}"] = late(lambda n=name: peers.transformers_experts(num_experts, H, G // 2, n))
    variants[LIGER] = late(peers.liger)
    return variants


def distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm, part by part: whole stacks of a 120B in fp64 are too many at a time."""
    size = max(1, -(-found.shape[0] // 32))
    parts = [((a.double() - b).square().sum(), b.square().sum()) for a, b in zip(found.split(size), exact.split(size))]
    off, whole = (torch.stack(column).sum().sqrt() for column in zip(*parts))
    return float(off / whole)


def check_variants(
    variants: dict[str, Callable[..., Tensor]], given: dict[str, Tensor], experts: Tensor, grad: Tensor
) -> tuple[dict, dict]:
    """Variants whose output and gradients are right at the size that is timed, against fp64, and why the others are
    left out. Liger computes something else (its name says what), so there is nothing to hold it to."""

    def outcome(call, leaves: list[Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    wide = [value.detach().double().requires_grad_() for value in given.values()]
    exact = outcome(lambda x, w, *rest: routed_reference.routed_mlp(x, w, experts, *rest, limit=LIMIT), wide)
    del wide
    right, wrong = {}, {}
    for name, call in variants.items():
        if name == LIGER:
            right[name] = call
            continue
        bound = BOUNDS["fp8" if "fp8" in name else "bf16"]
        try:
            found = outcome(call, [value.detach().requires_grad_() for value in given.values()])
            errors = {n: distance(a, b) for n, a, b in zip(("output", *given), found, exact)}
        except Exception as problem:
            wrong[name] = {"not_run": why(problem)}
            continue
        off = {n: error for n, error in errors.items() if not error <= bound}
        if off:
            wrong[name] = {"not_run": "wrong, relative error of " + ", ".join(f"{n} {e:.3g}" for n, e in off.items())}
        else:
            right[name] = call
    return right, wrong


def why(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"


def moe_case(
    clock: Clock, shape: tuple[int, int, int, int], T: int, routing: str, tiny: bool,
    named: Callable[[str], bool] = lambda name: True,
) -> dict:  # fmt: skip
    """The layer behind the router beside its peers.

    Args:
        named: which of ours and the peers.
    """
    H, F, E, K = shape
    experts = (
        route_cases.balanced_experts(T, E, K) if routing == "balanced" else route_cases.zipf_experts(T, E, K, seed=0)
    )
    experts = experts.to(clock.device)
    given = {
        **mlp_cases.inputs(16, H, F, E, K, dtype=torch.bfloat16, seed=0, spread=1.0, device=clock.device),
        **random_tokens(T, H, K, clock.device),
    }
    variants = moe_variants(given, experts, E, 16 if tiny else 128)
    grad = torch.randn_like(given["x_TH"])
    variants, wrong = check_variants({n: c for n, c in variants.items() if named(n)}, given, experts, grad)
    flops = 6.0 * T * K * H * F
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    own = {name: list(in_layout(name, leaves).values()) for name in variants}
    forward = clock.compare({name: (lambda c=call, n=name: _no_grad(c, own[n])) for name, call in variants.items()})

    def both(name, call):
        return lambda: torch.autograd.grad(call(*own[name]), own[name], grad, allow_unused=True)

    backward = clock.compare({name: both(name, call) for name, call in variants.items()})
    saved = {}
    if clock.device.type == "cuda":
        for name, call in variants.items():
            before = torch.cuda.memory_allocated()
            try:
                out = call(*own[name])
                saved[name] = torch.cuda.memory_allocated() - before
                del out
            except Exception as error:
                print(f"{name}: saved memory was not measured: {type(error).__name__}: {error}", file=sys.stderr)
                saved[name] = None
    for table, factor in ((forward, 1), (backward, 3)):
        for row in table.values():
            if "median_ms" in row:
                row["tflop_s"] = factor * flops / row["median_ms"] / 1e9
    naive = 2 * (T * H + T * K * (H + 2 * F + F + H))  # x, its permuted rows, before and after the activation, outputs
    return {
        "case": f"moe T={T} H={H} E={E} K={K} {routing}", "forward": {**forward, **wrong},
        "forward_backward": backward, "saved_bytes": saved, "naive_saved_bytes": naive,
    }  # fmt: skip


def liger_case(clock: Clock, shape: tuple[int, int, int, int], T: int, tiny: bool) -> dict:
    """Ours beside Liger's, alone: it tries 240 variants of its kernels first, at this size, and would keep everything
    else waiting. The cases after it find them chosen."""
    result = moe_case(clock, shape, T, "balanced", tiny, lambda name: name in ("ours bf16", LIGER))
    return {**result, "case": result["case"].replace("moe", "liger", 1)}


def products_case(clock: Clock, shape: tuple[int, int, int, int], T: int, tiny: bool) -> dict:
    """The two grouped products without gather and sum: rows that lie sorted, each a token of one slot."""
    H, F, E, K = shape
    M = T * K
    experts = route_cases.balanced_experts(T, E, K)
    counts = torch.bincount(experts.flatten().long(), minlength=E).to(clock.device)
    given = {**mlp_cases.inputs(16, H, F, E, 1, dtype=torch.bfloat16, seed=0, device=clock.device),
             **random_tokens(M, H, 1, clock.device)}  # fmt: skip
    x, weights, w1, b1, w2, b2 = given.values()
    index = route.index_sorted(counts, M, tile=16 if tiny else 128, implementation="triton")
    fp8 = routed.to_fp8(w1, implementation="triton"), routed.to_fp8(w2, implementation="triton")
    options = {"limit": LIMIT, "implementation": "triton"}
    times = clock.compare({
        "ours bf16": lambda: routed.routed_mlp(x, weights, index, w1, b1, w2, b2, **options),
        "ours fp8": lambda: routed.routed_mlp(x, weights, index, w1, b1, w2, b2, precision="fp8", **options),
        ROUNDED: lambda: routed.routed_mlp_frozen(x, weights, index, fp8[0], b1, fp8[1], b2, limit=LIMIT),
    })  # fmt: skip
    for row in times.values():
        if "median_ms" in row:
            row["tflop_s"] = 6.0 * M * H * F / row["median_ms"] / 1e9
    return {"case": f"products T={T} H={H} E={E} K={K} balanced", "forward": times}


def frozen_case(clock: Clock, shape: tuple[int, int, int, int], T: int, tiny: bool) -> dict:
    """Experts that do not learn, in every format, on the same numbers; ``each pass`` makes them anew, as training
    does that keeps the packed ones alone."""
    H, F, E, K = shape
    given = {**mlp_cases.inputs(16, H, F, E, K, dtype=torch.bfloat16, seed=0, device=clock.device),
             **random_tokens(T, H, K, clock.device)}  # fmt: skip
    x, weights, w1, b1, w2, b2 = given.values()
    experts = route_cases.balanced_experts(T, E, K).to(clock.device)
    index = route.index(experts, E, tile=16 if tiny else 128, implementation="triton")
    packed = [mx.quantise_mxfp4(w.transpose(1, 2).contiguous()) for w in (w1, w2)]
    rounded = [mx.dequantise_mxfp4(*p).transpose(1, 2).contiguous() for p in packed]
    made = {
        "bf16": [routed.plain(w) for w in rounded],
        "fp8": [routed.to_fp8(w) for w in rounded],
        "mxfp4 in e4m3": [routed.packed_to_fp8(*p) for p in packed],
        "mxfp4 in e4m3, each pass": [partial(routed.packed_to_fp8, *p, checked=True) for p in packed],
        "mxfp4 decoded in the product": [routed.packed(*p) for p in packed],
    }
    x.requires_grad_(), weights.requires_grad_()
    grad = torch.randn_like(x)
    calls = {
        name: (lambda w=w: routed.routed_mlp_frozen(x, weights, index, w[0], b1, w[1], b2, limit=LIMIT))
        for name, w in made.items()
    }
    few = min(T, 64)
    exact = routed_reference.routed_mlp(
        *(t.detach().double() for t in (x[:few], weights[:few])), experts[:few], rounded[0].double(), b1.double(),
        rounded[1].double(), b2.double(), limit=LIMIT,
    )  # fmt: skip
    wrong = {}
    for name, call in list(calls.items()):
        error = float((call().detach()[:few].double() - exact).norm() / exact.norm())
        if error > (0.02 if name in ("bf16", "mxfp4 decoded in the product") else 0.15):
            wrong[name] = {"not_run": f"wrong answer: relative error {error:.3g}"}
            calls.pop(name)

    def forward(call):
        with torch.no_grad():
            return call()

    return {
        "case": f"frozen T={T} H={H} E={E} K={K} balanced",
        "forward": {**clock.compare({n: (lambda c=c: forward(c)) for n, c in calls.items()}), **wrong},
        "forward_backward": clock.compare(
            {n: (lambda c=c: torch.autograd.grad(c(), (x, weights), grad)) for n, c in calls.items()}
        ),
    }


def random_tokens(T: int, H: int, K: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(T, H, generator=generator, device=device).to(torch.bfloat16)
    return {"x_TH": x, "weights_TK": torch.softmax(torch.randn(T, K, generator=generator, device=device), -1)}


def _no_grad(call: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return call(*given)
