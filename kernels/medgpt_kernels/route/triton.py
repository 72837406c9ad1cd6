"""Routing in three launches: logits with top-k, a scan of the block histograms, the index. No atomics, no sort."""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding


@triton.jit
def route_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, normed_ptr, codes_ptr, scales_ptr, logits_ptr, weights_ptr, experts_ptr,
    histogram_ptr, T, H, E, eps,
    K: tl.constexpr, NORM: tl.constexpr, QUANTISE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens, all experts; x is read in groups of 128 columns, the groups of FP8 rows."""
    block = tl.program_id(0)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    experts = tl.arange(0, BLOCK_E)
    rstd = tl.zeros((BLOCK_T,), tl.float32)
    if NORM:
        for first in range(0, H, 128):
            columns = first + tl.arange(0, 128)
            inside = is_token[:, None] & (columns[None, :] < H)
            x = tl.load(x_ptr + tokens[:, None] * H + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            rstd += tl.sum(x * x, 1)
        rstd = tl.rsqrt(rstd / H + eps)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, H, 128):
        columns = first + tl.arange(0, 128)
        inside = is_token[:, None] & (columns[None, :] < H)
        place = tokens[:, None] * H + columns[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        if NORM:
            scale = tl.load(norm_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
            x = rounding.cast(x.to(tl.float32) * rstd[:, None] * scale[None, :], DTYPE)
            tl.store(normed_ptr + place, x, mask=inside)
        if QUANTISE:
            wide = x.to(tl.float32)
            exponent = rounding.e4m3_exponent(tl.max(rounding.finite_size(wide), 1))
            codes = rounding.to_e4m3(wide * rounding.power_of_two(-exponent)[:, None])
            tl.store(codes_ptr + place, codes, mask=inside)
            group = tokens * tl.cdiv(H, 128) + first // 128
            tl.store(scales_ptr + group, rounding.power_of_two(exponent), mask=is_token)
        w_place = weight_ptr + experts[None, :] * H + columns[:, None]
        w = tl.load(w_place, mask=(experts[None, :] < E) & (columns[:, None] < H), other=0.0)
        logits = rounding.product(x, w, logits)
    is_expert = experts[None, :] < E
    logits += tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    logits_place = logits_ptr + tokens[:, None] * E + experts[None, :]
    tl.store(logits_place, logits, mask=is_token[:, None] & is_expert)

    # NaN ranks last but above the empty columns, so that every choice is an expert; the weights then say NaN.
    broken = tl.max(((logits != logits) & is_expert).to(tl.int32), 1) != 0
    rank = tl.where(logits == logits, tl.maximum(logits, -rounding.FLOAT_MAX), -rounding.FLOAT_MAX)
    rank = tl.where(is_expert, rank, float("-inf"))
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    largest = tl.max(rank, 1)
    left = rank
    for k in tl.static_range(K):
        best = tl.max(left, 1)
        expert = tl.min(tl.where(left == best[:, None], experts[None, :], BLOCK_E), 1)
        hit = experts[None, :] == expert[:, None]
        total += tl.exp(best - largest)
        chosen += hit.to(tl.int32)
        left = tl.where(hit, float("-inf"), left)
        tl.store(experts_ptr + tokens * K + k, expert.to(tl.int32), mask=is_token)
    # The same choices again, now that their sum is known: cheaper than a trip through memory.
    left = rank
    for k in tl.static_range(K):
        best = tl.max(left, 1)
        expert = tl.min(tl.where(left == best[:, None], experts[None, :], BLOCK_E), 1)
        left = tl.where(experts[None, :] == expert[:, None], float("-inf"), left)
        weight = tl.where(broken, float("nan"), tl.exp(best - largest) / total)
        tl.store(weights_ptr + tokens * K + k, weight, mask=is_token)
    counts = tl.sum(tl.where(is_token[:, None], chosen, 0), 0)
    tl.store(histogram_ptr + block * E + experts, counts, mask=experts < E)


@triton.jit
def histogram_kernel(experts_ptr, histogram_ptr, T, E, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program: choices of BLOCK_T tokens per expert, for choices that were made elsewhere."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(experts_ptr + tokens * K + k, mask=tokens < T, other=-1)
        chosen += (experts[None, :] == expert[:, None]).to(tl.int32)
    tl.store(histogram_ptr + tl.program_id(0) * E + experts, tl.sum(chosen, 0), mask=experts < E)


@triton.jit
def scan_kernel(
    histogram_ptr, base_ptr, counts_ptr, tile_expert_ptr, row_entry_ptr, num_blocks, num_tiles, E,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program in all: first row of every (block, expert), counts, the tiles' experts, -1 on the padding rows."""
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, num_blocks, CHUNK):
        blocks = first + tl.arange(0, CHUNK)
        inside = (blocks[:, None] < num_blocks) & (experts[None, :] < E)
        count = tl.load(histogram_ptr + blocks[:, None] * E + experts[None, :], mask=inside, other=0)
        total += tl.sum(count, 0)
    tl.store(counts_ptr + experts, total, mask=experts < E)
    padded = (total + TILE - 1) // TILE * TILE
    end = tl.cumsum(padded, 0)
    start = end - padded

    running = start
    for first in range(0, num_blocks, CHUNK):
        blocks = first + tl.arange(0, CHUNK)
        inside = (blocks[:, None] < num_blocks) & (experts[None, :] < E)
        count = tl.load(histogram_ptr + blocks[:, None] * E + experts[None, :], mask=inside, other=0)
        base = running[None, :] + tl.cumsum(count, 0) - count
        tl.store(base_ptr + blocks[:, None] * E + experts[None, :], base, mask=inside)
        running += tl.sum(count, 0)

    used = tl.sum(padded, 0)
    if (
        TILE == 1
    ):  # rows without padding, for an exchange between ranks: every row is used, and no product asks for tiles
        num_tiles = 0
    for first in range(0, num_tiles, CHUNK):
        tiles = first + tl.arange(0, CHUNK)
        passed = (tiles[:, None] * TILE >= end[None, :]) & (experts[None, :] < E)
        expert = tl.where(tiles * TILE < used, tl.sum(passed.to(tl.int32), 1), -1)
        tl.store(tile_expert_ptr + tiles, expert, mask=tiles < num_tiles)
    for first in range(0, TILE, 16):
        rows = (start + total)[:, None] + first + tl.arange(0, 16)[None, :]
        tl.store(row_entry_ptr + rows, -1, mask=rows < end[:, None])
    for first in range(used, num_tiles * TILE, 1024):
        rows = first + tl.arange(0, 1024)
        tl.store(row_entry_ptr + rows, -1, mask=rows < num_tiles * TILE)


