"""The MoE layer behind the router, fused: saves the tokens, the pre-activation and the index, and nothing else.

forward     z = x[token] @ W1 + b1, a = clamped SwiGLU        one launch
            y = a @ W2 + b2                                   one launch
            out = sum of weight * y over the slots            one launch (none where a token has one slot)
backward    dz, weight * a, d weight                          one launch
            dW2, db2; dW1, db1                                one launch each
            dx = sum of dz @ W1^T over the slots              two launches (one)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from medgpt_kernels.dispatch import check, check_contiguous, check_float, choose, triton_refusal
from medgpt_kernels.grouped_mlp import routed_reference
from medgpt_kernels.grouped_mlp.weight_grads import GradSink
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx.op import FLOATS, triton_dtype
from medgpt_kernels.permute.op import combine_rows
from medgpt_kernels.route.op import RowIndex, _block_e

KINDS = ("plain", "fp8", "mxfp4")
LAUNCH = {"num_warps": 8, "num_stages": 3}
BACKWARD_COLUMNS = 64
"""Columns of a tile of dz: its epilogue holds six numbers a column, and 128 of them spill 2 KB a thread (sm_90)."""
GROUP = 8
"""Tiles of rows that are worked on together, so that they share an expert's weights in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One projection of all experts as the kernels read it; a logical (E, K, N) matrix."""

    kind: str
    forward: Tensor
    """plain: (E, K, N). fp8: codes (E, N, K) uint8, K contiguous for Hopper's FP8 products. mxfp4: blocks
    (E, N, K / 32, 16)."""
    backward: Tensor
    """plain and mxfp4: the same tensor. fp8: codes (E, K, N), contiguous along the axis the gradient reduces."""
    scales: Tensor
    """fp8: fp32 (E, ceil(K / 128), ceil(N / 128)). mxfp4: (E, N, K / 32) uint8. plain: unused."""
    sizes: tuple[int, int]
    """(K, N)."""

    def strides(self, *, transposed: bool) -> tuple[int, int, int, int, int]:
        """Strides of k and n in the weight, of k and n in its scales, and of an expert in its scales."""
        K, N = self.sizes
        tiles = (_cdiv(K, 128), _cdiv(N, 128))
        if transposed:  # k runs over N and n over K
            return 1, N, 1, tiles[1], tiles[0] * tiles[1]
        along = (1, K) if self.kind == "fp8" else (N, 1)
        return *along, tiles[1], 1, tiles[0] * tiles[1]


def plain(w_EKN: Tensor) -> Weights:
    return Weights("plain", w_EKN, w_EKN, w_EKN, tuple(w_EKN.shape[1:]))


def to_fp8(w_EKN: Tensor, *, implementation: str = "auto") -> Weights:
    """E4M3 of a bf16 or fp32 weight. Both orientations come from one rounding."""
    codes, scales = mx.quantise_tiles(w_EKN.detach(), implementation=implementation)
    codes = codes.view(torch.uint8)
    return Weights("fp8", codes.transpose(1, 2).contiguous(), codes, scales, tuple(w_EKN.shape[1:]))


def packed_to_fp8(blocks: Tensor, scales: Tensor, *, checked: bool = False, implementation: str = "auto") -> Weights:
    """The same numbers as MXFP4 weights, in E4M3.

    Args:
        checked: scales and tiles were checked before, as those of weights that do not change are: nothing waits for
            the device.

    Raises:
        ValueError: a scale is NaN, or the exponents of some 128x128 tiles spread too far to be exact; their number is
            given.
    """
    codes, tile_scales, fits = mx.mxfp4_to_e4m3(blocks, scales, implementation=implementation)
    if not checked:
        mx.check_scales(scales)
        check_fits(fits)
    codes = codes.view(torch.uint8)
    _, N, groups = scales.shape
    flipped = tile_scales.transpose(1, 2).contiguous()
    return Weights("fp8", codes, codes.transpose(1, 2).contiguous(), flipped, (groups * 32, N))


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
    mx._check_packed(blocks, scales)
    if not checked:
        mx.check_scales(scales)
    _, N, groups = scales.shape
    return Weights("mxfp4", blocks, blocks, scales, (groups * 32, N))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _kernels():
    from medgpt_kernels.grouped_mlp import triton

    return triton


