"""Experts over sorted rows with one gradient tensor per weight.

Autograd through ``weight[e]`` would make a gradient of the whole stack for every expert and add them up: for 32 experts
32 times the memory traffic. Here each expert writes its own slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.op import clamped_swiglu
from medgpt_kernels.dispatch import check_positive
from medgpt_kernels.grouped_mlp.checks import check_pair, check_projection, check_rows
from medgpt_kernels.grouped_mlp.packed import runs
from medgpt_kernels.grouped_mlp.weight_grads import GradSink


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: tuple[int, ...], direct: bool):
        ctx.save_for_backward(rows_MI, weight_EIO, bias_EO)
        ctx.counts, ctx.direct = counts, direct
        return _products(rows_MI, weight_EIO, bias_EO, counts)

    @staticmethod
    def backward(ctx, grad_MO: Tensor):
        rows_MI, weight_EIO, bias_EO = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        for_rows, for_weight, for_bias, *_ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_MI) if for_rows else None
        weight = GradSink(weight_EIO, direct=ctx.direct) if for_weight else None
        bias = GradSink(bias_EO, direct=ctx.direct) if for_bias else None
        for expert, first, end in runs(ctx.counts):
            grad = grad_MO[first:end]
            if for_rows:
                torch.mm(grad, weight_EIO[expert].t(), out=grad_rows[first:end])
            if weight:
                weight.add_product(expert, rows_MI[first:end], grad)
            if bias:
                bias.add(expert, grad.sum(0))
        return grad_rows, weight and weight.finish(), bias and bias.finish(), None, None


def _products(rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: Sequence[int]) -> Tensor:
    out_MO = rows_MI.new_empty((rows_MI.shape[0], weight_EIO.shape[2]))
    for expert, first, end in runs(counts):
        torch.addmm(bias_EO[expert], rows_MI[first:end], weight_EIO[expert], out=out_MO[first:end])
    return out_MO


def grouped_linear(
    rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: Sequence[int], *, direct: bool = False
) -> Tensor:
    """Each run of rows times its expert's weight plus its bias: (M, I) to (M, O).

    Args:
        counts: rows of each expert, on the host; they add up to M, and any may be 0.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check_projection({"rows_MI": rows_MI}, {"weight_EIO": weight_EIO}, {"bias_EO": bias_EO})
    check_rows("rows_MI", rows_MI, weight_EIO.shape[1], counts, weight_EIO.shape[0])
    return _linear(rows_MI, weight_EIO, bias_EO, counts, direct)


def _linear(rows_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, counts: Sequence[int], direct: bool) -> Tensor:
    if not torch.is_grad_enabled():
        return _products(rows_MI, weight_EIO, bias_EO, counts)
    return _GroupedLinear.apply(rows_MI, weight_EIO, bias_EO, tuple(counts), direct)


def grouped_mlp(
    rows_MH: Tensor, counts: Sequence[int], gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float, direct: bool = False,
) -> Tensor:  # fmt: skip
    """As ``reference.grouped_mlp``.

    Args:
        counts: rows of each expert, on the host; they add up to M, and any may be 0.
        direct: gradients of weights that have a ``main_grad`` are written there (``weight_grads``).

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    rows = {"rows_MH": rows_MH}
    check_projection(rows, {"gate_up_EHG": gate_up_EHG}, {"gate_up_bias_EG": gate_up_bias_EG})
    check_projection(rows, {"down_EFH": down_EFH}, {"down_bias_EH": down_bias_EH})
    check_rows("rows_MH", rows_MH, gate_up_EHG.shape[1], counts, gate_up_EHG.shape[0])
    check_pair({"gate_up_EHG": tuple(gate_up_EHG.shape)}, {"down_EFH": tuple(down_EFH.shape)})
    check_positive(limit=limit)
    gate_up_MG = _linear(rows_MH, gate_up_EHG, gate_up_bias_EG, counts, direct)
    return _linear(clamped_swiglu(gate_up_MG, limit), down_EFH, down_bias_EH, counts, direct)
