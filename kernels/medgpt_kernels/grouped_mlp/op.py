"""Experts over sorted rows with one gradient tensor per weight.

Autograd through ``weight[e]`` would make a gradient of the whole stack for every expert and add them up: for 32 experts
32 times the memory traffic. Here each expert writes its own slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.op import clamped_swiglu
from medgpt_kernels.grouped_mlp.packed import runs


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(rows_MI, weight_EIO)
        ctx.counts = counts
        out_MO = rows_MI.new_empty((rows_MI.shape[0], weight_EIO.shape[2]))
        for expert, first, end in runs(counts):
            torch.addmm(bias_EO[expert], rows_MI[first:end], weight_EIO[expert], out=out_MO[first:end])
        return out_MO

    @staticmethod
    def backward(ctx, grad_MO: Tensor):
        rows_MI, weight_EIO = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_MI) if for_rows else None
        grad_weight = torch.zeros_like(weight_EIO) if for_weight else None  # experts without rows have zero gradient
        grad_bias = grad_MO.new_zeros((weight_EIO.shape[0], weight_EIO.shape[2])) if for_bias else None
        for expert, first, end in runs(ctx.counts):
            grad = grad_MO[first:end]
            if for_rows:
                torch.mm(grad, weight_EIO[expert].t(), out=grad_rows[first:end])
            if for_weight:
                torch.mm(rows_MI[first:end].t(), grad, out=grad_weight[expert])
            if for_bias:
                torch.sum(grad, 0, out=grad_bias[expert])
        return grad_rows, grad_weight, grad_bias, None


def grouped_linear(rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: Sequence[int]) -> Tensor:
    """Each run of rows times its expert's weight plus its bias: (M, I) to (M, O)."""
    return _GroupedLinear.apply(rows_MI, weight_EIO, bias_EO, tuple(counts))


def grouped_mlp(
    rows_MH: Tensor, counts: Sequence[int], gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    """As ``reference.grouped_mlp``.

    Args:
        counts: rows of each expert, on the host; they add up to M, and any may be 0.
    """
    gate_up_MG = grouped_linear(rows_MH, gate_up_EHG, gate_up_bias_EG, counts)
    return grouped_linear(clamped_swiglu(gate_up_MG, limit), down_EFH, down_bias_EH, counts)