def _blocks(kind: str, tile: int, columns: int) -> dict[str, int]:
    return {"BLOCK_M": tile, "BLOCK_N": columns, "BLOCK_K": 128 if kind == "fp8" else 64, "GROUP": GROUP, **LAUNCH}


def _rounded(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows as the left side of a product with weights of a kind: (values, scales)."""
    if kind != "fp8":
        return x, x
    codes, scales = mx.quantise_rows(x, implementation="triton")
    return codes.view(torch.uint8), scales


def _forward(x_TH, weights_TK, index: RowIndex, w1: Weights, b1, w2: Weights, b2, limit) -> tuple[Tensor, Tensor]:
    kernels, kind, dtype = _kernels(), w1.kind, triton_dtype(x_TH.dtype)
    (T, H), (_, G), K = x_TH.shape, w1.sizes, weights_TK.shape[1]
    R, num_m, device = index.num_rows, index.num_rows // index.tile, x_TH.device
    z = torch.empty((R, G), dtype=x_TH.dtype, device=device)
    a = torch.empty((R, G // 2), dtype=torch.uint8 if kind == "fp8" else x_TH.dtype, device=device)
    a_scales = torch.empty((R, _cdiv(G // 2, 128)), dtype=torch.float32, device=device) if kind == "fp8" else a
    rows = torch.empty((T if K == 1 else R, H), dtype=x_TH.dtype, device=device)
    if num_m:
        x, x_scales = _rounded(x_TH, kind)
        kernels.gate_up_fwd_kernel[(num_m * _cdiv(G, 256),)](
            x, x_scales, w1.forward, w1.scales, b1, z, a, a_scales, index.row_entry, index.tile_expert, H, G,
            *w1.strides(transposed=False), limit, num_m, SLOTS=K, KIND=kind, DTYPE=dtype,
            **_blocks(kind, index.tile, 256),
        )  # fmt: skip
        kernels.rows_kernel[(num_m * _cdiv(H, 128),)](
            a, a_scales, w2.forward, w2.scales, b2, weights_TK, rows, index.row_entry, index.tile_expert, G // 2, H,
            *w2.strides(transposed=False), num_m, BIAS=True, SCATTER=K == 1, KIND=kind, ALONG_K=True, DTYPE=dtype,
            **_blocks(kind, index.tile, 128),
        )  # fmt: skip
    return (rows if K == 1 else combine_rows(rows, index.token_row, weights_TK)), z


def _input_grads(x_TH, weights_TK, index: RowIndex, w1: Weights, w2: Weights, b2, limit, z, grad_TH):
    """dx, d weights, dz and weight * a."""
    kernels, kind, dtype = _kernels(), w1.kind, triton_dtype(x_TH.dtype)
    (T, H), (_, G), K = x_TH.shape, w1.sizes, weights_TK.shape[1]
    R, num_m, device, F = index.num_rows, index.num_rows // index.tile, x_TH.device, w1.sizes[1] // 2
    dz = torch.empty((R, G), dtype=x_TH.dtype, device=device)
    weighted_a = torch.empty((R, F), dtype=x_TH.dtype, device=device)
    dz_codes = torch.empty((R, G), dtype=torch.uint8, device=device) if kind == "fp8" else dz
    dz_scales = torch.empty((R, _cdiv(G, 128)), dtype=torch.float32, device=device) if kind == "fp8" else dz
    parts = torch.empty((_cdiv(F, BACKWARD_COLUMNS), R), dtype=torch.float32, device=device)
    dx = torch.empty((T if K == 1 else R, H), dtype=x_TH.dtype, device=device)
    if num_m:
        grad, grad_scales = _rounded(grad_TH, kind)
        kernels.down_bwd_kernel[(num_m * parts.shape[0],)](
            grad, grad_scales, w2.backward, w2.scales, b2, z, weights_TK, dz, dz_codes, dz_scales, weighted_a, parts,
            index.row_entry, index.tile_expert, H, F, *w2.strides(transposed=True), limit, num_m, SLOTS=K, KIND=kind,
            DTYPE=dtype, **_blocks(kind, index.tile, BACKWARD_COLUMNS),
        )  # fmt: skip
        kernels.rows_kernel[(num_m * _cdiv(H, 128),)](
            dz_codes, dz_scales, w1.backward, w1.scales, dz, dz, dx, index.row_entry, index.tile_expert, G, H,
            *w1.strides(transposed=True), num_m, BIAS=False, SCATTER=K == 1, KIND=kind, ALONG_K=False, DTYPE=dtype,
            **_blocks(kind, index.tile, 128),
        )  # fmt: skip
    d_weights = parts.sum(0)[index.token_row.long()] if num_m else torch.zeros_like(weights_TK)
    return (dx if K == 1 else combine_rows(dx, index.token_row, None)), d_weights, dz, weighted_a


def weight_grads(
    a: Tensor, b: Tensor, weights_TK: Tensor, index: RowIndex, *, gather_a: bool, gather_b: bool, grad_EKN: Tensor,
    grad_bias_EN: Tensor, accumulate: bool,
) -> None:  # fmt: skip
    """Write, or add to, the gradients of one projection of all experts."""
    E, K_SIZE, N_SIZE = grad_EKN.shape
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_R": 64}
    _kernels().weight_grad_kernel[(_cdiv(K_SIZE, 128), _cdiv(N_SIZE, 128), E)](
        a, b, weights_TK, grad_EKN, grad_bias_EN, index.counts, index.row_entry, E, K_SIZE, N_SIZE,
        SLOTS=weights_TK.shape[1], GATHER_A=gather_a, GATHER_B=gather_b, ACCUMULATE=accumulate,
        GRAD_DTYPE=triton_dtype(grad_EKN.dtype), BIAS_DTYPE=triton_dtype(grad_bias_EN.dtype), TILE=index.tile,
        BLOCK_E=_block_e(E), **blocks, **LAUNCH,
    )  # fmt: skip


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, gate_up, b1, down, b2, index, w1, w2, limit, direct):
        made = _made(w1), _made(w2)
        _check_call(x_TH, weights_TK, index, made[0], b1, made[1], b2)
        out, z = _forward(x_TH, weights_TK, index, made[0], b1, made[1], b2, limit)
        ctx.save_for_backward(x_TH, weights_TK, gate_up, b1, down, b2, z)
        ctx.index, ctx.w1, ctx.w2, ctx.limit, ctx.direct = index, w1, w2, limit, direct
        return out

    @staticmethod
    def backward(ctx, grad_TH):
        x_TH, weights_TK, gate_up, b1, down, b2, z = ctx.saved_tensors
        index, w1, w2 = ctx.index, _made(ctx.w1), _made(ctx.w2)
        grad_TH = grad_TH.contiguous()
        dx, d_weights, dz, weighted_a = _input_grads(x_TH, weights_TK, index, w1, w2, b2, ctx.limit, z, grad_TH)
        if not any(ctx.needs_input_grad[2:6]):
            return dx, d_weights, *[None] * 9
        learned = []
        for weight, bias, a, b, gather_a in ((gate_up, b1, x_TH, dz, True), (down, b2, weighted_a, grad_TH, False)):
            sinks = [GradSink(stack, direct=ctx.direct) for stack in (weight, bias)]
            check(
                sinks[0].accumulate == sinks[1].accumulate,
                "main_grad of a weight and of its bias must be cleared together; one of them holds gradients",
            )
            weight_grads(
                a, b, weights_TK, index, gather_a=gather_a, gather_b=not gather_a, grad_EKN=sinks[0].out,
                grad_bias_EN=sinks[1].out, accumulate=sinks[0].accumulate,
            )  # fmt: skip
            learned += [sink.hand_over() for sink in sinks]
        return dx, d_weights, *learned, *[None] * 5


def _check_call(x_TH, weights_TK, index, w1: Weights, b1, w2: Weights, b2) -> None:
    T, H = x_TH.shape
    check_float("x_TH", x_TH, FLOATS)
    check_float("weights_TK", weights_TK, (torch.float32,))
    K1, G = w1.sizes
    check(K1 == H, f"x_TH has width {H}, gate_up {K1}; they must be equal")
    check(w2.sizes == (G // 2, H), f"down is {w2.sizes}; gate_up asks for {(G // 2, H)}")
    check(
        weights_TK.shape == index.token_row.shape,
        f"weights_TK has shape {tuple(weights_TK.shape)}; the index is for {tuple(index.token_row.shape)}",
    )
    check(weights_TK.shape[0] == T, f"x_TH has {T} tokens, weights_TK {weights_TK.shape[0]}")
    check(index.tile >= 16, f"index.tile={index.tile}; products need tiles of at least 16 rows")
    check(w1.kind == w2.kind, f"gate_up is {w1.kind}, down {w2.kind}; they must be of one kind")
    for name, w in (("gate_up", w1), ("down", w2)):
        check(w.kind in KINDS, f"{name} is of kind {w.kind!r}; allowed: {', '.join(KINDS)}")
        if w.kind == "plain":
            check(w.forward.dtype == x_TH.dtype, f"{name} is {w.forward.dtype}, x_TH {x_TH.dtype}; they must be equal")
    check_contiguous(
        x_TH=x_TH, weights_TK=weights_TK, gate_up=w1.forward, gate_up_bias=b1, down=w2.forward, down_bias=b2
    )


def routed_mlp(
    x_TH: Tensor, weights_TK: Tensor, index: RowIndex, gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float, precision: str = "bf16", direct: bool = False,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Tokens to the weighted sum of their experts' outputs, with all gradients.

    Args:
        x_TH: bf16, fp16 or fp32, contiguous.
        weights_TK: fp32 router weights.
        index: of ``route.index`` for the same choices, or ``route.index_sorted`` for rows that are sorted already.
        gate_up_EHG, down_EFH: of the dtype of ``x_TH``, GPT-oss's layout; biases of any served dtype.
        precision: ``bf16`` multiplies in the dtype of ``x_TH``; ``fp8`` rounds tokens, activations, gradients and
            weights to E4M3 for the products (weight gradients stay in the dtype of ``x_TH``).
        direct: gradients of weights that have a ``main_grad`` are written there (``weight_grads``), in its dtype.

    Returns:
        (T, H), in the dtype of ``x_TH``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check(precision in ("bf16", "fp8"), f"precision={precision!r}; allowed: bf16, fp8")
    if choose("grouped_mlp", implementation, _serves(x_TH)) == "reference":
        return routed_reference.routed_mlp(
            x_TH, weights_TK, experts_of(index), gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH, limit=limit,
            fp8=precision == "fp8", direct=direct,
        )  # fmt: skip
    if precision == "bf16":
        w1, w2 = plain(gate_up_EHG), plain(down_EFH)
    else:  # made in each pass and not kept in between: two bytes a weight of every layer would stay until its backward
        w1, w2 = partial(to_fp8, gate_up_EHG), partial(to_fp8, down_EFH)
    return _RoutedMLP.apply(
        x_TH, weights_TK, gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH, index, w1, w2, limit, direct
    )


def routed_mlp_frozen(
    x_TH: Tensor, weights_TK: Tensor, index: RowIndex, gate_up: Weights | Callable[[], Weights],
    gate_up_bias_EG: Tensor, down: Weights | Callable[[], Weights], down_bias_EH: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    """As ``routed_mlp`` with experts that do not learn, in any format (``packed``, ``packed_to_fp8``, ``to_fp8``).

    Gradients flow to the tokens and the router weights.

    Args:
        gate_up, down: weights, or functions that make them: called in the forward pass and again in the backward pass,
            so that what they make (a layer of MXFP4 in E4M3) is not kept in between.
    """
    for name, bias in (("gate_up_bias_EG", gate_up_bias_EG), ("down_bias_EH", down_bias_EH)):
        check(not bias.requires_grad, f"{name} requires a gradient; experts of this call do not learn")
    choose("grouped_mlp.frozen", "triton", _serves(x_TH))
    b1, b2 = gate_up_bias_EG, down_bias_EH
    return _RoutedMLP.apply(x_TH, weights_TK, None, b1, None, b2, index, gate_up, down, limit, False)


def _made(weights: Weights | Callable[[], Weights]) -> Weights:
    return weights if isinstance(weights, Weights) else weights()


def _serves(x: Tensor) -> dict:
    return {"triton": lambda: triton_refusal(x), "reference": lambda: None}


def experts_of(index: RowIndex) -> Tensor:
    """(T, K): the expert of each choice, from where its row lies."""
    return index.tile_expert[(index.token_row // index.tile).long()]
