"""Row movement with its gradients, and the exchange between expert ranks in bf16 or FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_dtype,
    check_shape,
    choose,
    triton_refusal,
)
from medgpt_kernels.mx.op import triton_dtype
from medgpt_kernels.permute import reference
from medgpt_kernels.permute.reference import payload_width
from medgpt_kernels.route.rows import RowIndex

BLOCK = {"BLOCK_H": 128}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _kernels():
    from medgpt_kernels.permute import triton

    return triton


def _serves(*tensors: Tensor) -> dict:
    return {"triton": lambda: triton_refusal(*tensors), "reference": lambda: None}


@torch.library.custom_op("medgpt_kernels::permute_rows", mutates_args=())
def permute_rows(x_TH: Tensor, row_entry_R: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    """The kernel: rows of tokens, times the weight of each row's (token, slot) where weights are given."""
    R, H = row_entry_R.shape[0], x_TH.shape[1]
    rows = torch.empty((R, H), dtype=x_TH.dtype, device=x_TH.device)
    if R:
        _kernels().permute_kernel[(_cdiv(R, 32), _cdiv(H, 128))](
            x_TH, row_entry_R, x_TH if weights is None else weights, rows, R, H, SLOTS=slots,
            WEIGHTED=weights is not None, DTYPE=triton_dtype(x_TH.dtype), BLOCK_R=32, **BLOCK,
        )  # fmt: skip
    return rows


@permute_rows.register_fake
def _(x_TH, row_entry_R, weights, slots):
    return x_TH.new_empty((row_entry_R.shape[0], x_TH.shape[1]))


