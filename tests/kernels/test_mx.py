"""Conversions: the reference against a search in fp64, every implementation against the reference, bit for bit."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest
import torch
from medgpt_kernels import mx, nvcc
from medgpt_kernels.mx import cases, op, reference
from medgpt_kernels.mx import cuda as mx_cuda
from medgpt_kernels.testing import assert_bitwise, mutant

needs_triton = pytest.mark.skipif(op.triton_refusal() is not None, reason=str(op.triton_refusal()))

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or nvcc.find() is None, reason="needs a GPU of Hopper's kind or later, and nvcc"
)


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (x.double()[..., None] - values).abs().amin(-1)


E4M3_VALUES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double()
E4M3_VALUES = E4M3_VALUES[E4M3_VALUES.isfinite()]
E2M1_VALUES = torch.tensor([*reference.E2M1_VALUES, *(-v for v in reference.E2M1_VALUES)], dtype=torch.float64)


@pytest.mark.parametrize("shape", cases.ROWS)
def test_reference_rows_are_the_nearest_e4m3_under_the_smallest_power_of_two(shape):
    x = cases.awkward(shape, seed=0)
    codes, scales = reference.quantise_rows(x)
    assert scales.shape == (shape[0], -(-shape[1] // 128))
    wide = scales.double().repeat_interleave(128, 1)[:, : shape[1]]
    error = (x.double() - codes.double() * wide).abs()
    assert torch.equal(error, nearest(x.double() / wide, E4M3_VALUES) * wide)
    for group, scale in zip(x.double().abs().split(128, 1), scales.double().T):
        amax = group.amax(1)
        assert ((amax <= 448 * scale) & ((amax > 224 * scale) | (amax == 0))).all()


@pytest.mark.parametrize("mode", ["up", "floor"])
def test_reference_mxfp4_is_the_nearest_e2m1_and_saturates_only_by_floor(mode):
    w = cases.awkward((4, 96), seed=1)
    blocks, scales = reference.quantise_mxfp4(w, mode)
    scale = torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    error = (w.double() - reference.dequantise_mxfp4(blocks, scales, torch.float64)).abs()
    assert torch.equal(error, nearest(w.double() / scale, E2M1_VALUES) * scale)
    saturated = w.double().abs() > 6 * scale
    assert saturated.any() == (mode == "floor")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", cases.ROWS)
def test_rows_are_quantised_to_the_references_bits(shape, dtype, device):
    x = cases.awkward(shape, seed=2, dtype=dtype)
    x[0, 3], x[-1, -1] = float("nan"), float("inf")
    codes, scales = op.quantise_rows(x.to(device), implementation="triton")
    expected, expected_scales = reference.quantise_rows(x)
    assert_bitwise(codes.cpu(), expected)
    assert_bitwise(scales.cpu(), expected_scales)
    assert reference.dequantise_rows(expected, expected_scales)[0, 3].isnan()


@needs_triton
@pytest.mark.parametrize("shape", cases.TILES)
def test_tiles_are_quantised_to_the_references_bits_and_transpose_without_a_second_rounding(shape, device):
    w = cases.awkward(shape, seed=3, dtype=torch.bfloat16)
    codes, scales = op.quantise_tiles(w.to(device), implementation="triton")
    expected, expected_scales = reference.quantise_tiles(w)
    assert_bitwise(codes.cpu(), expected)
    assert_bitwise(scales.cpu(), expected_scales)
    lying, both, _ = op.quantise_tiles_in(w.to(device), plain=True, flipped=True, implementation="triton")
    nothing, alone, _ = op.quantise_tiles_in(w.to(device), plain=False, flipped=True, implementation="triton")
    assert nothing is None
    for made in (lying, both.view(torch.uint8).transpose(1, 2), alone.view(torch.uint8).transpose(1, 2)):
        assert_bitwise(made.view(torch.uint8).cpu(), expected.view(torch.uint8))
    flipped, flipped_scales = reference.quantise_tiles(w.transpose(1, 2).contiguous())
    assert_bitwise(flipped, expected.view(torch.uint8).transpose(1, 2).contiguous().view(torch.float8_e4m3fn))
    assert_bitwise(flipped_scales, expected_scales.transpose(1, 2).contiguous())


CONVERTERS = [pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_cuda)]


@pytest.mark.parametrize("implementation", CONVERTERS)
@pytest.mark.parametrize("mode", ["up", "floor"])
@pytest.mark.parametrize("shape", cases.PACKED)
def test_mxfp4_is_packed_to_the_references_bits(shape, mode, implementation, device):
    w = cases.awkward(shape, seed=4, dtype=torch.bfloat16 if implementation == "cuda" else torch.float32)
    w[0, 0, :32] = 0
    if shape[1] > 1:
        w[0, 1, 5], w[0, 1, 40] = float("nan"), float("-inf")
        w[0, 2, :32] = torch.tensor([6 * 2.0**-130] + [0.0] * 31)
        w[0, 3, 0] = 6 * (1 + 2**-23)
        w[0, 4, 0] = torch.finfo(torch.float32).max
    blocks, scales = op.quantise_mxfp4(w.to(device), mode=mode, implementation=implementation)
    expected, expected_scales = reference.quantise_mxfp4(w, mode)
    assert_bitwise(blocks.cpu(), expected)
    assert_bitwise(scales.cpu(), expected_scales)


def every_block() -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte under every scale: (256 scales, 16 blocks, 16 bytes)."""
    blocks = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(256, 1).repeat(1, 16)
    return blocks.contiguous(), scales.contiguous()


