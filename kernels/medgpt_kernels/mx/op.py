"""The conversions with their checks, the choice of implementation, and registration for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.dispatch import FLOATS, check, check_contiguous, check_dtype, choose, triton_refusal
from medgpt_kernels.mx import reference
from medgpt_kernels.mx.reference import E4M3, FP8_BLOCK, MX_BLOCK


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _kernels():
    from medgpt_kernels.mx import triton  # an optional dependency, imported when a kernel is first asked for

    return triton


def _serves(*tensors: Tensor) -> dict:
    return {"triton": lambda: triton_refusal(*tensors), "reference": lambda: None}


def triton_dtype(dtype: torch.dtype):
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def sum_block(dtype: torch.dtype) -> int:
    """Of a product's sum, how much is loaded at a time. fp32 has no tensor cores for exact products: 64 would take 295
    KB of shared memory in four stages, and 27 KB of stack a thread (Triton 3.6, sm_90)."""
    return 32 if dtype == torch.float32 else 64


@torch.library.custom_op("medgpt_kernels::quantise_rows", mutates_args=())
def _quantise_rows(x_MK: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation == "reference":
        codes, scales = reference.quantise_rows(x_MK)
        return codes.view(torch.uint8), scales
    M, K = x_MK.shape
    G = _cdiv(K, FP8_BLOCK)
    codes = torch.empty((M, K), dtype=torch.uint8, device=x_MK.device)
    scales = torch.empty((M, G), dtype=torch.float32, device=x_MK.device)
    if M:
        _kernels().quantise_rows_kernel[(_cdiv(M, 32), G)](x_MK, codes, scales, M, K, G, BLOCK_M=32)
    return codes, scales


@_quantise_rows.register_fake
def _(x_MK, implementation):
    M, K = x_MK.shape
    return x_MK.new_empty((M, K), dtype=torch.uint8), x_MK.new_empty((M, _cdiv(K, FP8_BLOCK)), dtype=torch.float32)


def quantise_rows(x_MK: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """FP8 for the left side of a product: one power-of-two scale per 128 consecutive values of a row.

    Args:
        x_MK: bf16, fp16 or fp32, contiguous. K need not divide by 128: the last group is shorter (2880 has 23).

    Returns:
        float8_e4m3fn (M, K) and fp32 (M, ceil(K / 128)). Values that are not finite become NaN.

    Raises:
        ValueError: dtype, layout or dimensions that are not served.
    """
    check(x_MK.dim() == 2 and x_MK.shape[1] > 0, f"x_MK has shape {tuple(x_MK.shape)}; allowed: (M, K) with K > 0")
    check_dtype("x_MK", x_MK, FLOATS)
    check_contiguous(x_MK=x_MK)
    codes, scales = _quantise_rows(x_MK, choose("mx.quantise_rows", implementation, _serves(x_MK)))
    return codes.view(E4M3), scales


def _codes(like: Tensor, E: int, R: int, C: int, plain: bool, flipped: bool) -> tuple[Tensor, Tensor]:
    """Room for codes as they lie and transposed; of no matrices where they are not wanted."""
    made = {"dtype": torch.uint8, "device": like.device}
    return torch.empty((E if plain else 0, R, C), **made), torch.empty((E if flipped else 0, C, R), **made)


def _wanted(codes: Tensor, flipped_codes: Tensor) -> tuple[Tensor | None, Tensor | None]:
    lying, flipped = (c.view(E4M3) if c.numel() else None for c in (codes, flipped_codes))
    return lying, flipped


@torch.library.custom_op("medgpt_kernels::quantise_tiles", mutates_args=())
def _quantise_tiles(w_ERC: Tensor, plain: bool, flipped: bool, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    E, R, C = w_ERC.shape
    codes, flipped_codes = _codes(w_ERC, E, R, C, plain, flipped)
    if implementation == "reference":
        made, scales = reference.quantise_tiles(w_ERC)
        codes.copy_(made.view(torch.uint8)[: codes.shape[0]])
        flipped_codes.copy_(made.view(torch.uint8)[: flipped_codes.shape[0]].transpose(1, 2))
        return codes, flipped_codes, scales
    grid = (_cdiv(R, FP8_BLOCK), _cdiv(C, FP8_BLOCK), E)
    scales = torch.empty((E, *grid[:2]), dtype=torch.float32, device=w_ERC.device)
    _kernels().quantise_tiles_kernel[grid](
        w_ERC, codes, flipped_codes, scales, R, C, PLAIN=plain, FLIPPED=flipped, num_warps=8
    )
    return codes, flipped_codes, scales


@_quantise_tiles.register_fake
def _(w_ERC, plain, flipped, implementation):
    E, R, C = w_ERC.shape
    scales = w_ERC.new_empty((E, _cdiv(R, FP8_BLOCK), _cdiv(C, FP8_BLOCK)), dtype=torch.float32)
    return *_codes(w_ERC, E, R, C, plain, flipped), scales


def quantise_tiles(w_ERC: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """FP8 for weights: one power-of-two scale per 128x128 tile, so that a transpose needs no second rounding.

    Args:
        w_ERC: bf16, fp16 or fp32, contiguous, E matrices; tiles at the edges are smaller.

    Returns:
        float8_e4m3fn (E, R, C) and fp32 (E, ceil(R / 128), ceil(C / 128)).
    """
    codes, _, scales = quantise_tiles_in(w_ERC, plain=True, flipped=False, implementation=implementation)
    assert codes is not None
    return codes, scales


def quantise_tiles_in(
    w_ERC: Tensor, *, plain: bool, flipped: bool, implementation: str = "auto"
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As ``quantise_tiles``, the codes as they lie (``plain``) and transposed, (E, C, R) (``flipped``), each where it
    is wanted, in one pass over the weights: transposing codes afterwards reads and writes them again, byte by byte."""
    check(
        w_ERC.dim() == 3 and w_ERC.numel() > 0, f"w_ERC has shape {tuple(w_ERC.shape)}; allowed: (E, R, C), not empty"
    )
    check_dtype("w_ERC", w_ERC, FLOATS)
    check_contiguous(w_ERC=w_ERC)
    check(plain or flipped, "plain and flipped are both False; one of them must be wanted")
    chosen = choose("mx.quantise_tiles", implementation, _serves(w_ERC))
    codes, flipped_codes, scales = _quantise_tiles(w_ERC, plain, flipped, chosen)
    return *_wanted(codes, flipped_codes), scales