@torch.library.custom_op("medgpt_kernels::combine_rows", mutates_args=())
def combine_rows(rows_RH: Tensor, token_row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """The kernel: sum over the slots of each token."""
    (T, K), H = token_row_TK.shape, rows_RH.shape[1]
    out = torch.empty((T, H), dtype=rows_RH.dtype, device=rows_RH.device)
    if T:
        _kernels().combine_kernel[(_cdiv(T, 16), _cdiv(H, 128))](
            rows_RH, token_row_TK, rows_RH if weights_TK is None else weights_TK, out, T, H, SLOTS=K,
            WEIGHTED=weights_TK is not None, DTYPE=triton_dtype(rows_RH.dtype), BLOCK_T=16, **BLOCK,
        )  # fmt: skip
    return out


@combine_rows.register_fake
def _(rows_RH, token_row_TK, weights_TK):
    return rows_RH.new_empty((token_row_TK.shape[0], rows_RH.shape[1]))


@torch.library.custom_op("medgpt_kernels::combine_weight_grad", mutates_args=())
def _combine_weight_grad(rows_RH: Tensor, token_row_TK: Tensor, grad_TH: Tensor) -> Tensor:
    (T, K), H = token_row_TK.shape, rows_RH.shape[1]
    grad = torch.empty((T, K), dtype=torch.float32, device=rows_RH.device)
    if T:
        _kernels().combine_weight_grad_kernel[(_cdiv(T, 16), K)](
            rows_RH, token_row_TK, grad_TH, grad, T, H, SLOTS=K, BLOCK_T=16, **BLOCK
        )
    return grad


@_combine_weight_grad.register_fake
def _(rows_RH, token_row_TK, grad_TH):
    return rows_RH.new_empty(token_row_TK.shape, dtype=torch.float32)


@torch.library.custom_op("medgpt_kernels::pack_fp8", mutates_args=())
def _pack_fp8(x_TH: Tensor, row_entry_R: Tensor, slots: int) -> Tensor:
    R, H = row_entry_R.shape[0], x_TH.shape[1]
    payload = torch.empty((R, payload_width(H)), dtype=torch.uint8, device=x_TH.device)
    if R:
        _kernels().pack_fp8_kernel[(_cdiv(R, 32), _cdiv(H, 128))](
            x_TH, row_entry_R, payload, R, H, payload.shape[1], SLOTS=slots, BLOCK_R=32
        )
    return payload


@_pack_fp8.register_fake
def _(x_TH, row_entry_R, slots):
    return x_TH.new_empty((row_entry_R.shape[0], payload_width(x_TH.shape[1])), dtype=torch.uint8)


@torch.library.custom_op("medgpt_kernels::unpack_fp8", mutates_args=())
def _unpack_fp8(payload_RP: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    R, P = payload_RP.shape
    rows = torch.empty((R, hidden), dtype=dtype, device=payload_RP.device)
    if R:
        _kernels().unpack_fp8_kernel[(_cdiv(R, 32), _cdiv(hidden, 128))](
            payload_RP, rows, R, hidden, P, DTYPE=triton_dtype(dtype), BLOCK_R=32
        )
    return rows


@_unpack_fp8.register_fake
def _(payload_RP, hidden, dtype):
    return payload_RP.new_empty((payload_RP.shape[0], hidden), dtype=dtype)


def pack_fp8(x_TH: Tensor, index: RowIndex, *, implementation: str = "auto") -> Tensor:
    """Rows of tokens as uint8 (R, payload_width(H)): codes and scales in one buffer, one exchange.

    At H = 2880 a row is 2912 bytes, 0.506 of bf16's.
    """
    _check(x_TH, "x_TH", implementation, index.token_row.shape[0], index)
    slots = index.token_row.shape[1]
    if choose("permute.pack_fp8", implementation, _serves(x_TH)) == "reference":
        return reference.pack_fp8(x_TH, index.row_entry, slots)
    return _pack_fp8(x_TH, index.row_entry, slots)


def unpack_fp8(payload_RP: Tensor, hidden: int, dtype: torch.dtype, *, implementation: str = "auto") -> Tensor:
    """The rows of a payload, (R, H); exact in bf16 and fp32 (E4M3 times a power of two)."""
    check_axes("payload_RP", payload_RP, "(R, P)")
    check(dtype in FLOATS, f"dtype is {dtype}; allowed: bfloat16, float16, float32")
    check_dtype("payload_RP", payload_RP, (torch.uint8,))
    check(hidden > 0, f"hidden={hidden}; it must be greater than 0")
    width = payload_width(hidden)
    check(
        payload_RP.shape[1] == width,
        f"payload_RP has rows of {payload_RP.shape[1]} bytes; {hidden} values need {width}",
    )
    check_contiguous(payload_RP=payload_RP)
    if choose("permute.unpack_fp8", implementation, _serves(payload_RP)) == "reference":
        return reference.unpack_fp8(payload_RP, hidden, dtype)
    return _unpack_fp8(payload_RP, hidden, dtype)


def _check(tensor: Tensor, name: str, implementation: str, rows: int, index: RowIndex) -> None:
    check_dtype(name, tensor, ANY_FLOAT if implementation == "reference" else FLOATS)
    check(tensor.dim() == 2, f"{name} has shape {tuple(tensor.shape)}; allowed: two axes")
    check(tensor.shape[0] == rows, f"{name} has {tensor.shape[0]} rows; the index is for {rows}")
    check_contiguous(**{name: tensor, "index": index.row_entry, "index.token_row": index.token_row})


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, row_entry_R, token_row_TK):
        ctx.save_for_backward(token_row_TK)
        return permute_rows(x_TH, row_entry_R, None, token_row_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_RH):
        return combine_rows(grad_RH.contiguous(), *ctx.saved_tensors, None), None, None


def permute(x_TH: Tensor, index: RowIndex, *, implementation: str = "auto") -> Tensor:
    """Rows of tokens, (R, H), zeros on padding. The gradient of a token is the sum over its rows, slot by slot."""
    _check(x_TH, "x_TH", implementation, index.token_row.shape[0], index)
    if choose("permute", implementation, _serves(x_TH)) == "reference":
        return reference.permute(x_TH, index.row_entry, index.token_row.shape[1])
    return _Permute.apply(x_TH, index.row_entry, index.token_row)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, weights_TK, row_entry_R, token_row_TK):
        ctx.save_for_backward(rows_RH, weights_TK, row_entry_R, token_row_TK)
        return combine_rows(rows_RH, token_row_TK, weights_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        rows_RH, weights_TK, row_entry_R, token_row_TK = ctx.saved_tensors
        grad_TH = grad_TH.contiguous()
        grad_rows = permute_rows(grad_TH, row_entry_R, weights_TK, token_row_TK.shape[1])
        grad_weights = _combine_weight_grad(rows_RH, token_row_TK, grad_TH) if weights_TK is not None else None
        return grad_rows, grad_weights, None, None


def combine(rows_RH: Tensor, weights_TK: Tensor | None, index: RowIndex, *, implementation: str = "auto") -> Tensor:
    """Tokens from their rows, (T, H): the sum over the slots of weight times row, in fp32, slot by slot.

    Args:
        weights_TK: fp32, contiguous; None for a plain sum.
    """
    _check(rows_RH, "rows_RH", implementation, index.num_rows, index)
    if weights_TK is not None:
        check_shape("weights_TK", weights_TK, tuple(index.token_row.shape))
        check_dtype("weights_TK", weights_TK, ANY_FLOAT if implementation == "reference" else (torch.float32,))
        check_contiguous(rows_RH=rows_RH, weights_TK=weights_TK)
    if choose("combine", implementation, _serves(rows_RH)) == "reference":
        return reference.combine(rows_RH, index.token_row, weights_TK)
    return _Combine.apply(rows_RH, weights_TK, index.row_entry, index.token_row)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, index: RowIndex, forth, back, implementation):
        ctx.back, ctx.index, ctx.implementation = back, index, implementation
        payload = pack_fp8(x_TH.contiguous(), index, implementation=implementation)
        dtype = x_TH.dtype if x_TH.dtype != torch.float64 else torch.float32
        return unpack_fp8(forth(payload), x_TH.shape[1], dtype, implementation=implementation).to(x_TH.dtype)

    @staticmethod
    def backward(ctx, grad_MH):
        grad_RH = ctx.back(grad_MH.contiguous())
        if ctx.index.token_row.shape[1] > 1:
            grad_RH = combine(grad_RH.contiguous(), None, ctx.index, implementation=ctx.implementation)
        return grad_RH, *[None] * 4


