"""The block formats written out in plain torch. Every function is exact or rounds once, to nearest even.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3 (E2M1, E8M0, blocks of 32); openai/gpt-oss checkpoint
layout (``*_blocks`` (..., K / 32, 16) uint8 with the even element in the low nibble, ``*_scales`` (..., K / 32)).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MX_BLOCK = 32
FP8_BLOCK = 128
E4M3 = torch.float8_e4m3fn
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_MODES = ("up", "floor")
LEAST_EXPONENT = -118
"""Smallest exponent of an FP8 scale: 2^118 is still a normal fp32 number to multiply with."""


def _finite_size(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.where(size.isfinite(), size, torch.zeros_like(size))


def e4m3_exponent(amax: Tensor) -> Tensor:
    """Smallest integer e >= -118 with amax <= 448 * 2^e; 0 for amax 0."""
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1), and 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp(min=LEAST_EXPONENT)
    return torch.where(amax == 0, torch.zeros_like(exponent), exponent)


def to_e4m3(x: Tensor) -> Tensor:
    """Nearest even, saturating at 448; NaN and infinities to NaN."""
    clamped = torch.where(x.isfinite(), x.clamp(-448.0, 448.0), torch.full_like(x, float("nan")))
    codes = clamped.to(E4M3).view(torch.uint8)
    return torch.where(x.isfinite(), codes, torch.full_like(codes, 0x7F)).view(E4M3)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32 for exponents of normal numbers, -126 .. 127, from its bits: CUDA's pow and exp2 may be a few
    units off, and torch.ldexp calls them."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    return x * power_of_two(exponent)


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (M, K) and fp32 scales (M, ceil(K / 128)), each a power of two; the last group may be shorter."""
    groups = x_MK.float().split(FP8_BLOCK, dim=-1)
    exponents = torch.stack([e4m3_exponent(_finite_size(group).amax(-1)) for group in groups], -1)
    codes = [to_e4m3(_ldexp(group, -exponents[:, i : i + 1])).view(torch.uint8) for i, group in enumerate(groups)]
    return torch.cat(codes, -1).view(E4M3), power_of_two(exponents)


