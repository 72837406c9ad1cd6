"""How the products of rows and weights are launched: every schedule sums the same products, and takes its own time.

``triton`` loads weights through pointers, one program a tile. ``tma`` loads them through descriptors; in
``tma-persistent`` as many programs as the GPU has multiprocessors go from tile to tile, so that none waits for the
slowest of a wave. ``tma-wide`` multiplies rows, and makes the gradients of weights, in tiles of 256 columns too,
which ask the second cache for three quarters of the bytes; of 2880 columns its last tile has a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.dispatch import check, triton_refusal
from medgpt_kernels.mx.op import sum_block, triton_dtype
from medgpt_kernels.route.blocks import block_e
from medgpt_kernels.route.rows import RowIndex

GROUP = 8
"""Tiles of rows that are worked on together, so that they share an expert's weights in the cache."""
FORWARD_COLUMNS, ROW_COLUMNS = 256, 128
"""Columns of a tile of z, and of a product of rows."""
CPU_PROGRAMS = 3
"""Programs of a persistent launch in the interpreter: each has several tiles even in a small case."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A way to launch the products."""

    descriptors: bool = False
    persistent: bool = False
    num_stages: int = 3
    num_warps: int = 8
    row_columns: int = ROW_COLUMNS
    """Of a tile of a product of rows with plain weights."""
    grad_columns: int = 128
    """Of a tile of a weight's gradient."""

    def blocks(self, kind: str, tile: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
        return {
            "BLOCK_M": tile, "BLOCK_N": columns, "BLOCK_K": 128 if kind == "fp8" else sum_block(dtype), "GROUP": GROUP,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    def grid(self, num_tiles: int, device: torch.device) -> tuple[int]:
        if not self.persistent:
            return (num_tiles,)
        if device.type != "cuda":
            return (min(num_tiles, CPU_PROGRAMS),)
        return (min(num_tiles, torch.cuda.get_device_properties(device).multi_processor_count),)


SCHEDULES = {
    "triton": Schedule(),
    "tma": Schedule(descriptors=True),
    "tma-4-stages": Schedule(descriptors=True, num_stages=4),
    "tma-wide": Schedule(descriptors=True, row_columns=256, grad_columns=256),
    "tma-persistent": Schedule(descriptors=True, persistent=True),
}
"""By the names of implementations. ``auto`` takes the first: none is known to be faster until a GPU has shown it."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One projection of all experts as the kernels read it; a logical (E, K, N) matrix."""

    kind: str
    forward: Tensor | None
    """Of the forward pass, None where it was not made. plain: (E, K, N). fp8: float8_e4m3fn (E, N, K), K contiguous for
    Hopper's FP8 products. mxfp4: blocks (E, N, K / 32, 16)."""
    backward: Tensor | None
    """Of the backward pass, or None. plain and mxfp4: the same tensor. fp8: (E, K, N), contiguous along the axis that
    the gradient reduces."""
    scales: Tensor
    """fp8: fp32 (E, ceil(K / 128), ceil(N / 128)). mxfp4: (E, N, K / 32) uint8. plain: unused."""
    sizes: tuple[int, int]
    """(K, N)."""

    def stored(self, *, transposed: bool) -> Tensor:
        """What one pass reads."""
        found = self.backward if transposed else self.forward
        check(found is not None, f"weights were not made for the {'backward' if transposed else 'forward'} pass")
        assert found is not None
        return found

    def strides(self, *, transposed: bool) -> tuple[int, int]:
        """Strides of k and n in the weight."""
        K, N = self.sizes
        if transposed:  # k runs over N and n over K
            return 1, N
        return (1, K) if self.kind == "fp8" else (N, 1)

    def scale_strides(self, *, transposed: bool) -> tuple[int, int, int]:
        """Strides of k, n and an expert in the scales."""
        tiles = tuple(cdiv(size, 128) for size in self.sizes)
        return (1, tiles[1], tiles[0] * tiles[1]) if transposed else (tiles[1], 1, tiles[0] * tiles[1])

    def descriptor(self, *, transposed: bool, block_k: int, block_n: int) -> tuple[object, bool]:
        """What loads a (block_k, block_n) tile, and whether the rows it loads are k."""
        rows_are_k = (self.kind == "mxfp4") if transposed else (self.kind == "plain")
        block = [1, block_k, block_n] if rows_are_k else [1, block_n, block_k]
        stored = self.stored(transposed=transposed)
        if self.kind == "mxfp4":
            stored, block[2] = stored.flatten(2), block[2] // 2
        return descriptor(stored, block), rows_are_k


def backward_columns(kind: str) -> int:
    """Of a tile of the gradient of a: in FP8 those of one group of 128 columns of dz, which are rounded together."""
    return 64 if kind == "fp8" else 128


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def descriptor(tensor: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    check(tensor.data_ptr() % 16 == 0, "a tensor that is loaded by descriptors must begin at a multiple of 16 bytes")
    return TensorDescriptor.from_tensor(tensor, block)


def refusal(name: str, x: Tensor, widths: tuple[int, ...], row_bytes: float) -> str | None:
    """Why a schedule cannot serve, or None.

    Args:
        widths: columns of what descriptors load; row_bytes: of one column.
    """
    because = triton_refusal(x)
    if because or not SCHEDULES[name].descriptors:
        return because
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "TMA descriptors need compute capability 9.0 or later"
    for width in widths:
        if width * row_bytes % 16:
            return f"rows of {width} columns take {width * row_bytes:g} bytes; TMA descriptors need multiples of 16"
    return None


def _kernels(schedule: Schedule):
    from medgpt_kernels.grouped_mlp import persistent, triton

    return persistent if schedule.descriptors else triton


def _weight_arguments(schedule: Schedule, w: Weights, blocks: dict[str, int], *, transposed: bool) -> tuple:
    """(weight, strides for pointers, named arguments)."""
    if not schedule.descriptors:
        return w.stored(transposed=transposed), w.strides(transposed=transposed), {}
    made, rows_are_k = w.descriptor(transposed=transposed, block_k=blocks["BLOCK_K"], block_n=blocks["BLOCK_N"])
    return made, (), {"K_FIRST": rows_are_k}


def gate_up_fwd(schedule: Schedule, x, x_scales, w: Weights, bias, z, a, a_scales, index: RowIndex, limit, slots):
    """Fills z, a and (fp8) the scales of a."""
    (H, G), num_m = w.sizes, index.num_rows // index.tile
    blocks = schedule.blocks(w.kind, index.tile, FORWARD_COLUMNS, z.dtype)
    tile = blocks if w.kind == "plain" else {**blocks, "BLOCK_N": FORWARD_COLUMNS // 2}  # a half is loaded at a time
    weight, strides, named = _weight_arguments(schedule, w, tile, transposed=False)
    scale_strides, named = w.scale_strides(transposed=False), {**named, **blocks}
    made = (x, x_scales, weight, w.scales, bias, z, a, a_scales, index.row_entry, index.tile_expert)
    common = {"SLOTS": slots, "KIND": w.kind, "DTYPE": triton_dtype(z.dtype)}
    launch = _kernels(schedule).gate_up_fwd_kernel[schedule.grid(num_m * cdiv(G, FORWARD_COLUMNS), z.device)]
    if schedule.descriptors:
        E = index.counts.shape[0]
        launch(*made, index.counts, H, G, E, *scale_strides, limit, BLOCK_E=block_e(E), **common, **named)
    else:
        launch(*made, H, G, *strides, *scale_strides, limit, num_m, **common, **named)


def rows_times(
    schedule: Schedule, rows, row_scales, w: Weights, bias, weights_TK, out, index: RowIndex, *, transposed: bool
) -> None:
    """Fills ``out`` with rows times their expert's weight, plus its bias where there is one. Where a token has one
    slot a row goes to its token, times its weight where there is a bias."""
    K, N = w.sizes[::-1] if transposed else w.sizes
    num_m, columns = index.num_rows // index.tile, schedule.row_columns if w.kind == "plain" else ROW_COLUMNS
    blocks = schedule.blocks(w.kind, index.tile, columns, out.dtype)
    weight, strides, named = _weight_arguments(schedule, w, blocks, transposed=transposed)
    scale_strides, named = w.scale_strides(transposed=transposed), {**named, **blocks}
    common = {
        "BIAS": bias is not None, "SCATTER": weights_TK.shape[1] == 1, "KIND": w.kind, "DTYPE": triton_dtype(out.dtype)
    }  # fmt: skip
    launch = _kernels(schedule).rows_kernel[schedule.grid(num_m * cdiv(N, columns), out.device)]
    behind = (row_scales, weight, w.scales, out if bias is None else bias, weights_TK, out, index.row_entry,
              index.tile_expert)  # fmt: skip
    if schedule.descriptors:
        E, loaded = index.counts.shape[0], descriptor(rows, [blocks["BLOCK_M"], blocks["BLOCK_K"]])
        launch(loaded, *behind, index.counts, K, N, E, *scale_strides, FLATTEN=schedule.persistent,
               BLOCK_E=block_e(E), **common, **named)  # fmt: skip
    else:
        launch(rows, *behind, K, N, *strides, *scale_strides, num_m, ALONG_K=not transposed, **common, **named)


def down_bwd(
    schedule: Schedule, grad, grad_scales, w: Weights, dots_TE, z, weights_TK, dz, dz_codes, dz_scales, weighted_a,
    parts, index: RowIndex, limit,
) -> None:  # fmt: skip
    """Fills dz, ``weight * a``, each tile's part of the router weights' gradient, and (fp8) dz as FP8 rows."""
    (F, H), num_m = w.sizes, index.num_rows // index.tile
    columns = backward_columns(w.kind)
    blocks = schedule.blocks(w.kind, index.tile, columns, z.dtype)
    weight, strides, named = _weight_arguments(schedule, w, blocks, transposed=True)
    scale_strides, named = w.scale_strides(transposed=True), {**named, **blocks}
    made = (grad, grad_scales, weight, w.scales, dots_TE, z, weights_TK, dz, dz_codes, dz_scales, weighted_a, parts,
            index.row_entry, index.tile_expert)  # fmt: skip
    common = {"SLOTS": weights_TK.shape[1], "KIND": w.kind, "DTYPE": triton_dtype(z.dtype)}
    launch = _kernels(schedule).down_bwd_kernel[schedule.grid(num_m * cdiv(F, columns), z.device)]
    E = index.counts.shape[0]
    if schedule.descriptors:
        launch(*made, index.counts, H, F, E, index.num_rows, *scale_strides, limit, BLOCK_E=block_e(E), **common,
               **named)  # fmt: skip
    else:
        launch(*made, H, F, E, *strides, *scale_strides, limit, num_m, **common, **named)
