"""One small launch of every kernel, with the settings training uses.

    python kernels/every_kernel.py      on a GPU, for compute-sanitizer

``compile.py`` takes the same calls to compile them where there is none.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from medgpt_kernels import nvcc
from medgpt_kernels.cross_entropy import op as cross_entropy
from medgpt_kernels.grouped_mlp import launch as mlp_launch
from medgpt_kernels.grouped_mlp import routed
from medgpt_kernels.mx import op as mx
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import op as route


def every_op(num_experts: int = 4, slots: int = 2) -> list[Callable[[], object]]:
    """Calls that reach every kernel with the settings training uses, on PyTorch's default device."""
    device = torch.get_default_device()
    made_by = "triton" if device.type == "cuda" else "reference"
    bf16 = {"dtype": torch.bfloat16}
    T, H, F, E, K = 256, 256, 256, num_experts, slots
    x = torch.zeros(T, H, **bf16)
    experts = torch.arange(T * K, dtype=torch.int32).view(T, K) % E
    index = route.index(experts, E, tile=128, implementation=made_by)
    weights = torch.zeros(T, K)
    w1, w2 = torch.zeros(E, H, 2 * F, **bf16), torch.zeros(E, F, H, **bf16)
    b1, b2 = torch.zeros(E, 2 * F, **bf16), torch.zeros(E, H, **bf16)

    def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    def mlp(precision: str, slots: int, schedule: str):
        at = index if slots > 1 else route.index_sorted(torch.full((E,), T // E), T, tile=128, implementation=made_by)
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
        routed.to_fp8(w1, implementation="triton")
        for name in ("triton", "cuda") if device.type == "cuda" and nvcc.find() else ("triton",):
            mx.quantise_mxfp4(w1, implementation=name)
            mx.dequantise_mxfp4(blocks, scales, implementation=name)
            for plain, flipped in ((True, False), (False, True), (True, True)):
                mx.mxfp4_to_e4m3_in(blocks, scales, plain=plain, flipped=flipped, implementation=name)

    def image_rows(fold: int, norm: bool):
        D = fold * fold * H
        at = projector.placement(range(16 // fold**2), range(16 // fold**2), num_images=1, side=4, fold=fold,
                                 device=device)  # fmt: skip
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
        *(lambda p=p: mlp(p, 1, "triton") for p in ("bf16", "fp8")),
        *(lambda s=s, p=p: mlp(p, K, s) for s in mlp_launch.SCHEDULES for p in ("bf16", "fp8")),
        *(lambda s=s: frozen(s) for s in mlp_launch.SCHEDULES),
        loss,
    ]
    return [*calls, lambda: image_rows(1, False), lambda: image_rows(2, True)]


def main() -> int:
    if not torch.cuda.is_available():
        print("every_kernel.py needs a GPU; compile.py compiles the same kernels without one", file=sys.stderr)
        return 2
    torch.set_default_device("cuda")
    for call in every_op():
        call()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
