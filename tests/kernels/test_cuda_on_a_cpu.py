"""The CUDA conversions run on the CPU, thread by thread, and give the references' bits."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from medgpt_kernels.mx import cases, reference
from medgpt_kernels.mx import cuda as mx_cuda
from medgpt_kernels.testing import assert_bitwise

HERE = Path(__file__).parent
LAUNCH = re.compile(r"([\w<>]+)<<<(.+?), 0, stream>>>\(")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """``mx.cu`` with its launches spelt as calls and its includes of CUDA left out."""
    folder = tmp_path_factory.mktemp("host")
    source, launches = LAUNCH.subn(r"launch(\1, \2, ", mx_cuda.SOURCE.read_text())
    assert launches == 4
    source = '#include "cuda_on_a_cpu.h"\n' + re.sub(r"#include <cuda_\w+\.h>\n", "", source)
    (folder / "mx.cpp").write_text(source)
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", f"-I{HERE}", f"-I{mx_cuda.SOURCE.parent}"]
    subprocess.run([*command, "mx.cpp", "-o", "mx.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "mx.so"))


def call(function, *arguments) -> None:
    pointers = [ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments]
    assert function(*pointers, None) == 0


def poison(*shape: int, dtype=torch.uint8) -> torch.Tensor:
    return torch.full(shape, 99, dtype=torch.uint8) if dtype == torch.uint8 else torch.full(shape, 99.0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_under_every_scale_is_unpacked_to_the_references_number(library, dtype):
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    blocks, scales = bytes_.view(16, 16).repeat(256, 1), bytes_.repeat_interleave(16)
    got = poison(scales.numel(), 32, dtype=dtype)
    call(library.medgpt_mx_unpack, blocks, scales, got, ctypes.c_int64(scales.numel()), int(dtype == torch.bfloat16))
    assert_bitwise(got, reference.dequantise_mxfp4(blocks, scales, dtype).view_as(got))


@pytest.mark.parametrize("mode", ["up", "floor"])
def test_every_bf16_beside_every_other_size_is_packed_to_the_references_bits(library, mode):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    near = every[every.abs() < 448][torch.randperm(int((every.abs() < 448).sum()), generator=generator)]
    w = torch.cat([every, every[torch.randperm(2**16, generator=generator)], near[: near.numel() // 32 * 32],
                   cases.awkward((7, 32), seed=1, dtype=torch.bfloat16).flatten()])  # fmt: skip
    groups = w.numel() // 32
    blocks, scales = poison(groups, 16), poison(groups)
    call(library.medgpt_mx_pack_bf16, w, blocks, scales, ctypes.c_int64(groups), int(mode == "floor"))
    expected, expected_scales = reference.quantise_mxfp4(w.view(groups, 32), mode)
    assert_bitwise(scales, expected_scales.flatten())
    assert_bitwise(blocks, expected.view_as(blocks))


@pytest.mark.parametrize(("E", "N", "K", "least"), [(2, 130, 192, 100), (1, 132, 160, 90), (1, 40, 32, 60)])
def test_mxfp4_becomes_the_references_e4m3_as_it_lies_and_transposed(library, E, N, K, least):
    """Exponents that spread further than E4M3 reaches too, NaN scales, and blocks of zeros."""
    generator = torch.Generator().manual_seed(N)
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    scales = torch.randint(least, 115, (E, N, K // 32), generator=generator, dtype=torch.int32).to(torch.uint8)
    scales[0, 7, 0], blocks[0, 3, 0], blocks[0, 4, 0], scales[0, 4, 0] = 255, 0x80, 0, 0
    expected, expected_scales, expected_fits = reference.mxfp4_to_e4m3(blocks, scales)
    expected = expected.view(torch.uint8)
    for lying, flipped in ((poison(E, N, K), None), (None, poison(E, K, N)), (poison(E, N, K), poison(E, K, N))):
        tiles = poison(*expected_scales.shape, dtype=torch.float32)
        fits = poison(*expected_scales.shape)
        call(library.medgpt_mx_to_e4m3, blocks, scales, lying, flipped, tiles, fits, E, N, K)
        assert_bitwise(tiles, expected_scales)
        assert_bitwise(fits, expected_fits.to(torch.uint8))
        if lying is not None:
            assert_bitwise(lying, expected)
        if flipped is not None:
            assert_bitwise(flipped.transpose(1, 2).contiguous(), expected)