@triton.jit
def index_kernel(
    experts_ptr, base_ptr, row_entry_ptr, token_row_ptr, T, E,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: the rows of BLOCK_T tokens. A token's place is its expert's base plus the earlier tokens of the
    block that chose the same expert; a token's choices are distinct, so its slots do not disturb each other."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(experts_ptr + tokens * K + k, mask=tokens < T, other=-1)
        chosen += (experts[None, :] == expert[:, None]).to(tl.int32)
    base = tl.load(base_ptr + block * E + experts, mask=experts < E, other=0)
    place = base[None, :] + tl.cumsum(chosen, 0) - chosen
    for k in tl.static_range(K):
        expert = tl.load(experts_ptr + tokens * K + k, mask=tokens < T, other=-1)
        row = tl.sum(tl.where(experts[None, :] == expert[:, None], place, 0), 1)
        tl.store(token_row_ptr + tokens * K + k, row, mask=tokens < T)
        tl.store(row_entry_ptr + row, tokens * K + k, mask=tokens < T)


@triton.jit
def index_sorted_kernel(
    counts_ptr, row_entry_ptr, token_row_ptr, tile_expert_ptr, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program: one tile of rows that are sorted already; every program adds up the counts for itself."""
    tile = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0).to(tl.int32)
    padded = (counts + TILE - 1) // TILE * TILE
    end = tl.cumsum(padded, 0)
    sorted_end = tl.cumsum(counts, 0)
    used = tl.sum(padded, 0)
    expert = tl.sum(((tile * TILE >= end) & (experts < E)).to(tl.int32), 0)
    mine = experts == expert
    offset = tile * TILE - tl.sum(tl.where(mine, end - padded, 0), 0) + tl.arange(0, TILE)
    rows = tile * TILE + tl.arange(0, TILE)
    inside = (rows < used) & (offset < tl.sum(tl.where(mine, counts, 0), 0))
    source = tl.sum(tl.where(mine, sorted_end - counts, 0), 0) + offset
    tl.store(row_entry_ptr + rows, tl.where(inside, source, -1))
    tl.store(token_row_ptr + source, rows, mask=inside)
    tl.store(tile_expert_ptr + tile, tl.where(tile * TILE < used, expert, -1))


@triton.jit
def route_bwd_kernel(
    experts_ptr, weights_ptr, grad_weights_ptr, grad_logits_ptr, T, E,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Softmax over the chosen, backward: zero at experts that were not chosen."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    experts = tl.arange(0, BLOCK_E)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + tokens * K + k, mask=is_token, other=0.0)
        mean += weight * tl.load(grad_weights_ptr + tokens * K + k, mask=is_token, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + tokens * K + k, mask=is_token, other=0.0)
        grad_weight = tl.load(grad_weights_ptr + tokens * K + k, mask=is_token, other=0.0)
        expert = tl.load(experts_ptr + tokens * K + k, mask=is_token, other=-1)
        grad += tl.where(experts[None, :] == expert[:, None], (weight * (grad_weight - mean))[:, None], 0.0)
    inside = is_token[:, None] & (experts[None, :] < E)
    tl.store(grad_logits_ptr + tokens[:, None] * E + experts[None, :], grad, mask=inside)


@triton.jit
def losses_fwd_kernel(logits_ptr, kept_ptr, probs_ptr, z_ptr, T, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program: BLOCK_T tokens; its part of the summed probabilities and of the summed squares."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    inside = (tokens[:, None] < T) & (experts[None, :] < E)
    logits = tl.load(logits_ptr + tokens[:, None] * E + experts[None, :], mask=inside, other=float("-inf"))
    kept = tl.load(kept_ptr + tokens, mask=tokens < T, other=0.0)
    largest = tl.where(tokens < T, tl.max(logits, 1), 0.0)
    powers = tl.exp(logits - largest[:, None])
    total = tl.where(tokens < T, tl.sum(powers, 1), 1.0)
    z = largest + tl.log(total)
    tl.store(probs_ptr + tl.program_id(0) * E + experts, tl.sum(powers * (kept / total)[:, None], 0), mask=experts < E)
    tl.store(z_ptr + tl.program_id(0), tl.sum(z * z * kept, 0))


@triton.jit
def losses_bwd_kernel(
    logits_ptr, kept_ptr, slope_ptr, z_slope_ptr, grad_logits_ptr, T, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """``slope_E``: gradient of the sum of probabilities; ``z_slope``: gradient of the sum of squares."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    inside = (tokens[:, None] < T) & (experts[None, :] < E)
    logits = tl.load(logits_ptr + tokens[:, None] * E + experts[None, :], mask=inside, other=float("-inf"))
    kept = tl.load(kept_ptr + tokens, mask=tokens < T, other=0.0)
    slope = tl.load(slope_ptr + experts, mask=experts < E, other=0.0)
    largest = tl.where(tokens < T, tl.max(logits, 1), 0.0)
    powers = tl.exp(logits - largest[:, None])
    total = tl.where(tokens < T, tl.sum(powers, 1), 1.0)
    probs = powers / total[:, None]
    z = largest + tl.log(total)
    mean = tl.sum(probs * slope[None, :], 1)
    grad = probs * (slope[None, :] - mean[:, None] + 2.0 * tl.load(z_slope_ptr) * z[:, None]) * kept[:, None]
    tl.store(grad_logits_ptr + tokens[:, None] * E + experts[None, :], grad, mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    x_ptr, norm_ptr, grad_ptr, grad_x_ptr, grad_norm_ptr, T, H, eps,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows; its part of the norm weight's gradient goes to a row of its own."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    square = tl.zeros((BLOCK_T,), tl.float32)
    along = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        inside = (tokens[:, None] < T) & (columns[None, :] < H)
        place = tokens[:, None] * H + columns[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(norm_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
        along += tl.sum(x * grad * scale[None, :], 1)
    rstd = tl.rsqrt(square / H + eps)
    shrink = along / H * rstd * rstd * rstd
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        inside = (tokens[:, None] < T) & (columns[None, :] < H)
        place = tokens[:, None] * H + columns[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(norm_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_x = grad * scale[None, :] * rstd[:, None] - x * shrink[:, None]
        tl.store(grad_x_ptr + place, rounding.cast(grad_x, DTYPE), mask=inside)
        part = tl.sum(grad * x * rstd[:, None], 0)
        tl.store(grad_norm_ptr + tl.program_id(0) * H + columns, part, mask=columns < H)