@torch.library.custom_op("medgpt_kernels::quantise_mxfp4", mutates_args=())
def _quantise_mxfp4(w: Tensor, mode: str, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation == "reference":
        return reference.quantise_mxfp4(w, mode)
    groups = w.numel() // MX_BLOCK
    leading = (*w.shape[:-1], w.shape[-1] // MX_BLOCK)
    blocks = torch.empty((*leading, MX_BLOCK // 2), dtype=torch.uint8, device=w.device)
    scales = torch.empty(leading, dtype=torch.uint8, device=w.device)
    if implementation == "cuda":
        from medgpt_kernels.mx import cuda

        cuda.pack(w, blocks, scales, mode)
    elif groups:
        _kernels().pack_mxfp4_kernel[(_cdiv(groups, 128),)](w, blocks, scales, groups, FLOOR=mode == "floor", BLOCK=128)
    return blocks, scales


@_quantise_mxfp4.register_fake
def _(w, mode, implementation):
    leading = (*w.shape[:-1], w.shape[-1] // MX_BLOCK)
    return w.new_empty((*leading, MX_BLOCK // 2), dtype=torch.uint8), w.new_empty(leading, dtype=torch.uint8)


def quantise_mxfp4(w: Tensor, *, mode: str = "up", implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """MXFP4 along the last axis. See ``reference.quantise_mxfp4``.

    Args:
        w: bf16, fp16 or fp32, contiguous, (..., K) with K a multiple of 32.

    Returns:
        blocks (..., K / 32, 16) and scales (..., K / 32), uint8.
    """
    check(mode in reference.SCALE_MODES, f"mode is {mode!r}; allowed: {', '.join(reference.SCALE_MODES)}")
    check(w.dim() > 0 and w.shape[-1] % MX_BLOCK == 0, f"w has {tuple(w.shape)}; its last axis must divide by 32")
    check_dtype("w", w, FLOATS)
    check_contiguous(w=w)
    serves = {**_cuda_serves(w, w.dtype, (torch.bfloat16,)), **_serves(w)}
    return _quantise_mxfp4(w, mode, choose("mx.quantise_mxfp4", implementation, serves))


def check_packed(blocks: Tensor, scales: Tensor) -> None:
    """Refuse blocks and scales that are not MXFP4's.

    Raises:
        ValueError: dtypes, shapes, layouts or devices.
    """
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        check_dtype(name, tensor, (torch.uint8,))
    check(
        blocks.dim() > 1 and blocks.shape[-1] == MX_BLOCK // 2 and blocks.shape[:-1] == scales.shape,
        f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}; allowed: (..., K / 32, 16) and (..., K / 32)",
    )
    check_contiguous(blocks=blocks, scales=scales)


def check_scales(scales: Tensor) -> None:
    """Refuse NaN scales. Reads the tensor on the host: call it where weights are loaded, not in a step.

    Raises:
        ValueError: an E8M0 byte is 255.
    """
    check_dtype("scales", scales, (torch.uint8,))
    bad = int((scales == 255).sum())
    check(
        bad == 0,
        f"scales holds {bad} NaN scales (E8M0 255) of {scales.numel()}; allowed: 0 to 254, the weights are damaged",
    )


@torch.library.custom_op("medgpt_kernels::dequantise_mxfp4", mutates_args=())
def _dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    if implementation == "reference":
        return reference.dequantise_mxfp4(blocks, scales, dtype)
    w = torch.empty((*scales.shape[:-1], scales.shape[-1] * MX_BLOCK), dtype=dtype, device=blocks.device)
    groups = scales.numel()
    if implementation == "cuda":
        from medgpt_kernels.mx import cuda

        cuda.unpack(blocks, scales, w)
    elif groups:
        grid = (_cdiv(groups, 128),)
        _kernels().unpack_mxfp4_kernel[grid](blocks, scales, w, groups, DTYPE=triton_dtype(dtype), BLOCK=128)
    return w


@_dequantise_mxfp4.register_fake
def _(blocks, scales, dtype, implementation):
    return blocks.new_empty((*scales.shape[:-1], scales.shape[-1] * MX_BLOCK), dtype=dtype)


def dequantise_mxfp4(
    blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16, implementation: str = "auto"
) -> Tensor:
    """MXFP4 to (..., K), exact in bf16 and fp32; a NaN scale gives NaN (see ``check_scales``)."""
    check_packed(blocks, scales)
    check(dtype in (torch.bfloat16, torch.float32), f"dtype is {dtype}; allowed: bfloat16, float32")
    serves = {**_cuda_serves(blocks), **_serves(blocks, scales)}
    return _dequantise_mxfp4(blocks, scales, dtype, choose("mx.dequantise_mxfp4", implementation, serves))


def _cuda_serves(tensor: Tensor, dtype: torch.dtype | None = None, allowed: tuple[torch.dtype, ...] = ()) -> dict:
    from medgpt_kernels.mx import cuda

    refusal = f"it does not serve {dtype}" if allowed and dtype not in allowed else None
    return {"cuda": lambda: refusal or cuda.refusal(tensor)}


@torch.library.custom_op("medgpt_kernels::mxfp4_to_e4m3", mutates_args=())
def _mxfp4_to_e4m3(
    blocks: Tensor, scales: Tensor, plain: bool, flipped: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    E, N, groups = scales.shape
    K = groups * MX_BLOCK
    codes, flipped_codes = _codes(blocks, E, N, K, plain, flipped)
    if implementation == "reference":
        made, tile_scales, fits = reference.mxfp4_to_e4m3(blocks, scales)
        codes.copy_(made.view(torch.uint8)[: codes.shape[0]])
        flipped_codes.copy_(made.view(torch.uint8)[: flipped_codes.shape[0]].transpose(1, 2))
        return codes, flipped_codes, tile_scales, fits
    grid = (_cdiv(N, FP8_BLOCK), _cdiv(K, FP8_BLOCK), E)
    tile_scales = torch.empty((E, *grid[:2]), dtype=torch.float32, device=blocks.device)
    fits = torch.empty((E, *grid[:2]), dtype=torch.int8, device=blocks.device)
    if implementation == "cuda":
        from medgpt_kernels.mx import cuda

        cuda.to_e4m3(blocks, scales, codes if plain else None, flipped_codes if flipped else None, tile_scales, fits)
    else:
        _kernels().mxfp4_to_e4m3_kernel[grid](
            blocks, scales, codes, flipped_codes, tile_scales, fits, N, K, PLAIN=plain, FLIPPED=flipped, num_warps=8
        )
    return codes, flipped_codes, tile_scales, fits.bool()


@_mxfp4_to_e4m3.register_fake
def _(blocks, scales, plain, flipped, implementation):
    E, N, groups = scales.shape
    tiles = (E, _cdiv(N, FP8_BLOCK), _cdiv(groups * MX_BLOCK, FP8_BLOCK))
    codes = _codes(blocks, E, N, groups * MX_BLOCK, plain, flipped)
    return *codes, blocks.new_empty(tiles, dtype=torch.float32), blocks.new_empty(tiles, dtype=torch.bool)


def mxfp4_to_e4m3(blocks: Tensor, scales: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as E4M3 with a power of two per 128x128 tile. See ``reference.mxfp4_to_e4m3``.

    Returns:
        float8_e4m3fn (E, N, K); fp32 tile scales; bool ``fits`` of each tile. Count ``~fits`` and use bf16 there.
    """
    made = mxfp4_to_e4m3_in(blocks, scales, plain=True, flipped=False, implementation=implementation)
    codes, _, tile_scales, fits = made
    assert codes is not None
    return codes, tile_scales, fits


def mxfp4_to_e4m3_in(
    blocks: Tensor, scales: Tensor, *, plain: bool, flipped: bool, implementation: str = "auto"
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """As ``mxfp4_to_e4m3``, the codes as they lie and transposed, (E, K, N), each where it is wanted: see
    ``quantise_tiles_in``."""
    check(
        blocks.dim() == 4 and blocks.numel() > 0, f"blocks has shape {tuple(blocks.shape)}; allowed: (E, N, K / 32, 16)"
    )
    check_packed(blocks, scales)
    serves = {**_cuda_serves(blocks), **_serves(blocks, scales)}
    check(plain or flipped, "plain and flipped are both False; one of them must be wanted")
    chosen = choose("mx.mxfp4_to_e4m3", implementation, serves)
    codes, flipped_codes, tile_scales, fits = _mxfp4_to_e4m3(blocks, scales, plain, flipped, chosen)
    return *_wanted(codes, flipped_codes), tile_scales, fits


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, mode: str, implementation: str) -> Tensor:
        blocks, scales = quantise_mxfp4(w.detach().contiguous(), mode=mode, implementation=implementation)
        dtype = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
        return dequantise_mxfp4(blocks, scales, dtype=dtype, implementation=implementation).to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


def fake_quantise_mxfp4(w: Tensor, *, mode: str = "up", implementation: str = "auto") -> Tensor:
    """``w`` rounded to MXFP4 along its last axis, in its own dtype; the gradient passes straight through."""
    return _FakeQuantise.apply(w, mode, implementation)
