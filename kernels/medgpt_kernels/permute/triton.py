"""Row movement: every output is written once, in an order that never varies; sums are in fp32 without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding


@triton.jit
def permute_kernel(
    x_ptr, row_entry_ptr, weights_ptr, rows_ptr, R, H,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Row = its token, times its router weight with WEIGHTED (the gradient of combine); zeros on padding."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    entry = tl.load(row_entry_ptr + rows, mask=rows < R, other=-1)
    tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
    inside = columns[None, :] < H
    x = tl.load(x_ptr + tokens[:, None] * H + columns[None, :], mask=(entry[:, None] >= 0) & inside, other=0.0)
    if WEIGHTED:
        weight = tl.load(weights_ptr + tl.maximum(entry, 0), mask=entry >= 0, other=0.0)
        x = rounding.cast(x.to(tl.float32) * weight[:, None], DTYPE)
    tl.store(rows_ptr + rows[:, None] * H + columns[None, :], x, mask=(rows[:, None] < R) & inside)


@triton.jit
def pack_fp8_kernel(
    x_ptr, row_entry_ptr, payload_ptr, R, H, P, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """One program: one group of 128 columns of BLOCK_R rows, codes and scale byte; the last one also the zeros."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    entry = tl.load(row_entry_ptr + rows, mask=rows < R, other=-1)
    tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
    inside = columns[None, :] < H
    x = tl.load(x_ptr + tokens[:, None] * H + columns[None, :], mask=(entry[:, None] >= 0) & inside, other=0.0)
    x = x.to(tl.float32)
    exponent = rounding.e4m3_exponent(tl.max(rounding.finite_size(x), 1))
    codes = rounding.to_e4m3(x * rounding.power_of_two(-exponent)[:, None])
    tl.store(payload_ptr + rows[:, None] * P + columns[None, :], codes, mask=(rows[:, None] < R) & inside)
    tl.store(payload_ptr + rows * P + H + group, (exponent + 127).to(tl.uint8), mask=rows < R)
    if group == tl.num_programs(1) - 1:
        rest = H + tl.num_programs(1) + tl.arange(0, 16)
        tl.store(payload_ptr + rows[:, None] * P + rest[None, :], 0, mask=(rows[:, None] < R) & (rest[None, :] < P))


@triton.jit
def unpack_fp8_kernel(payload_ptr, rows_ptr, R, H, P, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < R) & (columns[None, :] < H)
    codes = tl.load(payload_ptr + rows[:, None] * P + columns[None, :], mask=inside, other=0)
    scale = rounding.from_e8m0(tl.load(payload_ptr + rows * P + H + group, mask=rows < R, other=127))
    x = rounding.cast(rounding.from_e4m3(codes) * scale[:, None], DTYPE)
    tl.store(rows_ptr + rows[:, None] * H + columns[None, :], x, mask=inside)


@triton.jit
def combine_kernel(
    rows_ptr, token_row_ptr, weights_ptr, out_ptr, T, H,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Token = sum over its slots, in their order; a slot of row -1 adds nothing."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns[None, :] < H
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(token_row_ptr + tokens * SLOTS + slot, mask=tokens < T, other=-1).to(tl.int64)
        mask = (row[:, None] >= 0) & inside
        part = tl.load(rows_ptr + row[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights_ptr + tokens * SLOTS + slot, mask=tokens < T, other=0.0)[:, None]
        total += part
    tl.store(
        out_ptr + tokens[:, None] * H + columns[None, :],
        rounding.cast(total, DTYPE),
        mask=(tokens[:, None] < T) & inside,
    )


@triton.jit
def combine_weight_grad_kernel(
    rows_ptr, token_row_ptr, grad_ptr, grad_weights_ptr, T, H,
    SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradient of a router weight: its row times its token's gradient."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.program_id(1)
    row = tl.load(token_row_ptr + tokens * SLOTS + slot, mask=tokens < T, other=-1).to(tl.int64)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        mask = (row[:, None] >= 0) & (columns[None, :] < H)
        part = tl.load(rows_ptr + row[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(part * grad, 1)
    tl.store(grad_weights_ptr + tokens * SLOTS + slot, total, mask=tokens < T)
