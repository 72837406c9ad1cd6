"""The conversions as Triton kernels. One program makes whole scale blocks, so nothing is shared between programs."""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding


@triton.jit
def quantise_rows_kernel(x_ptr, codes_ptr, scales_ptr, M, K, G, BLOCK_M: tl.constexpr):
    """One program: BLOCK_M rows of one group of 128 columns; the last group may be shorter."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    exponent = rounding.e4m3_exponent(tl.max(rounding.finite_size(x), 1))
    codes = rounding.to_e4m3(x * rounding.power_of_two(-exponent)[:, None])
    tl.store(codes_ptr + rows[:, None] * K + columns[None, :], codes, mask=inside)
    tl.store(scales_ptr + rows * G + group, rounding.power_of_two(exponent), mask=rows < M)


@triton.jit
def store_codes(codes_ptr, flipped_ptr, codes, matrix, R, C, PLAIN: tl.constexpr, FLIPPED: tl.constexpr):
    """A 128x128 tile of codes as it lies in (R, C), and transposed."""
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    if PLAIN:
        place = matrix * R * C + rows[:, None].to(tl.int64) * C + columns[None, :]
        tl.store(codes_ptr + place, codes, mask=(rows[:, None] < R) & (columns[None, :] < C))
    if FLIPPED:
        place = matrix * R * C + columns[:, None].to(tl.int64) * R + rows[None, :]
        tl.store(flipped_ptr + place, tl.trans(codes), mask=(columns[:, None] < C) & (rows[None, :] < R))


@triton.jit
def quantise_tiles_kernel(
    w_ptr, codes_ptr, flipped_ptr, scales_ptr, R, C, PLAIN: tl.constexpr, FLIPPED: tl.constexpr
):  # fmt: skip
    """One program: one 128x128 tile of one matrix."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < R) & (columns[None, :] < C)
    place = matrix * R * C + rows[:, None].to(tl.int64) * C + columns[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    exponent = rounding.e4m3_exponent(tl.max(tl.max(rounding.finite_size(w), 1), 0))
    codes = rounding.to_e4m3(w * rounding.power_of_two(-exponent))
    store_codes(codes_ptr, flipped_ptr, codes, matrix, R, C, PLAIN, FLIPPED)
    tile = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales_ptr + tile, rounding.power_of_two(exponent))


@triton.jit
def pack_mxfp4_kernel(w_ptr, blocks_ptr, scales_ptr, num_groups, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK groups of 32 consecutive values to 16 bytes and a scale each."""
    groups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = groups[:, None] < num_groups
    w = tl.load(w_ptr + groups[:, None] * 32 + tl.arange(0, 32)[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(rounding.finite_size(w), 1)
    bits = amax.to(tl.int32, bitcast=True)
    if FLOOR:
        scale = (bits >> 23) - 2
    else:
        scale = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    scale = tl.where(amax == 0.0, 0, tl.minimum(tl.maximum(scale, 0), 254))
    # 2^(127 - scale) reaches 2^127: in two steps, so that neither factor overflows.
    shift = 127 - scale
    first = tl.minimum(shift, 64)
    scaled = w * rounding.power_of_two(first)[:, None] * rounding.power_of_two(shift - first)[:, None]
    not_finite = tl.max((tl.abs(w) <= rounding.FLOAT_MAX).to(tl.int32) == 0, 1) != 0
    scaled = tl.where(not_finite[:, None], 0.0, scaled)
    low, high = tl.split(tl.reshape(rounding.to_e2m1(scaled), (BLOCK, 16, 2)))
    packed = low | (high << 4)
    tl.store(blocks_ptr + groups[:, None] * 16 + tl.arange(0, 16)[None, :], packed, mask=inside)
    tl.store(scales_ptr + groups, tl.where(not_finite, 255, scale).to(tl.uint8), mask=groups < num_groups)


@triton.jit
def unpack_mxfp4_kernel(blocks_ptr, scales_ptr, w_ptr, num_groups, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK groups of 32 values."""
    groups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = groups[:, None] < num_groups
    packed = tl.load(blocks_ptr + groups[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside, other=0)
    scale = rounding.from_e8m0(tl.load(scales_ptr + groups, mask=groups < num_groups, other=0))
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK, 32))
    w = rounding.from_e2m1(codes) * scale[:, None]
    tl.store(w_ptr + groups[:, None] * 32 + tl.arange(0, 32)[None, :], rounding.cast(w, DTYPE), mask=inside)


@triton.jit
def mxfp4_to_e4m3_kernel(
    blocks_ptr, scales_ptr, codes_ptr, flipped_ptr, tile_scales_ptr, fits_ptr, N, K,
    PLAIN: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """One program: one 128x128 tile of one matrix, exact where the exponents of its groups spread over at most 14."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = matrix * N + tl.program_id(0) * 128 + tl.arange(0, 128)
    rows_inside = tl.program_id(0) * 128 + tl.arange(0, 128) < N
    bytes_ = tl.program_id(1) * 64 + tl.arange(0, 64)
    groups = tl.program_id(1) * 4 + tl.arange(0, 4)
    inside = rows_inside[:, None] & (bytes_[None, :] < K // 2)
    packed = tl.load(blocks_ptr + rows[:, None] * (K // 2) + bytes_[None, :], mask=inside, other=0)
    group_inside = rows_inside[:, None] & (groups[None, :] < K // 32)
    scale = tl.load(scales_ptr + rows[:, None] * (K // 32) + groups[None, :], mask=group_inside, other=0).to(tl.int32)
    values = rounding.from_e2m1(tl.reshape(tl.join(packed & 15, packed >> 4), (128, 4, 32)))
    used = (tl.max(tl.abs(values), 2) > 0.0) & (scale != 255)
    largest = tl.max(tl.max(tl.where(used, scale, -1), 1), 0)
    exponent = tl.where(largest < 0, 0, tl.maximum(largest - 133, -118))
    relative = scale - 127 - exponent
    fits = tl.min(tl.min(((relative >= -8) | (used == 0)).to(tl.int32), 1), 0)
    factor = rounding.power_of_two(tl.minimum(tl.maximum(relative, -40), 6))
    factor = tl.where(scale == 255, float("nan"), factor)
    codes = rounding.to_e4m3(tl.reshape(values * factor[:, :, None], (128, 128)))
    store_codes(codes_ptr, flipped_ptr, codes, matrix, N, K, PLAIN, FLIPPED)
    tile = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tile_scales_ptr + tile, rounding.power_of_two(exponent))
    tl.store(fits_ptr + tile, fits.to(tl.int8))
