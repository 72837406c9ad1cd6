"""MXFP4 as GPT-oss is published in it: 32 values of 4 bits (E2M1) share one scale of 8 bits (E8M0, a power of two).

``blocks`` (..., groups, 16) uint8 hold two values a byte, the even one in the low half; ``scales`` (..., groups) uint8
hold the exponent plus 127. Sources: OCP Microscaling Formats 1.0, sections 5.3.3, 5.4.1 and 6.3; the layout of
openai/gpt-oss ``gpt_oss/torch/weights.py``.

Dequantisation is one function everywhere; quantisation is not: implementations differ in how they choose the scale.
The rule is therefore named. Elements round to nearest, ties to even, and saturate at 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from megatron_medgpt.config.errors import WorkError

GROUP = 32
"""Values that share a scale."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by code."""
NAN_SCALE = 255
_BIAS = 127
_MANTISSA = 0x007FFFFF
_CHUNK = 1 << 18
"""Values worked on at a time."""

ScaleRule = Literal["up", "floor", "even", "ceil"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
"""How the scale follows from a group's largest magnitude ``amax``:

up      2**ceil(log2(amax / 6)): nothing saturates. triton_kernels' default, and so transformers'.
floor   2**(floor(log2(amax)) - 2): the OCP specification, section 6.3. Magnitudes between 6 and 8 saturate.
even    as floor, after rounding amax to two significant bits (torchao, quark).
ceil    2**(ceil(log2(amax)) - 2) (torchao).
"""


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values of packed groups: (..., groups, 16) and (..., groups) to (..., groups * 32), in the order of storage.

    Equal to transformers' ``convert_moe_packed_tensors`` before its transposition, value for value. Every value is
    exact in bfloat16 unless it exceeds bfloat16's range (scales above 252 times 6).

    Raises:
        WorkError: a scale is 255, which stands for NaN, or a value exceeds the range of ``dtype``.
    """
    _require_packed(blocks, scales)
    shape = (*scales.shape[:-1], scales.shape[-1] * GROUP)
    if blocks.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    highest = int(scales.max()) if scales.numel() else 0
    if highest == NAN_SCALE:
        raise WorkError(
            f"{int((scales == NAN_SCALE).sum())} MXFP4 scales are 255, which means NaN; the file is damaged"
        )
    pairs = _pair_table(dtype)
    places = (scales.contiguous().numpy().astype(np.uint16) << 8)[..., None] | blocks.contiguous().numpy()
    raw = np.empty(places.size, pairs.dtype)
    for start in range(0, places.size, _CHUNK):  # the indices grow to 8 bytes each: keep them in the cache
        np.take(pairs, places.reshape(-1)[start : start + _CHUNK], out=raw[start : start + _CHUNK], mode="clip")
    values = torch.from_numpy(raw.view(np.uint8)).view(dtype)
    if highest > 252 and not torch.isfinite(values).all():
        raise WorkError(f"MXFP4 scale {highest} gives values beyond the range of {dtype}; the file is damaged")
    return values.view(shape)


def quantise(values: Tensor, rule: ScaleRule = "up") -> tuple[Tensor, Tensor]:
    """Pack values: (..., n) with n a multiple of 32 to blocks (..., n / 32, 16) and scales (..., n / 32), uint8.

    A group of zeros has the scale 0. The sign of a value that rounds to zero is kept.

    Raises:
        WorkError: a value is not finite; a file must not hide it behind a saturated 6.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"{values.shape[-1]} values are not a multiple of {GROUP}")
    shape = (*values.shape[:-1], values.shape[-1] // GROUP)
    if values.is_meta:
        return tuple(torch.empty(s, dtype=torch.uint8, device="meta") for s in ((*shape, GROUP // 2), shape))
    groups = values.reshape(-1, GROUP)
    blocks = torch.empty(groups.shape[0], GROUP // 2, dtype=torch.uint8)
    scales = torch.empty(groups.shape[0], dtype=torch.uint8)
    for start in range(0, groups.shape[0], _CHUNK // GROUP):  # a dozen passes: keep them in the cache
        part = slice(start, start + _CHUNK // GROUP)
        blocks[part], scales[part] = _quantise_groups(groups[part].to(torch.float32), rule)
    return blocks.view(*shape, GROUP // 2), scales.view(shape)


def _quantise_groups(groups: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    largest = groups.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise WorkError("values to quantise are not all finite")
    scales = _scale_bytes(largest, rule)
    # A product, not a quotient: 2**(127 - byte) is exact in float32 for every byte below 255.
    inverse = torch.tensor([2.0 ** (_BIAS - byte) for byte in range(NAN_SCALE)], dtype=torch.float32)
    codes = _codes(groups * inverse[scales.long()][..., None])
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales


def _scale_bytes(largest: Tensor, rule: ScaleRule) -> Tensor:
    """E8M0 bytes of float32 magnitudes. An exponent field of 0 (subnormals) counts as -127, the smallest scale."""
    if rule == "up":
        exponents = ((largest / 6).view(torch.int32) + _MANTISSA) >> 23
        return exponents.clamp(0, NAN_SCALE - 1).to(torch.uint8)
    if rule not in SCALE_RULES:
        raise ValueError(f"scale rule {rule!r}; allowed: {', '.join(SCALE_RULES)}")
    carry = {"floor": 0, "even": 0x200000, "ceil": _MANTISSA}[rule]
    exponents = ((largest.view(torch.int32) + carry) >> 23) - 2
    return exponents.clamp(0, NAN_SCALE - 1).to(torch.uint8)


def _codes(scaled: Tensor) -> Tensor:
    """E2M1 codes of scaled values. Between 0 and 2 the grid is halves, between 2 and 4 ones, above it twos; and
    ``torch.round`` rounds ties to even, which is a code's even last bit in each of the three."""
    magnitude = scaled.abs().clamp_(max=6.0)
    low = (2 * magnitude).round_()
    middle = magnitude.round().add_(2)
    high = (magnitude / 2).round_().add_(4)
    codes = torch.where(magnitude < 2, low, torch.where(magnitude < 4, middle, high)).to(torch.uint8)
    return codes | (torch.signbit(scaled).to(torch.uint8) << 3)


@lru_cache
def _pair_table(dtype: torch.dtype) -> np.ndarray:
    """(65536,) array whose entry ``scale * 256 + byte`` holds, as raw bytes, the byte's two values times the scale."""
    # float64 holds every factor and product exactly, so the cast is the only rounding.
    factors = torch.tensor([2.0 ** (scale - _BIAS) for scale in range(256)], dtype=torch.float64)
    table, codes = torch.tensor(VALUES, dtype=torch.float64), torch.arange(256)
    pairs = torch.stack((table[codes & 15], table[codes >> 4]), dim=-1)
    scaled = (factors[:, None, None] * pairs).to(dtype).contiguous()
    return scaled.view(torch.uint8).numpy().reshape(-1).view(f"V{2 * dtype.itemsize}")


def _require_packed(blocks: Tensor, scales: Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise WorkError(f"MXFP4 blocks and scales are {blocks.dtype} and {scales.dtype}; both must be uint8")
    if blocks.shape != (*scales.shape, GROUP // 2):
        raise WorkError(
            f"MXFP4 blocks {list(blocks.shape)} do not belong to scales {list(scales.shape)}; expected "
            f"{[*scales.shape, GROUP // 2]}"
        )


@dataclass(slots=True)
class QuantisationError:
    """What quantising a tensor has changed; slices add up."""

    num_values: int = 0
    squared_values: float = 0.0
    squared_error: float = 0.0
    max_error: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one slice, given in any equal shapes."""
        exact, difference = before.float(), before.float() - after.float()
        self.num_values += exact.numel()
        self.squared_values += float(exact.square().sum())
        self.squared_error += float(difference.square().sum())
        self.max_error = max(self.max_error, float(difference.abs().max()) if exact.numel() else 0.0)

    def merge(self, other: QuantisationError) -> None:
        """Count what another one has counted."""
        self.num_values += other.num_values
        self.squared_values += other.squared_values
        self.squared_error += other.squared_error
        self.max_error = max(self.max_error, other.max_error)

    @property
    def relative(self) -> float:
        """Frobenius norm of the error over that of the values."""
        return (self.squared_error / self.squared_values) ** 0.5 if self.squared_values else 0.0
