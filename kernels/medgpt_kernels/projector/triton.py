"""The projector's products. The left side is read through a row map, the result written through one.

An image token's ``fold`` x ``fold`` patches are read where they lie: column k of the shuffled row is channel ``k % F``
of patch ``first + (k // F) // fold * side + (k // F) % fold``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding

ROOT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
DENSITY: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def patch_places(patches, k, F, side, FOLD: tl.constexpr):
    """(rows, columns) of element offsets into the features."""
    part = k // F
    patch = patches[:, None] + (part // FOLD * side + part % FOLD)[None, :]
    return patch.to(tl.int64) * F + (k % F)[None, :]


@triton.jit
def front_fwd_kernel(
    features_ptr, patch_ptr, weight_ptr, bias_ptr, rows_ptr, mean_ptr, rstd_ptr, N, F, side, D, eps,
    FOLD: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pixel shuffle and LayerNorm; statistics in fp32, the variance around the mean."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    patches = tl.load(patch_ptr + rows, mask=rows < N, other=0)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < N) & (k[None, :] < D)
        x = tl.load(features_ptr + patch_places(patches, k, F, side, FOLD), mask=mask, other=0.0).to(tl.float32)
        mean += tl.sum(x, 1)
    mean /= D
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < N) & (k[None, :] < D)
        x = tl.load(features_ptr + patch_places(patches, k, F, side, FOLD), mask=mask, other=0.0).to(tl.float32)
        away = tl.where(mask, x - mean[:, None], 0.0)
        square += tl.sum(away * away, 1)
    rstd = tl.rsqrt(square / D + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < N) & (k[None, :] < D)
        x = tl.load(features_ptr + patch_places(patches, k, F, side, FOLD), mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(rows_ptr + rows[:, None] * D + k[None, :], rounding.cast(y, DTYPE), mask=mask)


@triton.jit
def front_bwd_kernel(
    features_ptr, patch_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_ptr, grad_rows_ptr, grad_weight_ptr, grad_bias_ptr,
    N, F, side, D,
    FOLD: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LayerNorm backward to shuffled rows; each program writes its part of the weight's and bias's gradients."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    patches = tl.load(patch_ptr + rows, mask=rows < N, other=0)
    mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    sum_grad = tl.zeros((BLOCK_N,), tl.float32)
    sum_along = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < N) & (k[None, :] < D)
        x = tl.load(features_ptr + patch_places(patches, k, F, side, FOLD), mask=mask, other=0.0).to(tl.float32)
        unit = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        weight = tl.load(weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * D + k[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_grad += tl.sum(grad * weight[None, :], 1)
        sum_along += tl.sum(grad * weight[None, :] * unit, 1)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < N) & (k[None, :] < D)
        x = tl.load(features_ptr + patch_places(patches, k, F, side, FOLD), mask=mask, other=0.0).to(tl.float32)
        unit = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        weight = tl.load(weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * D + k[None, :], mask=mask, other=0.0).to(tl.float32)
        dx = (grad * weight[None, :] - (sum_grad / D)[:, None] - unit * (sum_along / D)[:, None]) * rstd[:, None]
        tl.store(grad_rows_ptr + rows[:, None] * D + k[None, :], rounding.cast(dx, DTYPE), mask=mask)
        at = tl.program_id(0) * D + k
        tl.store(grad_weight_ptr + at, tl.sum(grad * unit, 0), mask=k < D)
        tl.store(grad_bias_ptr + at, tl.sum(grad, 0), mask=k < D)


@triton.jit
def linear_kernel(
    a_ptr, a_map_ptr, weight_ptr, bias_ptr, saved_ptr, out_ptr, inner_ptr, out_map_ptr,
    N, K_SIZE, OUT, F, side, stride_k, stride_n,
    SHUFFLED: tl.constexpr, MAPPED: tl.constexpr, EPILOGUE: tl.constexpr, SCATTER: tl.constexpr, FOLD: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``a @ w`` with an epilogue.

    SHUFFLED: ``a`` is the features, read by first patch (``a_map``). MAPPED: row n of ``a`` is row ``a_map[n]``.
    EPILOGUE: ``gelu`` adds the bias, saves the sum and writes its GELU; ``bias`` adds the bias; ``dgelu`` multiplies
    with the GELU's slope at ``saved`` and writes the GELU to ``inner`` too; ``none``.
    SCATTER: row n goes to row ``out_map[n]``.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    a_rows = rows
    if SHUFFLED or MAPPED:
        a_rows = tl.load(a_map_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K_SIZE, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if SHUFFLED:
            place = patch_places(a_rows, k, F, side, FOLD)
        else:
            place = a_rows[:, None] * K_SIZE + k[None, :]
        a = tl.load(a_ptr + place, mask=row_mask[:, None] & (k[None, :] < K_SIZE), other=0.0)
        w_place = k[:, None].to(tl.int64) * stride_k + columns[None, :].to(tl.int64) * stride_n
        w = tl.load(weight_ptr + w_place, mask=(k[:, None] < K_SIZE) & (columns[None, :] < OUT), other=0.0)
        acc = rounding.product(a, w, acc)
    mask = row_mask[:, None] & (columns[None, :] < OUT)
    here = rows[:, None] * OUT + columns[None, :]
    if EPILOGUE == "gelu" or EPILOGUE == "bias":
        acc += tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        u = rounding.cast(acc, DTYPE)
        tl.store(saved_ptr + here, u, mask=mask)
        u = u.to(tl.float32)
        acc = 0.5 * u * (1.0 + tl.erf(u * ROOT_HALF))
    if SCATTER:
        to = tl.load(out_map_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        here = to[:, None] * OUT + columns[None, :]
    if EPILOGUE == "dgelu":  # in halves: as a whole it puts 752 bytes a thread on the stack
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, HALF)
        store_dgelu(left, saved_ptr, inner_ptr, out_ptr, rows, row_mask, columns, OUT, DTYPE)
        store_dgelu(right, saved_ptr, inner_ptr, out_ptr, rows, row_mask, columns + HALF, OUT, DTYPE)
    else:
        tl.store(out_ptr + here, rounding.cast(acc, DTYPE), mask=mask)


@triton.jit
def store_dgelu(grad, saved_ptr, inner_ptr, out_ptr, rows, row_mask, columns, OUT, DTYPE: tl.constexpr):
    """The gradient times the GELU's slope at ``saved``, and the GELU itself to ``inner``."""
    mask = row_mask[:, None] & (columns[None, :] < OUT)
    here = rows[:, None] * OUT + columns[None, :]
    u = tl.load(saved_ptr + here, mask=mask, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(u * ROOT_HALF))
    tl.store(inner_ptr + here, rounding.cast(u * share, DTYPE), mask=mask)
    grad *= share + u * tl.exp(-0.5 * u * u) * DENSITY
    tl.store(out_ptr + here, rounding.cast(grad, DTYPE), mask=mask)


