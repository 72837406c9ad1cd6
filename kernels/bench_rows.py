"""Moving rows, projecting image tokens and converting weights beside their peers, for ``bench.py``."""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from bench_clock import Clock
from bench_moe import BOUNDS, distance, random_tokens
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx import reference as mx_reference
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route


def hold(what: str, ok: bool) -> None:
    """Refuse to time what is wrong.

    Raises:
        RuntimeError: not ``ok``.
    """
    if not ok:
        raise RuntimeError(f"{what}: wrong answer")


def movement_case(clock: Clock, T: int, H: int, E: int, K: int, tiny: bool) -> dict:
    """Index, permute and combine beside argsort, index_select and index_add."""
    experts = route_cases.zipf_experts(T, E, K, seed=0).to(clock.device)
    given = random_tokens(T, H, K, clock.device)
    index = route.index(experts, E, tile=16 if tiny else 128, implementation="triton")
    rows = permute.permute(given["x_TH"], index, implementation="triton")
    weights, x = given["weights_TK"], given["x_TH"]
    plain = route.index(experts, E, tile=index.tile, implementation="reference")
    for part in ("row_entry", "token_row", "tile_expert", "counts"):
        hold(f"index, {part}", torch.equal(getattr(index, part), getattr(plain, part)))
    hold("permute", torch.equal(rows, permute.permute(x, index, implementation="reference")))
    packed, expected = (permute.pack_fp8(x, index, implementation=i) for i in ("triton", "reference"))
    hold("permute to fp8", torch.equal(packed, expected))
    sums, expected = (permute.combine(rows, weights, index, implementation=i) for i in ("triton", "reference"))
    hold("combine", distance(sums, expected.double()) <= BOUNDS["bf16"])
    del plain, packed, expected, sums
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
    for what, a, b in zip(
        ("output", "text", "features", "w1", "b1", "w2", "b2"),
        *((c(), *torch.autograd.grad(c(), leaves, grad)) for c in (ours, eager)),
    ):
        hold(f"projector, {what}", distance(a.detach(), b.detach().double()) <= BOUNDS["bf16"])
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
    for name in names:
        for what, made, expected in (
            ("bf16 to mxfp4", mx.quantise_mxfp4(w, implementation=name), mx_reference.quantise_mxfp4(w[:1])),
            ("mxfp4 to bf16", (mx.dequantise_mxfp4(blocks, scales, implementation=name),),
             (mx_reference.dequantise_mxfp4(blocks[:1], scales[:1]),)),
            ("mxfp4 to e4m3", mx.mxfp4_to_e4m3(blocks, scales, implementation=name),
             mx_reference.mxfp4_to_e4m3(blocks[:1], scales[:1])),
        ):  # fmt: skip
            same = all(torch.equal(a[:1].view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made, expected))
            hold(f"{what}, {name}", same)
    calls: dict[str, Callable] = {}
    for name in names:
        calls[f"mxfp4 to bf16, {name}"] = lambda n=name: mx.dequantise_mxfp4(blocks, scales, implementation=n)
        calls[f"mxfp4 to e4m3, {name}"] = lambda n=name: mx.mxfp4_to_e4m3(blocks, scales, implementation=n)
        calls[f"bf16 to mxfp4, {name}"] = lambda n=name: mx.quantise_mxfp4(w, implementation=n)
    calls["bf16 to e4m3 tiles"] = lambda: mx.quantise_tiles(w, implementation="triton")
    calls["bf16 to e4m3 tiles, transposed"] = lambda: mx.quantise_tiles_in(
        w, plain=False, flipped=True, implementation="triton"
    )
    times = clock.compare(calls)
    values = E * N * K
    size = {"mxfp4 to bf16": 2 + 17 / 32, "mxfp4 to e4m3": 1 + 17 / 32, "bf16 to mxfp4": 2 + 17 / 32, "bf16 to e4m3": 3}
    for name, row in times.items():
        if "median_ms" in row:
            bytes_each = next(v for key, v in size.items() if name.startswith(key))
            row["gb_s"] = values * bytes_each / row["median_ms"] / 1e6
    return {"case": f"conversions E={E} N={N} K={K}", "forward": times}
