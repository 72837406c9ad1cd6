"""The rounding formulas of the kernels against PyTorch's own casts and against a search for the nearest value."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from medgpt_kernels import rounding  # noqa: E402
from medgpt_kernels.testing import assert_bitwise  # noqa: E402

BLOCK = 4096


@triton.jit
def apply_kernel(x_ptr, y_ptr, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    if WHAT == "to_bf16":
        y = rounding.to_bf16(x)
    elif WHAT == "to_e4m3":
        y = rounding.to_e4m3(x)
    elif WHAT == "from_e4m3":
        y = rounding.from_e4m3(x)
    elif WHAT == "to_e2m1":
        y = rounding.to_e2m1(x)
    elif WHAT == "from_e2m1":
        y = rounding.from_e2m1(x)
    elif WHAT == "from_e8m0":
        y = rounding.from_e8m0(x)
    else:
        y = rounding.e4m3_exponent(x)
    tl.store(y_ptr + at, y, mask=at < n)


def applied(what: str, x: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=device)
    apply_kernel[(-(-x.numel() // BLOCK),)](x.to(device), y, x.numel(), WHAT=what, BLOCK=BLOCK)
    return y.cpu()


def every_bf16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def between_bf16() -> torch.Tensor:
    """Every finite bf16, the midpoint to its neighbour, and that midpoint a little more and less."""
    bits = torch.arange(0, 0x7F80, dtype=torch.int32) << 16
    return torch.cat([(bits + low).view(torch.float32) for low in (0, 0x7FFF, 0x8000, 0x8001)])


def test_bf16_is_rounded_as_torch_rounds_it(device):
    x = torch.cat([between_bf16(), -between_bf16(), torch.tensor([float("nan"), float("inf"), -float("inf")])])
    assert_bitwise(applied("to_bf16", x, torch.bfloat16, device), x.bfloat16())


def test_e4m3_is_rounded_as_torch_rounds_it_and_saturates(device):
    x = torch.cat([every_bf16(), every_bf16() * 1.003, every_bf16() * 0.37])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    expected[~x.isfinite()] = 0x7F
    assert_bitwise(applied("to_e4m3", x, torch.uint8, device), expected)


def test_e4m3_decodes_as_torch_decodes_it(device):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert_bitwise(applied("from_e4m3", codes, torch.float32, device), codes.view(torch.float8_e4m3fn).float())


def test_e2m1_is_the_nearest_value_with_ties_to_the_even_code(device):
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    x = torch.cat(
        [torch.linspace(0, 7, 7 * 64 + 1), torch.tensor([0.2499999, 0.2500001, 1e-40, 100.0, 4.9999995, 5.0000005])]
    )
    distance = (x.double()[:, None] - values).abs()
    even_first = distance + (torch.arange(8) % 2) * 1e-12
    expected = even_first.argmin(1).to(torch.uint8)
    assert_bitwise(applied("to_e2m1", x, torch.uint8, device), expected)
    assert_bitwise(applied("to_e2m1", -x, torch.uint8, device), expected | 8)
    codes = torch.arange(16, dtype=torch.int32).to(torch.uint8)
    assert applied("from_e2m1", codes, torch.float32, device).tolist() == [*values.tolist(), *(-values).tolist()]


def test_e8m0_reaches_its_subnormal_and_its_nan(device):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = torch.pow(torch.tensor(2.0, dtype=torch.float64), codes.double() - 127).float()
    expected[255] = float("nan")
    assert_bitwise(applied("from_e8m0", codes, torch.float32, device), expected)


def test_the_scale_of_a_block_is_the_smallest_that_holds_it(device):
    amax = torch.cat([torch.tensor([448.0, 448.00003, 447.99997, 1.0, 0.0, 3e38, 1e-45]), every_bf16().abs()])
    amax = amax[amax.isfinite()]
    exponent = applied("e4m3_exponent", amax, torch.int32, device).double()
    limit = 448 * torch.exp2(exponent)
    assert (amax.double() <= limit).all()
    tight = (amax.double() > limit / 2) | (amax == 0) | (exponent == -118)
    assert tight.all()
