"""Gradients that are sums over an expert's rows, or over a row's columns."""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding


@triton.jit
def expert_dots_kernel(
    grad_ptr, bias_ptr, dots_ptr, T, H, E, SAME: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(T, E): every token's gradient times every expert's bias. SAME: both are of one dtype."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        mask = (tokens[:, None] < T) & (columns[None, :] < H)
        grad = tl.load(grad_ptr + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0)
        mask = (experts[None, :] < E) & (columns[:, None] < H)
        bias = tl.load(bias_ptr + experts[None, :] * H + columns[:, None], mask=mask, other=0.0)
        if not SAME:
            grad, bias = grad.to(tl.float32), bias.to(tl.float32)
        acc = rounding.product(grad, bias, acc)
    mask = (tokens[:, None] < T) & (experts[None, :] < E)
    tl.store(dots_ptr + tokens[:, None] * E + experts[None, :], acc, mask=mask)


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, weights_ptr, grad_ptr, bias_grad_ptr, counts_ptr, row_entry_ptr, E, K_SIZE, N_SIZE,
    FIRST: tl.constexpr, SLOTS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, ACCUMULATE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr, BIAS_DTYPE: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradient of one expert's weight, ``a^T @ b`` over its rows, and of its bias, the sum of ``b``.

    FIRST: the tile of k that program 0 has. Those of tile 0 alone sum the bias, and are launched by themselves: the sum
    takes 200 of their loop's 350 instructions, for which the tensor cores wait.
    GATHER_A, GATHER_B: that side is indexed by token, not by row. With GATHER_B the bias weighs each row by its router
    weight (``a`` carries the weight already). ACCUMULATE adds to what is there; otherwise it is written, also for an
    expert without rows.
    """
    expert = tl.program_id(2)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    first_row = tl.sum(tl.where(experts < expert, (counts + TILE - 1) // TILE * TILE, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    k = (FIRST + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, count, BLOCK_R):
        offset = start + tl.arange(0, BLOCK_R)
        row_mask = offset < count
        rows = (first_row + offset).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows, mask=row_mask, other=0)
        tokens = (entry // SLOTS).to(tl.int64)
        a_rows = tokens if GATHER_A else rows
        b_rows = tokens if GATHER_B else rows
        a_mask = row_mask[:, None] & (k[None, :] < K_SIZE)
        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + k[None, :], mask=a_mask, other=0.0)
        b_mask = row_mask[:, None] & (n[None, :] < N_SIZE)
        b = tl.load(b_ptr + b_rows[:, None] * N_SIZE + n[None, :], mask=b_mask, other=0.0)
        acc = rounding.product(tl.trans(a), b, acc)
        if FIRST == 0:
            if GATHER_B:
                weight = tl.load(weights_ptr + entry, mask=row_mask, other=0.0)
                bias += tl.sum(b.to(tl.float32) * weight[:, None], 0)
            else:
                bias += tl.sum(b.to(tl.float32), 0)
    place = grad_ptr + expert.to(tl.int64) * K_SIZE * N_SIZE + k[:, None].to(tl.int64) * N_SIZE + n[None, :]
    mask = (k[:, None] < K_SIZE) & (n[None, :] < N_SIZE)
    if ACCUMULATE:
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, rounding.cast(acc, GRAD_DTYPE), mask=mask)
    if FIRST == 0:
        bias_place = bias_grad_ptr + expert * N_SIZE + n
        if ACCUMULATE:
            bias += tl.load(bias_place, mask=n < N_SIZE, other=0.0).to(tl.float32)
        tl.store(bias_place, rounding.cast(bias, BIAS_DTYPE), mask=n < N_SIZE)