@pytest.mark.parametrize("implementation", CONVERTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_under_every_scale_decodes_to_the_references_number(dtype, implementation, device):
    blocks, scales = every_block()
    got = op.dequantise_mxfp4(blocks.to(device), scales.to(device), dtype=dtype, implementation=implementation).cpu()
    assert_bitwise(got, reference.dequantise_mxfp4(blocks, scales, dtype))


@pytest.mark.parametrize("mode", ["up", "floor"])
def test_packing_what_was_unpacked_keeps_every_value(mode):
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (64, 4, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    scales = torch.randint(3, 250, (64, 4), generator=generator, dtype=torch.int32).to(torch.uint8)
    values = reference.dequantise_mxfp4(blocks, scales, torch.float32)
    again = reference.dequantise_mxfp4(*reference.quantise_mxfp4(values, mode), torch.float32)
    assert_bitwise(again, values)


@pytest.mark.parametrize(
    "implementation",
    ["reference", pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_cuda)],
)
def test_mxfp4_becomes_e4m3_exactly_where_exponents_spread_over_at_most_14(implementation, device):
    generator = torch.Generator().manual_seed(6)
    E, N, K = 2, 130, 192
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    scales = torch.randint(100, 115, (E, N, K // 32), generator=generator, dtype=torch.int32).to(torch.uint8)
    scales[1, 3, 0] = 114 - 15
    blocks[1, 3, 0] = 0x11
    scales[0, 0, 0] = 114
    scales[1, 0, 0] = 114
    blocks[0, 5, 2], scales[0, 5, 2] = 0x80, 0  # zeros may have any scale
    codes, tile_scales, fits = op.mxfp4_to_e4m3(blocks.to(device), scales.to(device), implementation=implementation)
    expected = [[[True, True], [True, True]], [[False, True], [True, True]]]
    assert fits.cpu().tolist() == expected
    values = reference.dequantise_mxfp4(blocks, scales, torch.float64)
    got = reference.dequantise_tiles(codes.cpu(), tile_scales.cpu(), torch.float64)
    wide = torch.tensor(expected).repeat_interleave(128, 1)[:, :N].repeat_interleave(128, 2)[:, :, :K]
    assert torch.equal(got[wide], values[wide])
    assert not torch.equal(got[~wide], values[~wide])
    assert_bitwise(codes.cpu(), reference.mxfp4_to_e4m3(blocks, scales)[0])
    where = blocks.to(device), scales.to(device)
    for plain in (True, False):
        made = op.mxfp4_to_e4m3_in(*where, plain=plain, flipped=True, implementation=implementation)
        assert_bitwise(made[1].view(torch.uint8).transpose(1, 2), codes.view(torch.uint8))
        assert (made[0] is not None) == plain and torch.equal(made[3], fits)


def test_fake_quantisation_rounds_forward_and_passes_the_gradient_straight_through():
    w = cases.awkward((3, 64), seed=7).requires_grad_()
    rounded = op.fake_quantise_mxfp4(w, implementation="reference")
    grad = torch.randn(3, 64)
    rounded.backward(grad)
    assert_bitwise(rounded.detach(), reference.dequantise_mxfp4(*reference.quantise_mxfp4(w.detach()), torch.float32))
    assert torch.equal(w.grad, grad)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: op.quantise_rows(torch.zeros(4, 4, dtype=torch.float64)), "x_MK is float64"),
        (lambda: op.quantise_rows(torch.zeros(4, 8).t()), "x_MK is not contiguous"),
        (lambda: op.quantise_rows(torch.zeros(4)), "x_MK has shape"),
        (lambda: op.quantise_mxfp4(torch.zeros(4, 33)), "its last axis must divide by 32"),
        (lambda: op.quantise_mxfp4(torch.zeros(4, 32), mode="even"), "mode is 'even'; allowed: up, floor"),
        (lambda: op.dequantise_mxfp4(torch.zeros(4, 16), torch.zeros(4)), "blocks is float32; allowed: uint8"),
        (lambda: op.check_scales(torch.tensor([3, 255], dtype=torch.uint8)), "1 NaN scales"),
        (lambda: op.quantise_rows(torch.zeros(2, 2), implementation="fast"), "allowed: auto, triton, reference"),
    ],
)
def test_a_call_that_cannot_be_served_is_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()