def dequantise_rows(codes_MK: Tensor, scales_MG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = scales_MG.repeat_interleave(FP8_BLOCK, dim=-1)[:, : codes_MK.shape[1]]
    return (codes_MK.float() * wide).to(dtype)


def _tiles(w_ERC: Tensor):
    for row in range(0, w_ERC.shape[1], FP8_BLOCK):
        for column in range(0, w_ERC.shape[2], FP8_BLOCK):
            yield slice(row, row + FP8_BLOCK), slice(column, column + FP8_BLOCK)


def _tile_grid(w_ERC: Tensor, **kwargs) -> Tensor:
    rows, columns = (-(-size // FP8_BLOCK) for size in w_ERC.shape[1:3])
    return torch.empty((w_ERC.shape[0], rows, columns), device=w_ERC.device, **kwargs)


def quantise_tiles(w_ERC: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (E, R, C) and fp32 power-of-two scales (E, ceil(R / 128), ceil(C / 128)).

    The scales of the transpose are the transpose of the scales, and its codes are the transpose of the codes.
    """
    codes = torch.empty(w_ERC.shape, dtype=E4M3, device=w_ERC.device)
    scales = _tile_grid(w_ERC, dtype=torch.float32)
    for rows, columns in _tiles(w_ERC):
        tile = w_ERC[:, rows, columns].float()
        exponent = e4m3_exponent(_finite_size(tile).amax((1, 2)))
        codes[:, rows, columns] = to_e4m3(_ldexp(tile, -exponent[:, None, None]))
        scales[:, rows.start // FP8_BLOCK, columns.start // FP8_BLOCK] = power_of_two(exponent)
    return codes, scales


def dequantise_tiles(codes_ERC: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    _, rows, columns = codes_ERC.shape
    wide = scales.repeat_interleave(FP8_BLOCK, 1)[:, :rows].repeat_interleave(FP8_BLOCK, 2)[:, :, :columns]
    return (codes_ERC.float() * wide).to(dtype)


def to_e2m1(x: Tensor) -> Tensor:
    """Codes 0..15 (uint8), nearest even, saturating at 6."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for middle, tie_goes_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += (size >= middle) if tie_goes_up else (size > middle)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def quantise_mxfp4(w: Tensor, mode: str = "up") -> tuple[Tensor, Tensor]:
    """Blocks (..., K / 32, 16) and E8M0 scales (..., K / 32), both uint8.

    Args:
        mode: ``up``: the scale is 2^ceil(log2(amax / 6)), nothing saturates (triton_kernels' and transformers'
            default); ``floor``: 2^(floor(log2 amax) - 2) (OCP MX v1.0 section 6.3), values above 6 scales saturate.

    A block that holds a value which is not finite gets the scale 255 (NaN). A block of zeros gets the scale 0.
    """
    groups = w.float().unflatten(-1, (-1, MX_BLOCK))
    amax = _finite_size(groups).amax(-1)
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1), and 6 = 0.75 * 2^3
    shift = exponent - 3 + (mantissa > 0.75) if mode == "up" else exponent - 1 - 2
    scale = torch.where(amax == 0, torch.zeros_like(shift), (shift + 127).clamp(0, 254))
    scaled = _ldexp(_ldexp(groups, (127 - scale).clamp(max=64)[..., None]), (127 - scale - 64).clamp(min=0)[..., None])
    is_finite = groups.isfinite().all(-1)
    codes = to_e2m1(torch.where(is_finite[..., None], scaled, torch.zeros_like(scaled)))
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, torch.where(is_finite, scale, torch.full_like(scale, 255)).to(torch.uint8)


def _e2m1_values(blocks: Tensor) -> Tensor:
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=blocks.device)
    return table[codes]


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(..., K). Exact in fp32; exact in bf16 too, whose exponents reach as far."""
    exponent = scales.int()[..., None] - 127
    values = torch.ldexp(_e2m1_values(blocks).double(), exponent)
    values = torch.where((scales == 255)[..., None], torch.full_like(values, float("nan")), values)
    return values.flatten(-2).to(dtype)


@functools.lru_cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """(65536, 2): the two values of a byte under a scale, at ``scale * 256 + byte``."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    blocks = bytes_.repeat(256)[:, None, None].repeat(1, 1, MX_BLOCK // 2)
    return dequantise_mxfp4(blocks, bytes_.repeat_interleave(256)[:, None], dtype)[:, :2].contiguous()


def dequantise_mxfp4_by_table(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As ``dequantise_mxfp4``, for large tensors on a CPU: one lookup for two values."""
    places = (scales.to(torch.int32) << 8)[..., None] | blocks
    return _pairs(dtype).index_select(0, places.flatten()).view(*scales.shape[:-1], scales.shape[-1] * MX_BLOCK)


def mxfp4_to_e4m3(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as E4M3 with one power of two per 128x128 tile, exactly where they fit.

    Args:
        blocks: (E, N, K / 32, 16); scales (E, N, K / 32).

    Returns:
        codes (E, N, K); tile scales (E, ceil(N / 128), ceil(K / 128)) fp32; fits, bool like the tile scales: the
        exponents of the tile's groups spread over at most 14, so every value of it is exact. Where it does not fit the
        codes are rounded, and the caller must use another format for that tile.
    """
    values = _e2m1_values(blocks)
    exponent = torch.where((values != 0).any(-1) & (scales != 255), scales.int(), torch.full_like(scales.int(), -1))
    codes = torch.empty((*blocks.shape[:2], blocks.shape[2] * MX_BLOCK), dtype=E4M3, device=blocks.device)
    tile_scales, fits = _tile_grid(codes, dtype=torch.float32), _tile_grid(codes, dtype=torch.bool)
    is_nan = (scales == 255)[..., None]
    for rows, columns in _tiles(codes):
        groups = slice(columns.start // MX_BLOCK, columns.stop // MX_BLOCK)
        largest = exponent[:, rows, groups].amax((1, 2))
        tile_exponent = torch.where(largest < 0, torch.zeros_like(largest), (largest - 133).clamp(min=LEAST_EXPONENT))
        relative = exponent[:, rows, groups] - 127 - tile_exponent[:, None, None]
        used = exponent[:, rows, groups] >= 0
        scaled = torch.ldexp(values[:, rows, groups].double(), relative.clamp(-40, 6)[..., None]).float()
        scaled = torch.where(is_nan[:, rows, groups], torch.full_like(scaled, float("nan")), scaled)
        codes[:, rows, columns] = to_e4m3(scaled).flatten(2)
        at = (slice(None), rows.start // FP8_BLOCK, columns.start // FP8_BLOCK)
        tile_scales[at] = power_of_two(tile_exponent)
        fits[at] = ((relative >= -8) | ~used).all(-1).all(-1)
    return codes, tile_scales, fits
