"""Compile every Triton kernel for Hopper on a machine without a GPU, and say what came out.

    python kernels/compile.py [--json FILE] [--only NAME]

Each op runs once on small CPU tensors; a launch compiles its kernel with that call's own argument types and block sizes
and returns. ptxas comes with Triton. What this shows: the kernel is accepted, which matrix instructions it uses, its
registers, stack (spills) and shared memory. What it cannot show: speed, and whether the numbers are right (the
interpreter's tests show that).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import triton
from medgpt_kernels.cross_entropy import op as cross_entropy
from medgpt_kernels.grouped_mlp import launch as mlp_launch
from medgpt_kernels.grouped_mlp import routed
from medgpt_kernels.mx import op as mx
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import op as route
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT_BYTES = 227 * 1024
"""Of one block on sm_90."""


class HopperWithoutAGpu:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def registers(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, where what is spilled goes."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return {"registers": int(found[1]), "stack_bytes": int(found[2])} if found else {}


def record_compilations(results: list[dict], only: str | None) -> None:
    """From now on a launch compiles and appends what came out; nothing runs."""
    launch = JITFunction.run
    seen: set[tuple] = set()

    def run(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__
        options = {k: v for k, v in kwargs.items() if isinstance(v, (int, str, bool)) or v is None}
        dtypes = tuple(str(a.dtype) for a in args if torch.is_tensor(a))
        key = (name, dtypes, *sorted((k, str(v)) for k, v in kwargs.items()))
        if key in seen or (only and only not in name):
            return None
        seen.add(key)
        began = time.perf_counter()
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = compiled.asm["ptx"]
        results.append({
            "kernel": name, "options": options, "seconds": round(time.perf_counter() - began, 2),
            "by": self.fn.__module__.rpartition(".")[2], "warps": compiled.metadata.num_warps,
            "shared_bytes": compiled.metadata.shared,
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)), "mma": len(re.findall(r"\bmma\.sync", ptx)),
            "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
            "fits": compiled.metadata.shared <= SHARED_LIMIT_BYTES, **registers(compiled.asm["cubin"]),
        })  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
        return compiled

    JITFunction.run = run


def every_op() -> list[Callable[[], object]]:
    """Calls that reach every kernel with the settings training uses."""
    bf16 = {"dtype": torch.bfloat16}
    T, H, F, E, K = 256, 256, 256, 4, 2
    x = torch.zeros(T, H, **bf16)
    experts = torch.arange(T * K, dtype=torch.int32).view(T, K) % E
    index = route.index(experts, E, tile=128, implementation="reference")
    weights = torch.zeros(T, K)
    w1, w2 = torch.zeros(E, H, 2 * F, **bf16), torch.zeros(E, F, H, **bf16)
    b1, b2 = torch.zeros(E, 2 * F, **bf16), torch.zeros(E, H, **bf16)

    def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    def mlp(precision: str, slots: int, schedule: str):
        at = (
            index
            if slots > 1
            else route.index_sorted(torch.full((E,), T // E), T, tile=128, implementation="reference")
        )
        given = leaves(x, weights[:, :slots].contiguous(), w1, b1, w2, b2)
        out = routed.routed_mlp(
            given[0], given[1], at, *given[2:], limit=7.0, precision=precision, implementation=schedule
        )
        out.sum().backward()

    def frozen(schedule: str):
        packed = [
            routed.packed(
                torch.zeros(E, n, k // 32, 16, dtype=torch.uint8), torch.zeros(E, n, k // 32, dtype=torch.uint8)
            )
            for n, k in ((2 * F, H), (H, F))
        ]
        given = leaves(x, weights)
        out = routed.routed_mlp_frozen(*given, index, packed[0], b1, packed[1], b2, limit=7.0, implementation=schedule)
        out.sum().backward()

    def router():
        given = leaves(x, torch.zeros(E, H, **bf16), torch.zeros(E, **bf16), torch.zeros(H, **bf16))
        got = route.route(*given[:3], top_k=K, norm_H=given[3], quantise=True, implementation="triton")
        (got.weights_TK.sum() + got.normed_TH.sum()).backward()
        for tile in (1, 128):
            route.index(experts, E, tile=tile, histogram=got.histogram, implementation="triton")
        route.index(experts, E, tile=128, implementation="triton")
        route.index_sorted(torch.full((E,), T // E), T, tile=128, implementation="triton")
        logits = torch.zeros(T, E, requires_grad=True)
        sum(route.losses(logits, torch.ones(E), torch.ones(T), torch.ones(()), implementation="triton")).backward()

    def movement():
        given = leaves(x, weights)
        permute.combine(permute.permute(given[0], index, implementation="triton"), given[1], index,
                        implementation="triton").sum().backward()  # fmt: skip
        payload = permute.pack_fp8(x, index, implementation="triton")
        permute.unpack_fp8(payload, H, torch.bfloat16, implementation="triton")

    def formats():
        mx.quantise_rows(x, implementation="triton")
        mx.quantise_tiles(w1, implementation="triton")
        for mode in ("up", "floor"):
            blocks, scales = mx.quantise_mxfp4(w1, mode=mode, implementation="triton")
        mx.dequantise_mxfp4(blocks, scales, implementation="triton")
        mx.mxfp4_to_e4m3(blocks, scales, implementation="triton")

    def image_rows(fold: int, norm: bool):
        D = fold * fold * H
        at = projector.placement(range(16 // fold**2), range(16 // fold**2), num_images=1, side=4, fold=fold)
        given = leaves(torch.zeros(32, 1, H, **bf16), torch.zeros(1, 16, H, **bf16), torch.zeros(H, D, **bf16), b2[0],
                       torch.zeros(H, H, **bf16), b2[0])  # fmt: skip
        shift = tuple(leaves(torch.ones(D, **bf16), torch.zeros(D, **bf16))) if norm else None
        projector.project_into(given[0], given[1], at, *given[2:], norm=shift, implementation="triton").sum().backward()

    def loss():
        given = leaves(x, torch.zeros(2048, H, **bf16))
        labels = torch.zeros(T, dtype=torch.int64)
        cross_entropy.cross_entropy(*given, labels, implementation="triton").sum().backward()

    calls = [
        formats,
        router,
        movement,
        lambda: mlp("bf16", 1, "triton"),
        *(lambda s=s, p=p: mlp(p, 2, s) for s in mlp_launch.SCHEDULES for p in ("bf16", "fp8")),
        *(lambda s=s: frozen(s) for s in mlp_launch.SCHEDULES),
        loss,
    ]
    return [*calls, lambda: image_rows(1, False), lambda: image_rows(2, True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the table here")
    parser.add_argument("--only", help="only kernels whose name holds this")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    triton.runtime.driver.set_active(HopperWithoutAGpu())
    for name, module in list(sys.modules.items()):
        if name.startswith("medgpt_kernels.") and hasattr(module, "triton_refusal"):
            module.triton_refusal = lambda *_: None
    results: list[dict] = []
    record_compilations(results, args.only)
    for call in every_op():
        call()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    too_big = [result["kernel"] for result in results if not result["fits"]]
    print(f"{len(results)} kernels compiled for sm_90; too much shared memory: {', '.join(too_big) or 'none'}")
    return 1 if too_big else 0


if __name__ == "__main__":
    sys.exit(main())
