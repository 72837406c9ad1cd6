"""Weights of experts in the formats that the products read."""

from __future__ import annotations

from torch import Tensor

from medgpt_kernels.dispatch import FLOATS, check, check_axes, check_contiguous, check_dtype
from medgpt_kernels.grouped_mlp.launch import Weights
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx.reference import MX_BLOCK

KINDS = ("plain", "fp8", "mxfp4")


def plain(w_EKN: Tensor) -> Weights:
    """Weights as they are, (E, K, N)."""
    check_axes("w_EKN", w_EKN, "(E, K, N)")
    return Weights("plain", w_EKN, w_EKN, w_EKN, tuple(w_EKN.shape[1:]))


def to_fp8(w_EKN: Tensor, *, passes: str = "both", implementation: str = "auto") -> Weights:
    """E4M3 of a bf16 or fp32 weight. Both orientations come from one rounding.

    Args:
        passes: ``forward``, ``backward`` or ``both``: the orientations that are made.
    """
    _check_weight(w_EKN)
    forward, backward = _passes(passes)
    lying, flipped, scales = mx.quantise_tiles_in(
        w_EKN.detach(), plain=backward, flipped=forward, implementation=implementation
    )
    return Weights("fp8", flipped, lying, scales, tuple(w_EKN.shape[1:]))


def to_mxfp4(w_EKN: Tensor, *, passes: str = "both", implementation: str = "auto") -> Weights:
    """MXFP4 of a bf16 or fp32 weight, in blocks along K. The products of both passes decode the same blocks.

    Args:
        passes: taken for the sake of ``to_fp8``.
    """
    _check_weight(w_EKN)
    check(w_EKN.shape[1] % MX_BLOCK == 0, f"w_EKN has K = {w_EKN.shape[1]}; allowed: multiples of {MX_BLOCK}")
    blocks, scales = mx.quantise_mxfp4(w_EKN.detach().transpose(1, 2).contiguous(), implementation=implementation)
    return Weights("mxfp4", blocks, blocks, scales, tuple(w_EKN.shape[1:]))


def _check_weight(w_EKN: Tensor) -> None:
    check_axes("w_EKN", w_EKN, "(E, K, N)")
    check_dtype("w_EKN", w_EKN, FLOATS)
    check_contiguous(w_EKN=w_EKN)


def _passes(passes: str) -> tuple[bool, bool]:
    """(forward, backward)."""
    check(passes in ("forward", "backward", "both"), f"passes={passes!r}; allowed: forward, backward, both")
    return passes != "backward", passes != "forward"


def packed_to_fp8(
    blocks: Tensor, scales: Tensor, *, checked: bool = False, passes: str = "both", implementation: str = "auto"
) -> Weights:
    """The same numbers as MXFP4 weights, in E4M3.

    Args:
        checked: scales and tiles were checked before, as those of weights that do not change are: nothing waits for
            the device.
        passes: see ``to_fp8``.

    Raises:
        ValueError: a scale is NaN, or the exponents of some 128x128 tiles spread too far to be exact; their number is
            given.
    """
    forward, backward = _passes(passes)
    lying, flipped, tile_scales, fits = mx.mxfp4_to_e4m3_in(
        blocks, scales, plain=forward, flipped=backward, implementation=implementation
    )
    if not checked:
        mx.check_scales(scales)
        check_fits(fits)
    _, N, groups = scales.shape
    return Weights("fp8", lying, flipped, tile_scales.transpose(1, 2).contiguous(), (groups * 32, N))


def check_fits(fits: Tensor) -> None:
    """Refuse MXFP4 weights that E4M3 does not hold exactly. Reads the tensor on the host.

    Args:
        fits: of each tile, from ``mx.mxfp4_to_e4m3``.
    """
    bad = int((~fits).sum())
    check(
        bad == 0,
        f"blocks: {bad} of {fits.numel()} tiles have exponents that spread over more than 14 and are not exact in "
        "E4M3; use kind mxfp4, which decodes to bf16",
    )


def packed(blocks: Tensor, scales: Tensor, *, checked: bool = False) -> Weights:
    """Frozen weights that stay in MXFP4 and are decoded inside the products.

    Args:
        checked: see ``packed_to_fp8``.

    Raises:
        ValueError: a scale is NaN; dtypes, shapes or layouts that are not served.
    """
    mx.check_packed(blocks, scales)
    if not checked:
        mx.check_scales(scales)
    _, N, groups = scales.shape
    return Weights("mxfp4", blocks, blocks, scales, (groups * 32, N))