MUTANTS = {
    "wrong tail mask": ("columns[None, :] < K)\n    x =", "columns[None, :] < K // 128 * 128)\n    x ="),
    "wrong nibble": ("packed = low | (high << 4)", "packed = high | (low << 4)"),
    "scale rounded down": ("scale = (bits >> 23) - 2 + (", "scale = (bits >> 23) - 2 + 0 * ("),
    "nibbles swapped on the way back": (
        "codes = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK, 32))",
        "codes = tl.reshape(tl.join(packed >> 4, packed & 15), (BLOCK, 32))",
    ),
    "spread one too wide": ("((relative >= -8) |", "((relative >= -9) |"),
}


def _all_bits_agree(device) -> bool:
    """Every comparison above at one size, as one answer."""
    x = cases.awkward((5, 320), seed=8).to(device)
    w = cases.awkward((2, 130, 192), seed=9).to(device)
    blocks, scales = reference.quantise_mxfp4(w.cpu())
    scales[0, 0, 0] = scales[:, :128, :4].amax() - 15
    blocks[0, 0, 0] = 0x11
    pairs = [
        (op.quantise_rows(x, implementation="triton"), reference.quantise_rows(x.cpu())),
        (op.quantise_mxfp4(w, implementation="triton"), reference.quantise_mxfp4(w.cpu())),
        (
            (op.dequantise_mxfp4(blocks.to(device), scales.to(device), implementation="triton"),),
            (reference.dequantise_mxfp4(blocks, scales),),
        ),
        (
            op.mxfp4_to_e4m3(blocks.to(device), scales.to(device), implementation="triton"),
            reference.mxfp4_to_e4m3(blocks, scales),
        ),
    ]
    return all(
        torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
        for ours, expected in pairs
        for a, b in zip(ours, expected)
    )


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.mx import triton as kernels

    assert _all_bits_agree(device)
    caught = []
    for name, (old, new) in MUTANTS.items():
        with mutant(kernels, old, new, package=mx):
            if not _all_bits_agree(device):
                caught.append(name)
    assert set(caught) == set(MUTANTS)


@pytest.mark.skipif(nvcc.find() is None, reason="nvcc is not installed")
def test_cuda_sources_compile_for_hopper(tmp_path):
    library = ctypes.CDLL(str(nvcc.compile_library(mx_cuda.SOURCE, tmp_path, "-Xptxas", "-warn-spills")))
    for function in ("medgpt_mx_unpack", "medgpt_mx_pack_bf16", "medgpt_mx_to_e4m3"):
        assert getattr(library, function)


HOST = """
#include "formats.cuh"
extern "C" void run(const float* x, const unsigned char* byte, int n, unsigned char* e4m3, unsigned char* e2m1,
                    float* from_e2m1, float* from_e8m0, int* scale) {
  for (int i = 0; i < n; ++i) {
    e4m3[i] = mx::to_e4m3(x[i]);
    e2m1[i] = x[i] == x[i] ? mx::to_e2m1(x[i]) : 0;
    from_e2m1[i] = mx::from_e2m1(byte[i] & 15);
    from_e8m0[i] = mx::from_e8m0(byte[i]);
    scale[i] = mx::block_scale(mx::is_finite(x[i]) ? (x[i] < 0 ? -x[i] : x[i]) : 0.0f, false);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_formats_of_the_cuda_source_are_the_references(tmp_path):
    (tmp_path / "host.cpp").write_text(HOST)
    include = pathlib.Path(mx_cuda.SOURCE).parent
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{include}", "host.cpp", "-o", "host.so"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([x, x * 1.003, x * 0.37])
    n = x.numel()
    byte = (torch.arange(n) % 256).to(torch.uint8)
    e4m3, e2m1 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    value, power, scale = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.int32)
    run = ctypes.CDLL(str(tmp_path / "host.so")).run
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, byte, e4m3, e2m1, value, power, scale)]
    run(pointers[0], pointers[1], n, *pointers[2:])
    assert_bitwise(e4m3.view(torch.float8_e4m3fn), reference.to_e4m3(x))
    known = ~x.isnan()
    assert_bitwise(e2m1[known], reference.to_e2m1(x)[known])
    blocks = byte[:256].view(16, 1, 16).repeat(1, 1, 1)
    decoded = reference.dequantise_mxfp4(blocks, torch.full((16, 1), 127, dtype=torch.uint8), torch.float32)
    assert_bitwise(value[:256], decoded.flatten()[0::2])
    exact = torch.exp2(byte[:255].double() - 127).float()
    assert_bitwise(power[:255], exact)
    assert power[255].isnan()
    finite = x.isfinite()
    single = torch.zeros(int(finite.sum()), 32)
    single[:, 0] = x[finite]
    assert_bitwise(scale[finite].to(torch.uint8), reference.quantise_mxfp4(single)[1].flatten())