@triton.jit
def linear_grad_kernel(
    d_ptr, d_map_ptr, x_ptr, x_map_ptr, grad_ptr, bias_grad_ptr, N, OUT, K_SIZE, F, side,
    MAPPED: tl.constexpr, SHUFFLED: tl.constexpr, FOLD: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradient of a linear layer's weight (OUT, K_SIZE), ``d^T @ x`` over the rows, and of its bias."""
    out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_R):
        rows = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_mask = rows < N
        d_rows = rows
        if MAPPED:
            d_rows = tl.load(d_map_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        d_mask = row_mask[:, None] & (out[None, :] < OUT)
        d = tl.load(d_ptr + d_rows[:, None] * OUT + out[None, :], mask=d_mask, other=0.0)
        if SHUFFLED:
            patches = tl.load(x_map_ptr + rows, mask=row_mask, other=0).to(tl.int64)
            place = patch_places(patches, k, F, side, FOLD)
        else:
            place = rows[:, None] * K_SIZE + k[None, :]
        x = tl.load(x_ptr + place, mask=row_mask[:, None] & (k[None, :] < K_SIZE), other=0.0)
        acc = rounding.product(tl.trans(d), x, acc)
        bias += tl.sum(d.to(tl.float32), 0)
    place = grad_ptr + out[:, None].to(tl.int64) * K_SIZE + k[None, :]
    tl.store(place, rounding.cast(acc, GRAD_DTYPE), mask=(out[:, None] < OUT) & (k[None, :] < K_SIZE))
    if tl.program_id(1) == 0:
        tl.store(bias_grad_ptr + out, rounding.cast(bias, GRAD_DTYPE), mask=out < OUT)


@triton.jit
def patch_grad_kernel(
    grad_ptr, users_ptr, features_grad_ptr, num_patches, F, side, D,
    FOLD: tl.constexpr, USERS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradient of a patch: the sum over the rows that used its image token, in their order (``users``, -1 for none)."""
    patches = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    per_image = side * side
    image, inside = patches // per_image, patches % per_image
    y, x = inside // side, inside % side
    token = image * (per_image // (FOLD * FOLD)) + y // FOLD * (side // FOLD) + x // FOLD
    part = y % FOLD * FOLD + x % FOLD
    total = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for user in tl.static_range(USERS):
        row = tl.load(users_ptr + token * USERS + user, mask=patches < num_patches, other=-1).to(tl.int64)
        mask = (row[:, None] >= 0) & (columns[None, :] < F)
        place = row[:, None] * D + (part * F)[:, None] + columns[None, :]
        total += tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    place = patches[:, None].to(tl.int64) * F + columns[None, :]
    mask = (patches[:, None] < num_patches) & (columns[None, :] < F)
    tl.store(features_grad_ptr + place, rounding.cast(total, DTYPE), mask=mask)
