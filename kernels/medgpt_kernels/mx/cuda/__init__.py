"""The bulk conversions in CUDA C++, compiled on first use."""

from __future__ import annotations

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

from medgpt_kernels import nvcc

SOURCE = pathlib.Path(__file__).parent / "mx.cu"


@functools.cache
def _device_refusal(index: int) -> str | None:
    if torch.cuda.get_device_capability(index) not in ((9, 0), (10, 0)):
        return "it is built for Hopper and Blackwell (compute capability 9.0 and 10.0)"
    return None if nvcc.find() else "nvcc is not on the PATH"


def refusal(tensor: Tensor) -> str | None:
    """Why the CUDA conversions cannot serve a tensor's device, or None."""
    if not tensor.is_cuda:
        return f"a tensor is on {tensor.device.type}"
    return _device_refusal(tensor.device.index or 0)


def _call(function: str, *arguments: Tensor | int | None) -> None:
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    handed = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            handed.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            handed.append(ctypes.c_void_p(None) if argument is None else argument)
    with torch.cuda.device(tensor.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(nvcc.load(SOURCE), function)(*handed, stream)
    if error:
        raise RuntimeError(f"{function} failed with CUDA error {error}")


def unpack(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """MXFP4 to bf16 or fp32, into ``out``."""
    _call("medgpt_mx_unpack", blocks, scales, out, ctypes.c_int64(scales.numel()), int(out.dtype == torch.bfloat16))


def pack(w: Tensor, blocks: Tensor, scales: Tensor, mode: str) -> None:
    """bf16 to MXFP4, into ``blocks`` and ``scales``."""
    _call("medgpt_mx_pack_bf16", w, blocks, scales, ctypes.c_int64(scales.numel()), int(mode == "floor"))


def to_e4m3(
    blocks: Tensor, scales: Tensor, codes: Tensor | None, transposed: Tensor | None, tile_scales: Tensor, fits: Tensor
) -> None:
    """MXFP4 to E4M3 with a power of two per 128x128 tile, as it lies (E, N, K) and transposed (E, K, N), each where
    room is given."""
    matrices, rows, groups = scales.shape
    _call("medgpt_mx_to_e4m3", blocks, scales, codes, transposed, tile_scales, fits, matrices, rows, groups * 32)