def permute_exchange_fp8(
    x_TH: Tensor,
    index: RowIndex,
    forth: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    *,
    implementation: str = "auto",
) -> Tensor:
    """Put tokens into the order of an index and round them to FP8 in one pass, send them, and give what arrived.

    Args:
        index: ``route.index`` with tile 1 (a payload has no padding).
        forth: exchanges a uint8 (R, bytes) buffer by rows, for example an all-to-all with fixed splits.
        back: the inverse exchange, for the gradient (M_received, H), which is summed over the rows of a token.
    """
    check_axes("x_TH", x_TH, "(T, H)")
    check(index.tile == 1, f"index.tile={index.tile}; allowed: 1, a payload has no padding")
    return _Exchange.apply(x_TH, index, forth, back, implementation)


def exchange_fp8(
    rows_MH: Tensor,
    forth: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    *,
    implementation: str = "auto",
) -> Tensor:
    """Send rows to other ranks as FP8 and give what arrived in the rows' dtype; gradients go back as they are.

    Args:
        forth, back: see ``permute_exchange_fp8``.
    """
    check_axes("rows_MH", rows_MH, "(M, H)")
    check_dtype("rows_MH", rows_MH, ANY_FLOAT if implementation == "reference" else FLOATS)
    one_each = torch.arange(rows_MH.shape[0], dtype=torch.int32, device=rows_MH.device)
    index = RowIndex(one_each, one_each[:, None], one_each[:0], one_each[:0], 1)
    return _Exchange.apply(rows_MH, index, forth, back, implementation)
