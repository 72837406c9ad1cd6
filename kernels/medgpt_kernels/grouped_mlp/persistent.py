"""The products of ``triton`` with weights through TMA descriptors, by programs that go from tile to tile.

A descriptor is made on the host and holds shape and strides, so a load of a tile costs one thread one instruction and
no registers for addresses; what lies outside is zero. Rows that a product gathers by token come through pointers: TMA
gathers rows on Blackwell only. Tiles and the order of their sums are those of ``triton``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding
from medgpt_kernels.grouped_mlp.triton import (
    halves,
    load_row_scale,
    store_down_bwd,
    store_halves,
    store_product,
    tile_of,
)


@triton.jit
def live_tiles(counts_ptr, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Tiles that belong to an expert; they come first."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    return tl.sum((counts + TILE - 1) // TILE, 0)


@triton.jit
def load_weight(
    desc, scales_ptr, expert, k, n, K_SIZE, N_SIZE,
    KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_N) of one expert's weight from (k, n) on. K_FIRST: its rows are k, else they are n."""
    ROWS: tl.constexpr = BLOCK_K if K_FIRST else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_N if K_FIRST else BLOCK_K
    row, column = (k, n) if K_FIRST else (n, k)
    if KIND == "mxfp4":
        NUM_ROWS, WIDTH = (K_SIZE, N_SIZE) if K_FIRST else (N_SIZE, K_SIZE)
        packed = tl.reshape(desc.load([expert, row, column // 2]), (ROWS, COLUMNS // 2))
        rows, groups = row + tl.arange(0, ROWS), column // 32 + tl.arange(0, COLUMNS // 32)
        place = (expert.to(tl.int64) * NUM_ROWS + rows)[:, None] * (WIDTH // 32) + groups[None, :]
        scale = tl.load(scales_ptr + place, mask=(rows[:, None] < NUM_ROWS) & (groups[None, :] < WIDTH // 32), other=0)
        codes = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, COLUMNS // 32, 32))
        value = rounding.from_e2m1(codes) * rounding.from_e8m0(scale)[:, :, None]
        w = rounding.cast(tl.reshape(value, (ROWS, COLUMNS)), DTYPE)
    else:
        w = tl.reshape(desc.load([expert, row, column]), (ROWS, COLUMNS))
    return w if K_FIRST else tl.trans(w)


@triton.jit
def tile_product(
    a_ptr, a_desc, a_scales_ptr, a_rows, row_mask, first_row, w_desc, w_scales_ptr, expert, n, K_SIZE, N_SIZE,
    scale_stride_k, scale_stride_n, scale_stride_e,
    GATHER: tl.constexpr, KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``a @ w[expert]`` of one tile of rows and the columns from n on, in fp32.

    GATHER: the rows of ``a`` are ``a_rows``, else BLOCK_M of them from ``first_row`` on.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K_SIZE, BLOCK_K):
        if GATHER:
            columns = k + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (columns[None, :] < K_SIZE)
            a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + columns[None, :], mask=mask, other=0.0)
        else:
            a = a_desc.load([first_row, k])
        w = load_weight(w_desc, w_scales_ptr, expert, k, n, K_SIZE, N_SIZE, KIND, K_FIRST, DTYPE, BLOCK_K, BLOCK_N)
        if KIND == "fp8":  # BLOCK_N columns lie in one tile of 128
            scale = load_row_scale(a_scales_ptr, a_rows, row_mask, k, K_SIZE, KIND)
            tile = expert.to(tl.int64) * scale_stride_e + k // 128 * scale_stride_k + n // 128 * scale_stride_n
            scale *= tl.load(w_scales_ptr + tile, mask=n < N_SIZE, other=0.0)
            acc += rounding.product_e4m3(a, w) * scale[:, None]
        else:
            acc = rounding.product(a, w, acc)
    return acc


@triton.jit
def halves_product(
    a_ptr, a_scales_ptr, a_rows, row_mask, w_desc, w_scales_ptr, expert, n, K_SIZE, N_SIZE,
    scale_stride_k, scale_stride_n, scale_stride_e,
    KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As ``tile_product`` of gathered rows, at HALF columns and at as many after them: see ``triton.two_halves``."""
    left = tl.zeros((BLOCK_M, HALF), tl.float32)
    right = tl.zeros((BLOCK_M, HALF), tl.float32)
    for k in range(0, K_SIZE, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (columns[None, :] < K_SIZE)
        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + columns[None, :], mask=mask, other=0.0)
        w = load_weight(w_desc, w_scales_ptr, expert, k, n, K_SIZE, N_SIZE, KIND, K_FIRST, DTYPE, BLOCK_K, HALF)
        if KIND == "fp8":
            a_scale = load_row_scale(a_scales_ptr, a_rows, row_mask, k, K_SIZE, KIND)
            tile = expert.to(tl.int64) * scale_stride_e + k // 128 * scale_stride_k + n // 128 * scale_stride_n
            scale = a_scale * tl.load(w_scales_ptr + tile, mask=n < N_SIZE, other=0.0)
            left += rounding.product_e4m3(a, w) * scale[:, None]
        else:
            left = rounding.product(a, w, left)
        next_n = n + HALF
        w = load_weight(w_desc, w_scales_ptr, expert, k, next_n, K_SIZE, N_SIZE, KIND, K_FIRST, DTYPE, BLOCK_K, HALF)
        if KIND == "fp8":
            tile = expert.to(tl.int64) * scale_stride_e + k // 128 * scale_stride_k + next_n // 128 * scale_stride_n
            scale = a_scale * tl.load(w_scales_ptr + tile, mask=next_n < N_SIZE, other=0.0)
            right += rounding.product_e4m3(a, w) * scale[:, None]
        else:
            right = rounding.product(a, w, right)
    return left, right


@triton.jit
def gate_up_fwd_kernel(
    x_ptr, x_scales_ptr, w_desc, w_scales_ptr, bias_ptr, z_ptr, a_ptr, a_scales_ptr, row_entry_ptr, tile_expert_ptr,
    counts_ptr, H, G, E, scale_stride_k, scale_stride_n, scale_stride_e, limit,
    SLOTS: tl.constexpr, KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``triton.gate_up_fwd_kernel``."""
    num_m, num_n = live_tiles(counts_ptr, E, BLOCK_M, BLOCK_E), tl.cdiv(G, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = tile_of(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert_ptr + m)
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
        bias = bias_ptr + expert.to(tl.int64) * G
        first = n * (BLOCK_N // 2)
        HALF: tl.constexpr = BLOCK_N // 2
        if KIND == "plain":
            z = tile_product(
                x_ptr, x_ptr, x_scales_ptr, tokens, row_mask, 0, w_desc, w_scales_ptr, expert, n * BLOCK_N, H, G,
                scale_stride_k, scale_stride_n, scale_stride_e, True, KIND, K_FIRST, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            left, right = halves(z)
        else:
            left, right = halves_product(
                x_ptr, x_scales_ptr, tokens, row_mask, w_desc, w_scales_ptr, expert, n * BLOCK_N, H, G,
                scale_stride_k, scale_stride_n, scale_stride_e, KIND, K_FIRST, DTYPE, BLOCK_M, HALF, BLOCK_K,
            )  # fmt: skip
        columns = n * BLOCK_N + tl.arange(0, HALF)
        store_halves(
            left, right, bias, z_ptr, a_ptr, a_scales_ptr, rows, row_mask, columns, first, G, limit, KIND, DTYPE
        )


@triton.jit
def rows_kernel(
    a_desc, a_scales_ptr, w_desc, w_scales_ptr, bias_ptr, weights_ptr, out_ptr, row_entry_ptr, tile_expert_ptr,
    counts_ptr, K_SIZE, N_SIZE, E, scale_stride_k, scale_stride_n, scale_stride_e,
    BIAS: tl.constexpr, SCATTER: tl.constexpr, KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    FLATTEN: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``triton.rows_kernel``; its rows come through a descriptor too. Rows of padding hold anything: what is made
    of them is not stored.

    FLATTEN: one loop over all tiles and all of k, so that the next tile is loaded while this one is stored. It costs
    registers, which only this kernel has (``warp_specialize`` changes nothing on sm_90 in Triton 3.6).
    """
    num_m, num_n = live_tiles(counts_ptr, E, BLOCK_M, BLOCK_E), tl.cdiv(N_SIZE, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_of(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert_ptr + m)
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        out = tile_product(
            a_scales_ptr, a_desc, a_scales_ptr, rows, row_mask, m * BLOCK_M, w_desc, w_scales_ptr, expert, n * BLOCK_N,
            K_SIZE, N_SIZE, scale_stride_k, scale_stride_n, scale_stride_e, False, KIND, K_FIRST, DTYPE,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_product(
            out, bias_ptr, weights_ptr, out_ptr, rows, entry, row_mask, expert, columns, N_SIZE, BIAS, SCATTER, DTYPE
        )


@triton.jit
def down_bwd_kernel(
    grad_ptr, grad_scales_ptr, w_desc, w_scales_ptr, dots_ptr, z_ptr, weights_ptr, dz_ptr, dz_codes_ptr,
    dz_scales_ptr, weighted_a_ptr, grad_weight_ptr, row_entry_ptr, tile_expert_ptr, counts_ptr,
    H, F, E, num_rows, scale_stride_k, scale_stride_n, scale_stride_e, limit,
    SLOTS: tl.constexpr, KIND: tl.constexpr, K_FIRST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``triton.down_bwd_kernel``."""
    num_m, num_n = live_tiles(counts_ptr, E, BLOCK_M, BLOCK_E), tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = tile_of(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert_ptr + m)
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
        da = tile_product(
            grad_ptr, grad_ptr, grad_scales_ptr, tokens, row_mask, 0, w_desc, w_scales_ptr, expert, n * BLOCK_N, H, F,
            scale_stride_k, scale_stride_n, scale_stride_e, True, KIND, K_FIRST, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_down_bwd(
            da, dots_ptr, z_ptr, weights_ptr, dz_ptr, dz_codes_ptr, dz_scales_ptr, weighted_a_ptr, grad_weight_ptr,
            rows, entry, row_mask, tokens, expert, n, F, E, limit, num_rows, KIND, DTYPE,
        )  # fmt: skip
