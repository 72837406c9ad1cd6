"""The clamped SwiGLU that keeps only its input for the backward pass; autograd's own would keep six tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.reference import ALPHA
from medgpt_kernels.dispatch import ANY_FLOAT, check, check_axes, check_contiguous, check_dtype, check_positive


class _ClampedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_MG: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up_MG)
        ctx.limit = limit
        return _forward(gate_up_MG, limit)

    @staticmethod
    def backward(ctx, grad_MF: Tensor):
        (gate_up_MG,) = ctx.saved_tensors
        limit = ctx.limit
        gate, up = _halves(gate_up_MG, limit)
        sigmoid = torch.sigmoid(ALPHA * gate)
        swish = gate * sigmoid
        # d swish = sigmoid * (1 + alpha * gate * (1 - sigmoid)) = sigmoid + alpha * swish * (1 - sigmoid)
        slope = torch.addcmul(sigmoid, swish, 1 - sigmoid, value=ALPHA)
        raw = gate_up_MG.view(*grad_MF.shape, 2)
        grad_MF2 = torch.empty_like(raw)
        torch.mul(slope.mul_(up.add_(1)).mul_(grad_MF), raw[..., 0] <= limit, out=grad_MF2[..., 0])
        torch.mul(swish.mul_(grad_MF), raw[..., 1].abs() <= limit, out=grad_MF2[..., 1])
        return grad_MF2.view_as(gate_up_MG), None


def _forward(gate_up_MG: Tensor, limit: float) -> Tensor:
    gate, up = _halves(gate_up_MG, limit)
    return torch.sigmoid(ALPHA * gate).mul_(gate).mul_(up.add_(1))


def _halves(gate_up_MG: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    raw = gate_up_MG.view(gate_up_MG.shape[0], gate_up_MG.shape[1] // 2, 2)
    return raw[..., 0].clamp(max=limit), raw[..., 1].clamp(-limit, limit)


def clamped_swiglu(gate_up_MG: Tensor, limit: float) -> Tensor:
    """As ``reference.clamped_swiglu``. ``gate_up_MG`` must be contiguous.

    Raises:
        ValueError: a shape, dtype or layout that is not served.
    """
    check_axes("gate_up_MG", gate_up_MG, "(M, G)")
    check(gate_up_MG.shape[1] % 2 == 0, f"gate_up_MG has {gate_up_MG.shape[1]} columns; allowed: pairs of gate and up")
    check_dtype("gate_up_MG", gate_up_MG, ANY_FLOAT)
    check_contiguous(gate_up_MG=gate_up_MG)
    check_positive(limit=limit)
    if not torch.is_grad_enabled():
        return _forward(gate_up_MG, limit)
    return _ClampedSwiglu.apply(gate_up_MG, limit)
