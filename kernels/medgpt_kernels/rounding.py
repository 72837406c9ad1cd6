"""Rounding and decoding inside Triton kernels, the same bits in Triton's interpreter and on a GPU.

The interpreter (3.9) truncates fp32 -> bf16, drops the mantissa's carry in fp32 -> e4m3, and multiplies bit patterns in
``tl.dot`` on bf16 (triton issue 11584). So every cast and product of the kernels goes through here: integer formulas
and fp32 products when interpreted, the hardware's own instructions when compiled. ``tests/kernels/test_rounding.py``
holds the formulas to PyTorch's on every bf16 value, and the GPU check holds both ways to each other.

FP8 and FP4 values travel as unsigned bytes. Values that are not finite become NaN in E4M3 (PyTorch's cast keeps no
infinity either): an overflow must stay visible.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def to_bf16(x):
    """fp32 to bf16, nearest even."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """fp32 to the element type of an output."""
    if tl.bfloat16 == DTYPE:
        return to_bf16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def product(a, b, acc):
    """``acc + a @ b`` with an fp32 accumulator; fp32 operands are multiplied as fp32, not as tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_e4m3(x):
    """fp32 to E4M3 bits, nearest even, saturating at 448; NaN and infinities to NaN (0x7F).

    Hopper and later have an instruction for two values, which saturates infinities: x * 0 turns them to NaN first. The
    formula, 14 of half rate for one value, would make every kernel that rounds wait for arithmetic.
    """
    if INTERPRETED:
        return e4m3_by_formula(x)
    elif tl.target_info.cuda_capability_geq(9, 0):
        return (x + x * 0.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return e4m3_by_formula(x)


@triton.jit
def e4m3_by_formula(x):
    """``to_e4m3`` in integers."""
    size = tl.minimum(tl.abs(x), E4M3_MAX)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    sign = (x.to(tl.uint32, bitcast=True) >> 31) << 7
    finite = tl.abs(x) <= FLOAT_MAX
    return tl.where(finite, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """E4M3 bits to fp32, exactly: as the last bits of its exponent and the first of its mantissa, also where they mean
    a subnormal number, times what the exponents' zeros lie apart."""
    wide = code.to(tl.uint32)
    size = wide & 0x7F
    value = ((size << 20) | ((wide >> 7) << 31)).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where(size == 0x7F, float("nan"), value)


@triton.jit
def product_e4m3(a, b):
    """``a @ b`` of E4M3 values with a fresh fp32 accumulator (the caller promotes it after every 128 of K).

    They are loaded as E4M3 values, not as bytes: a cast on the way, of bits alone though it is, takes both operands
    through registers and back into shared memory before every product (Triton 3.6 and 3.9, sm_90).
    """
    if INTERPRETED:
        a, b = from_e4m3(a.to(tl.uint8, bitcast=True)), from_e4m3(b.to(tl.uint8, bitcast=True))
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def to_e2m1(x):
    """fp32 to E2M1 codes 0..15, nearest even, saturating at 6. ``x`` must not be NaN."""
    size = tl.minimum(tl.abs(x), 6.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    subnormal = (size + 4194304.0).to(tl.uint32, bitcast=True) - 0x4A800000
    code = tl.where(size < 1.0, subnormal, normal)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 31) << 3)).to(tl.uint8)


@triton.jit
def from_e2m1(code):
    """E2M1 codes to fp32: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. As ``from_e4m3``."""
    wide = code.to(tl.uint32)
    return (((wide & 7) << 22) | ((wide >> 3) << 31)).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def from_e8m0(code):
    """E8M0 bytes to fp32: 2^(code - 127), 255 to NaN; code 0 is the fp32 subnormal 2^-127."""
    wide = code.to(tl.uint32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    value = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(wide == 255, float("nan"), value)


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp32 for an int32 exponent in -126 .. 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_exponent(amax):
    """Smallest int32 e with amax <= 448 * 2^e (448 = 1.75 * 2^8), at least -118 so that 2^-e is a normal number;
    0 for amax 0."""
    bits = amax.to(tl.int32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum((bits >> 23) - 127 - 8 + above, -118)
    return tl.where(amax == 0.0, 0, exponent)


@triton.jit
def finite_size(x):
    """|x|, 0 where x is not finite: what a block's largest value is taken from."""
    size = tl.abs(x)
    return tl.where(size <= FLOAT_MAX, size, 0.0)
