"""Compile every Triton kernel for Hopper on a machine without a GPU, and say what came out.

    python kernels/compile.py [--json FILE] [--only NAME] [--experts 4] [--slots 2] [--part 0/1]

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

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import triton
from every_kernel import every_op
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


def record_compilations(results: list[dict], only: str | None, part: tuple[int, int] = (0, 1)) -> None:
    """From now on a launch compiles and appends what came out; nothing runs.

    Args:
        part: (i, n): of every n kernels the i-th alone.
    """
    launch = JITFunction.run
    seen: set[tuple] = set()

    def run(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__
        options = {k: v for k, v in kwargs.items() if isinstance(v, (int, str, bool)) or v is None}
        dtypes = tuple(str(a.dtype) for a in args if torch.is_tensor(a))
        # The rest of what a kernel is compiled for: numbers that are 1 or divide by 16.
        sizes = tuple((a == 1, a % 16 == 0) for a in args if type(a) is int)
        key = (name, dtypes, sizes, *sorted((k, str(v)) for k, v in kwargs.items()))
        if key in seen or (only and only not in name):
            return None
        seen.add(key)
        if len(seen) % part[1] != part[0]:
            return None
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


def liger_kernels() -> None:
    """Every variant of Liger's kernels at GPT-oss 20B's sizes, which it would compile one after the other when it first
    runs. Its index is put in the place of one that only a GPU could make, its measurements in that of equal ones."""
    triton.knobs.autotuning.cache = False  # before its kernels are made: nobody may take these for measurements
    from liger_kernel.ops import fused_moe
    from triton.runtime.autotuner import Autotuner

    T, H, F, E, K = 8192, 2880, 2880, 32, 4

    def measure(self, *args, config, **meta):
        self.fn.run(*args, **{**meta, **config.all_kwargs()})
        return [1.0, 1.0, 1.0]

    def index(experts, num_experts, block_m_token=fused_moe.BLOCK_M_TOKEN):
        rows, tiles = torch.zeros(T * K, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        bounds = torch.zeros(num_experts + 1, dtype=torch.int32)
        return bounds[:-1], bounds, rows, rows, rows, tiles, tiles

    Autotuner._bench, fused_moe.compute_routing_metadata = measure, index
    bf16 = {"dtype": torch.bfloat16, "requires_grad": True}
    given = [torch.empty(shape, **bf16) for shape in ((T, H), (E, 2 * F, H), (E, H, F))]
    weights = torch.empty(T, K, **bf16)
    out = fused_moe.LigerFusedMoEFunction.apply(*given, torch.zeros(T, K, dtype=torch.int32), weights)
    out.backward(torch.empty_like(out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the table here")
    parser.add_argument("--only", help="only kernels whose name holds this")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--slots", type=int, default=2, help="experts of a token")
    parser.add_argument("--part", default="0/1", help="i/n: of every n kernels the i-th alone, for n processes")
    parser.add_argument(
        "--liger", action="store_true", help="Liger's kernels instead, which the benchmark compares with"
    )
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    triton.runtime.driver.set_active(HopperWithoutAGpu())
    for name, module in list(sys.modules.items()):
        if name.startswith("medgpt_kernels.") and hasattr(module, "triton_refusal"):
            module.triton_refusal = lambda *_: None
    results: list[dict] = []
    index, _, parts = args.part.partition("/")
    record_compilations(results, args.only, (int(index), int(parts)))
    if args.liger:
        liger_kernels()
    else:
        for call in every_op(args.experts, args.slots):
            call()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    too_big = [result["kernel"] for result in results if not result["fits"]]
    print(f"{len(results)} kernels compiled for sm_90; too much shared memory: {', '.join(too_big) or 'none'}")
    return 1 if too_big else 0


if __name__ == "__main__":
    sys.exit(main())
