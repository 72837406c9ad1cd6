"""Permute, combine and the FP8 payload in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.mx import reference as mx
from medgpt_kernels.mx.reference import E4M3, FP8_BLOCK


def payload_width(hidden: int) -> int:
    """Bytes of one FP8 row: the codes, a scale byte per 128 of them, zeros up to a multiple of 16."""
    return -(-(hidden + -(-hidden // FP8_BLOCK)) // 16) * 16


def permute(x_TH: Tensor, row_entry_R: Tensor, slots: int) -> Tensor:
    """Row r holds token ``row_entry[r] // slots``; zeros on padding."""
    rows = (
        x_TH[(row_entry_R.clamp(min=0) // slots).long()]
        if x_TH.shape[0]
        else x_TH.new_zeros((row_entry_R.numel(), x_TH.shape[1]))
    )
    return torch.where((row_entry_R >= 0)[:, None], rows, torch.zeros_like(rows))


def combine(rows_RH: Tensor, token_row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Token t is the sum over its slots, in their order, of weight times row; slots of row -1 add nothing."""
    wide = torch.promote_types(rows_RH.dtype, torch.float32)
    out = torch.zeros((token_row_TK.shape[0], rows_RH.shape[1]), dtype=wide, device=rows_RH.device)
    for slot in range(token_row_TK.shape[1]):
        row = token_row_TK[:, slot]
        if rows_RH.shape[0] == 0:
            break
        part = rows_RH[row.clamp(min=0).long()].to(wide)
        if weights_TK is not None:
            part = part * weights_TK[:, slot, None].to(wide)
        out = out + torch.where((row >= 0)[:, None], part, torch.zeros_like(part))
    return out.to(rows_RH.dtype)


def pack_fp8(x_TH: Tensor, row_entry_R: Tensor, slots: int) -> Tensor:
    """Rows as uint8 (R, payload_width(H)): E4M3 codes, then E8M0 scales of 128 codes each, then zeros."""
    codes, scales = mx.quantise_rows(permute(x_TH, row_entry_R, slots))
    exponent = (scales.view(torch.int32) >> 23).to(torch.uint8)  # the bits: CUDA's log2 may be a unit off
    hidden = x_TH.shape[1]
    payload = codes.new_zeros((codes.shape[0], payload_width(hidden)), dtype=torch.uint8)
    payload[:, :hidden] = codes.view(torch.uint8)
    payload[:, hidden : hidden + exponent.shape[1]] = exponent
    return payload


def unpack_fp8(payload_RP: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    codes = payload_RP[:, :hidden].contiguous().view(E4M3)
    exponent = payload_RP[:, hidden : hidden + -(-hidden // FP8_BLOCK)]
    return mx.dequantise_rows(codes, mx.power_of_two(exponent.int() - 127), dtype)
