"""Experts that do not learn and stay in MXFP4, over sorted rows.

The blocks are the only copy of the weights: every product decodes the one matrix of one expert that it multiplies
with, in the forward pass and again in the backward pass, and forgets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.op import clamped_swiglu
from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    check,
    check_devices,
    check_dtype,
    check_positive,
    check_same_dtype,
    check_shape,
)
from medgpt_kernels.grouped_mlp.checks import check_pair, check_rows
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx import reference


@dataclass(frozen=True, slots=True, eq=False)
class PackedStack:
    """One projection of all experts in MXFP4; a logical (E, K, N) stack of matrices in ``dtype``."""

    blocks: Tensor
    """(E, N, K / 32, 16) uint8."""
    scales: Tensor
    """(E, N, K / 32) uint8."""
    dtype: torch.dtype

    def __post_init__(self) -> None:
        mx.check_packed(self.blocks, self.scales)
        check(self.blocks.dim() == 4, f"blocks has shape {tuple(self.blocks.shape)}; allowed: (E, N, K / 32, 16)")
        allowed = (torch.bfloat16, torch.float32, torch.float64)
        check(
            self.dtype in allowed, f"dtype is {self.dtype}; allowed: bfloat16, float32, float64, which hold it exactly"
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        E, N, groups = self.scales.shape
        return E, groups * reference.MX_BLOCK, N

    def __getitem__(self, expert: int) -> Tensor:
        """(K, N) of one expert, decoded now. Exact in every dtype with the exponents of bf16."""
        blocks, scales = self.blocks[expert], self.scales[expert]
        if blocks.is_cuda:
            rows_NK = mx.dequantise_mxfp4(blocks, scales, dtype=self.dtype)
        else:
            rows_NK = reference.dequantise_mxfp4_by_table(blocks, scales, self.dtype)
        # Contiguous, so that a product runs as it does with a weight that was never packed, to the bit.
        return rows_NK.t().contiguous()


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MK: Tensor, weight: PackedStack, bias_EN: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.weight, ctx.counts = weight, counts
        out_MN = rows_MK.new_empty((rows_MK.shape[0], bias_EN.shape[1]))
        for expert, first, end in runs(counts):
            torch.addmm(bias_EN[expert], rows_MK[first:end], weight[expert], out=out_MN[first:end])
        return out_MN

    @staticmethod
    def backward(ctx, grad_MN: Tensor):
        grad_MN = grad_MN.contiguous()
        grad_rows = grad_MN.new_empty((grad_MN.shape[0], ctx.weight.scales.shape[2] * reference.MX_BLOCK))
        for expert, first, end in runs(ctx.counts):
            torch.mm(grad_MN[first:end], ctx.weight[expert].t(), out=grad_rows[first:end])
        return grad_rows, None, None, None


def runs(counts: Sequence[int]):
    """(expert, first row, end) of every expert that has rows."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, first, first + count
        first += count


def packed_mlp(
    rows_MH: Tensor, counts: Sequence[int], gate_up: PackedStack, gate_up_bias_EG: Tensor, down: PackedStack,
    down_bias_EH: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    """As ``op.grouped_mlp`` with the weights that the blocks hold, to the bit. Gradients flow to the rows alone.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served; a bias requires a gradient: experts of this
            call do not learn.
    """
    stacks = (("gate_up", gate_up, "gate_up_bias_EG", gate_up_bias_EG), ("down", down, "down_bias_EH", down_bias_EH))
    check_dtype("rows_MH", rows_MH, ANY_FLOAT)
    for name, stack, bias_name, bias in stacks:
        check(not bias.requires_grad, f"{bias_name} requires a gradient; packed experts do not learn")
        check(
            stack.dtype == rows_MH.dtype, f"{name} decodes to {stack.dtype}, rows_MH is {rows_MH.dtype}; must be equal"
        )
        check_shape(bias_name, bias, stack.sizes[::2])
        check_same_dtype("rows_MH", rows_MH=rows_MH, **{bias_name: bias})
        check_devices(**{"rows_MH": rows_MH, f"{name}.blocks": stack.blocks, bias_name: bias})
    check_rows("rows_MH", rows_MH, gate_up.sizes[1], counts, gate_up.sizes[0])
    check_pair({"gate_up": gate_up.sizes}, {"down": down.sizes})
    check_positive(limit=limit)
    counts = tuple(counts)
    inner_MF = clamped_swiglu(_PackedLinear.apply(rows_MH, gate_up, gate_up_bias_EG, counts), limit)
    return _PackedLinear.apply(inner_MF, down, down_bias_EH, counts)
