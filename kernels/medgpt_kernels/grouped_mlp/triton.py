"""The expert MLP as grouped products over padded runs of rows.

Rows come in tiles of BLOCK_M that belong to one expert each (``route.RowIndex``). Weights are read as a matrix [k, n]
of each expert through strides, from one of three formats:

    plain   bf16, fp16 or fp32
    fp8     E4M3 with a power of two per 128x128 tile; the left side is E4M3 with one per 128 columns of a row
    mxfp4   packed blocks, decoded to the left side's dtype on the way to the product (exact)

Padding rows are read as zeros and never written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding

ALPHA: tl.constexpr = tl.constexpr(1.702)


@triton.jit
def load_packed(blocks_ptr, scales_ptr, rows, row_mask, first, WIDTH, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Decode columns ``first .. first + SIZE`` of packed rows: (rows, SIZE). WIDTH is the unpacked width."""
    bytes_ = first // 2 + tl.arange(0, SIZE // 2)
    mask = row_mask[:, None] & (bytes_[None, :] < WIDTH // 2)
    packed = tl.load(blocks_ptr + rows[:, None] * (WIDTH // 2) + bytes_[None, :], mask=mask, other=0)
    groups = first // 32 + tl.arange(0, SIZE // 32)
    mask = row_mask[:, None] & (groups[None, :] < WIDTH // 32)
    scale = tl.load(scales_ptr + rows[:, None] * (WIDTH // 32) + groups[None, :], mask=mask, other=0)
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (rows.shape[0], SIZE // 32, 32))
    value = rounding.from_e2m1(codes) * rounding.from_e8m0(scale)[:, :, None]
    return rounding.cast(tl.reshape(value, (rows.shape[0], SIZE)), DTYPE)


@triton.jit
def rows_times_weight(
    a_ptr, a_scales_ptr, a_rows, row_mask, w_ptr, w_scales_ptr, expert, columns, K_SIZE, N_SIZE,
    stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e,
    KIND: tl.constexpr, ALONG_K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, columns) of ``a @ w[expert]`` in fp32."""
    acc = tl.zeros((a_rows.shape[0], columns.shape[0]), tl.float32)
    column_mask = columns < N_SIZE
    wide_expert = expert.to(tl.int64)
    for first in range(0, K_SIZE, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask = row_mask[:, None] & (k[None, :] < K_SIZE)
        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + k[None, :], mask=a_mask, other=0.0)
        if KIND == "mxfp4":
            if ALONG_K:
                rows = wide_expert * N_SIZE + columns
                w = tl.trans(load_packed(w_ptr, w_scales_ptr, rows, column_mask, first, K_SIZE, BLOCK_K, DTYPE))
            else:
                rows = wide_expert * K_SIZE + k
                start = tl.min(columns, 0)
                w = load_packed(w_ptr, w_scales_ptr, rows, k < K_SIZE, start, N_SIZE, columns.shape[0], DTYPE)
            acc = rounding.product(a, w, acc)
        else:
            place = wide_expert * K_SIZE * N_SIZE + k[:, None].to(tl.int64) * stride_k + columns[None, :] * stride_n
            w = tl.load(w_ptr + place, mask=(k[:, None] < K_SIZE) & column_mask[None, :], other=0.0)
            if KIND == "fp8":  # all columns lie in one tile of 128: one scale for the tile, one a row
                a_scale = load_row_scale(a_scales_ptr, a_rows, row_mask, first, K_SIZE, KIND)
                column = tl.min(columns, 0)
                tile = wide_expert * scale_stride_e + first // 128 * scale_stride_k + column // 128 * scale_stride_n
                scale = a_scale * tl.load(w_scales_ptr + tile, mask=column < N_SIZE, other=0.0)
                acc += rounding.product_e4m3(a, w) * scale[:, None]
            else:
                acc = rounding.product(a, w, acc)
    return acc


@triton.jit
def two_halves(
    a_ptr, a_scales_ptr, a_rows, row_mask, w_ptr, w_scales_ptr, expert, columns, K_SIZE, N_SIZE,
    stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``a @ w[expert]`` at ``columns`` and at as many after them, in fp32, for weights in fp8 or mxfp4.

    One product after the other: what is held beside the running sums (the partial product of a group in fp8, decoded
    weights in mxfp4) is half of what one product of both widths holds, and the sums stay in registers.
    """
    HALF: tl.constexpr = columns.shape[0]
    left = tl.zeros((a_rows.shape[0], HALF), tl.float32)
    right = tl.zeros((a_rows.shape[0], HALF), tl.float32)
    w_ptr += expert.to(tl.int64) * K_SIZE * N_SIZE // (2 if KIND == "mxfp4" else 1)
    # One expert's matrix is addressed in 32 bits, and both halves by the same offsets: pointers cost registers.
    offset = tl.arange(0, BLOCK_K)[:, None] * stride_k + columns[None, :] * stride_n
    for first in range(0, K_SIZE, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask = row_mask[:, None] & (k[None, :] < K_SIZE)
        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + k[None, :], mask=a_mask, other=0.0)
        if KIND == "mxfp4":
            scales = w_scales_ptr + expert.to(tl.int64) * N_SIZE * (K_SIZE // 32)
            w = load_packed(w_ptr, scales, columns, columns < N_SIZE, first, K_SIZE, BLOCK_K, DTYPE)
            left = rounding.product(a, tl.trans(w), left)
            w = load_packed(w_ptr, scales, columns + HALF, columns + HALF < N_SIZE, first, K_SIZE, BLOCK_K, DTYPE)
            right = rounding.product(a, tl.trans(w), right)
        else:
            a_scale = load_row_scale(a_scales_ptr, a_rows, row_mask, first, K_SIZE, KIND)
            scales = w_scales_ptr + expert.to(tl.int64) * scale_stride_e + first // 128 * scale_stride_k
            w_first = w_ptr + first * stride_k
            k_mask = k[:, None] < K_SIZE
            left = add_fp8_product(left, a, a_scale, w_first + offset, k_mask, scales, columns, N_SIZE, scale_stride_n)
            right = add_fp8_product(
                right, a, a_scale, w_first + HALF * stride_n + offset, k_mask, scales, columns + HALF, N_SIZE,
                scale_stride_n,
            )  # fmt: skip
    return left, right


@triton.jit
def load_row_scale(scales_ptr, rows, row_mask, first, WIDTH, KIND: tl.constexpr):
    """Scale of each row's 128 columns from ``first`` on; 1 for kinds without."""
    if KIND == "fp8":
        return tl.load(scales_ptr + rows * ((WIDTH + 127) // 128) + first // 128, mask=row_mask, other=0.0)
    else:
        return tl.full((rows.shape[0],), 1.0, tl.float32)


@triton.jit
def add_fp8_product(acc, a, a_scale, w_place, k_mask, scales_ptr, columns, N_SIZE, scale_stride_n):
    """``acc`` and the product with one block of k of FP8 weights; the columns lie in one tile of 128."""
    w = tl.load(w_place, mask=k_mask & (columns[None, :] < N_SIZE), other=0.0)
    column = tl.min(columns, 0)
    scale = a_scale * tl.load(scales_ptr + column // 128 * scale_stride_n, mask=column < N_SIZE, other=0.0)
    return acc + rounding.product_e4m3(a, w) * scale[:, None]


@triton.jit
def tile_of(pid, num_m, num_n, GROUP: tl.constexpr):
    """Program to (m, n), GROUP tiles of rows together, so that the weights they share stay in the cache."""
    width = GROUP * num_n
    first = pid // width * GROUP
    size = tl.minimum(num_m - first, GROUP)
    return first + pid % width % size, pid % width // size


@triton.jit
def gate_up_fwd_kernel(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, bias_ptr, z_ptr, a_ptr, a_scales_ptr, row_entry_ptr, tile_expert_ptr,
    H, G, stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, limit, num_m,
    SLOTS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """z = x[token] @ w + bias and a = clamped SwiGLU of z; with fp8 weights ``a`` is stored as FP8 rows."""
    m, n = tile_of(tl.program_id(0), num_m, tl.cdiv(G, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + m)
    if expert >= 0:
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
        bias_ptr += expert.to(tl.int64) * G
        first = n * (BLOCK_N // 2)
        HALF: tl.constexpr = BLOCK_N // 2
        columns = n * BLOCK_N + tl.arange(0, HALF)
        if KIND == "plain":
            z = rows_times_weight(
                x_ptr, x_scales_ptr, tokens, row_mask, w_ptr, w_scales_ptr, expert, n * BLOCK_N + tl.arange(0, BLOCK_N),
                H, G, stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, KIND, True, DTYPE, BLOCK_K,
            )  # fmt: skip
            left, right = halves(z)
        else:
            left, right = two_halves(
                x_ptr, x_scales_ptr, tokens, row_mask, w_ptr, w_scales_ptr, expert, columns, H, G,
                stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, KIND, DTYPE, BLOCK_K,
            )  # fmt: skip
        store_halves(
            left, right, bias_ptr, z_ptr, a_ptr, a_scales_ptr, rows, row_mask, columns, first, G, limit, KIND, DTYPE
        )


@triton.jit
def clamped(gate, up, limit):
    """NaN stays NaN: the hardware's minimum, and Triton's unless told, gives the other number."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(z, bias_ptr, z_ptr, rows, row_mask, columns, G, limit, DTYPE: tl.constexpr):
    """Clamped SwiGLU of ``z + bias`` after rounding, which is stored too; (rows, columns / 2), 0 beyond the width."""
    bias = tl.load(bias_ptr + columns, mask=columns < G, other=0.0)
    z = rounding.cast(z + bias.to(tl.float32)[None, :], DTYPE)
    mask = row_mask[:, None] & (columns[None, :] < G)
    tl.store(z_ptr + rows[:, None] * G + columns[None, :], z, mask=mask)
    gate, up = tl.split(tl.reshape(z.to(tl.float32), (rows.shape[0], columns.shape[0] // 2, 2)))
    gate, up = clamped(gate, up, limit)
    a = (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)
    inner = tl.min(columns, 0) // 2 + tl.arange(0, columns.shape[0] // 2)
    return tl.where(inner[None, :] < G // 2, a, 0.0)


@triton.jit
def store_rows(ptr, x, rows, row_mask, first, WIDTH, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Store columns ``first .. first + SIZE`` of rows."""
    columns = first + tl.arange(0, SIZE)
    mask = row_mask[:, None] & (columns[None, :] < WIDTH)
    tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], rounding.cast(x, DTYPE), mask=mask)


@triton.jit
def store_halves(
    left, right, bias_ptr, z_ptr, a_ptr, a_scales_ptr, rows, row_mask, columns, first, G, limit,
    KIND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """z and a of two products at ``columns`` and at as many after them; with fp8 weights ``a`` as FP8 rows."""
    HALF: tl.constexpr = left.shape[1]
    a = activated(left, bias_ptr, z_ptr, rows, row_mask, columns, G, limit, DTYPE)
    a_right = activated(right, bias_ptr, z_ptr, rows, row_mask, columns + HALF, G, limit, DTYPE)
    if KIND == "fp8":
        store_fp8_halves(a_ptr, a_scales_ptr, a, a_right, rows, row_mask, first, G // 2)
    else:
        store_rows(a_ptr, a, rows, row_mask, first, G // 2, HALF // 2, DTYPE)
        store_rows(a_ptr, a_right, rows, row_mask, first + HALF // 2, G // 2, HALF // 2, DTYPE)


@triton.jit
def store_fp8_halves(codes_ptr, scales_ptr, left, right, rows, row_mask, first, WIDTH):
    """Store 128 columns from ``first`` < WIDTH on as FP8, given in halves; they must be 0 beyond WIDTH."""
    largest = tl.maximum(tl.max(rounding.finite_size(left), 1), tl.max(rounding.finite_size(right), 1))
    exponent = rounding.e4m3_exponent(largest)
    inverse = rounding.power_of_two(-exponent)[:, None]
    columns = first + tl.arange(0, 64)
    mask = row_mask[:, None] & (columns[None, :] < WIDTH)
    place = codes_ptr + rows[:, None] * WIDTH + columns[None, :]
    tl.store(place, rounding.to_e4m3(left * inverse), mask=mask)
    mask = row_mask[:, None] & (columns[None, :] + 64 < WIDTH)
    tl.store(place + 64, rounding.to_e4m3(right * inverse), mask=mask)
    scale_place = scales_ptr + rows * ((WIDTH + 127) // 128) + first // 128
    tl.store(scale_place, rounding.power_of_two(exponent), mask=row_mask)


@triton.jit
def rows_kernel(
    a_ptr, a_scales_ptr, w_ptr, w_scales_ptr, bias_ptr, weights_ptr, out_ptr, row_entry_ptr, tile_expert_ptr,
    K_SIZE, N_SIZE, stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, num_m,
    BIAS: tl.constexpr, SCATTER: tl.constexpr, KIND: tl.constexpr, ALONG_K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows times their expert's weight (down projection with BIAS, input gradient without).

    With SCATTER (one slot per token) a row goes to its token, times its router weight where there is a bias.
    """
    m, n = tile_of(tl.program_id(0), num_m, tl.cdiv(N_SIZE, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + m)
    if expert >= 0:
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = rows_times_weight(
            a_ptr, a_scales_ptr, rows, row_mask, w_ptr, w_scales_ptr, expert, columns, K_SIZE, N_SIZE,
            stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, KIND, ALONG_K, DTYPE, BLOCK_K,
        )  # fmt: skip
        store_product(
            out, bias_ptr, weights_ptr, out_ptr, rows, entry, row_mask, expert, columns, N_SIZE, BIAS, SCATTER, DTYPE
        )


@triton.jit
def store_product(
    out, bias_ptr, weights_ptr, out_ptr, rows, entry, row_mask, expert, columns, N_SIZE,
    BIAS: tl.constexpr, SCATTER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The end of ``rows_kernel``."""
    if BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * N_SIZE + columns, mask=columns < N_SIZE, other=0.0)
        out += bias.to(tl.float32)[None, :]
    to = rows
    if SCATTER:
        to = tl.maximum(entry, 0).to(tl.int64)
        if BIAS:
            out *= tl.load(weights_ptr + to, mask=row_mask, other=0.0)[:, None]
    mask = row_mask[:, None] & (columns[None, :] < N_SIZE)
    tl.store(out_ptr + to[:, None] * N_SIZE + columns[None, :], rounding.cast(out, DTYPE), mask=mask)


@triton.jit
def halves(x):
    """The left and the right half of the columns; registers stay where they are."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def activation_bwd(
    da, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first, F, limit, DTYPE: tl.constexpr
):  # fmt: skip
    """From the unweighted gradient of columns ``first ..`` of a: stores dz and ``weight * a``; gives ``<da, a>`` of
    each row and dz, 0 beyond the width."""
    SIZE: tl.constexpr = da.shape[1]
    pair_columns = 2 * first + tl.arange(0, 2 * SIZE)
    pair_mask = row_mask[:, None] & (pair_columns[None, :] < 2 * F)
    z_place = rows[:, None] * (2 * F) + pair_columns[None, :]
    z = tl.load(z_ptr + z_place, mask=pair_mask, other=0.0).to(tl.float32)
    raw_gate, raw_up = tl.split(tl.reshape(z, (rows.shape[0], SIZE, 2)))
    gate, up = clamped(raw_gate, raw_up, limit)
    sigmoid = tl.sigmoid(gate * ALPHA)
    swish = gate * sigmoid
    a = (up + 1.0) * swish
    dot = tl.sum(da * a, 1)
    store_rows(weighted_a_ptr, a * weight[:, None], rows, row_mask, first, F, SIZE, DTYPE)
    da *= weight[:, None]
    slope = sigmoid + swish * (1.0 - sigmoid) * ALPHA
    d_gate = tl.where(raw_gate <= limit, da * (up + 1.0) * slope, 0.0)
    d_up = tl.where(tl.abs(raw_up) <= limit, da * swish, 0.0)
    dz = tl.reshape(tl.join(d_gate, d_up), (rows.shape[0], 2 * SIZE))
    tl.store(dz_ptr + z_place, rounding.cast(dz, DTYPE), mask=pair_mask)
    return dot, tl.where(pair_mask, dz, 0.0)


@triton.jit
def activation_bwd_in_halves(
    da, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first, F, limit, DTYPE: tl.constexpr
):  # fmt: skip
    """As ``activation_bwd``, one half after the other; dz as two tensors."""
    left, right = halves(da)
    dot, left = activation_bwd(left, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first, F, limit, DTYPE)
    second = first + da.shape[1] // 2
    more, right = activation_bwd(right, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, second, F, limit, DTYPE)
    return dot + more, left, right


@triton.jit
def store_down_bwd(
    da, dots_ptr, z_ptr, weights_ptr, dz_ptr, dz_codes_ptr, dz_scales_ptr, weighted_a_ptr, grad_weight_ptr,
    rows, entry, row_mask, tokens, expert, n, F, E, limit, num_rows, KIND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The end of ``down_bwd_kernel``, 32 columns after the other: 64 at once put 520 bytes a thread on the stack, and
    904 in FP8 (Triton 3.6, sm_90)."""
    SIZE: tl.constexpr = da.shape[1]
    first = n * SIZE
    weight = tl.load(weights_ptr + tl.maximum(entry, 0), mask=row_mask, other=0.0)
    if KIND == "fp8":
        part, left, right = activation_bwd_in_halves(
            da, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first, F, limit, DTYPE
        )
        store_fp8_halves(dz_codes_ptr, dz_scales_ptr, left, right, rows, row_mask, 2 * first, 2 * F)
    else:
        left, right = halves(da)
        part, _, _ = activation_bwd_in_halves(
            left, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first, F, limit, DTYPE
        )
        more, _, _ = activation_bwd_in_halves(
            right, z_ptr, dz_ptr, weighted_a_ptr, rows, row_mask, weight, first + SIZE // 2, F, limit, DTYPE
        )
        part += more
    of_bias = tl.load(dots_ptr + tokens * E + expert, mask=row_mask, other=0.0)
    part += tl.where(n == 0, of_bias, 0.0)
    tl.store(grad_weight_ptr + n.to(tl.int64) * num_rows + rows, part, mask=row_mask)


@triton.jit
def down_bwd_kernel(
    grad_ptr, grad_scales_ptr, w_ptr, w_scales_ptr, dots_ptr, z_ptr, weights_ptr, dz_ptr, dz_codes_ptr,
    dz_scales_ptr, weighted_a_ptr, grad_weight_ptr, row_entry_ptr, tile_expert_ptr,
    H, F, E, stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, limit, num_m,
    SLOTS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From the tokens' gradient to dz, to ``weight * a`` for the down projection's gradient, and to this tile of
    columns' part of the router weight's gradient, ``<grad @ w^T, a> + <grad, bias>`` (the bias by the first tile)."""
    m, n = tile_of(tl.program_id(0), num_m, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + m)
    if expert >= 0:
        rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        entry = tl.load(row_entry_ptr + rows)
        row_mask = entry >= 0
        tokens = (tl.maximum(entry, 0) // SLOTS).to(tl.int64)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        da = rows_times_weight(
            grad_ptr, grad_scales_ptr, tokens, row_mask, w_ptr, w_scales_ptr, expert, columns, H, F,
            stride_k, stride_n, scale_stride_k, scale_stride_n, scale_stride_e, KIND, False, DTYPE, BLOCK_K,
        )  # fmt: skip
        store_down_bwd(
            da, dots_ptr, z_ptr, weights_ptr, dz_ptr, dz_codes_ptr, dz_scales_ptr, weighted_a_ptr, grad_weight_ptr,
            rows, entry, row_mask, tokens, expert, n, F, E, limit, num_m * BLOCK_M, KIND, DTYPE,
        )  # fmt: skip
