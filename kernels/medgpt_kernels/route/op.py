"""The choice of every token's experts, with its gradients, and the door to the rest: ``rows`` makes the index of the
rows that follow from it, ``auxiliary`` the losses. Nothing here waits for the device: sizes are bounds known on the
host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_dtype,
    check_positive,
    check_same_dtype,
    check_shape,
    choose,
)
from medgpt_kernels.mx.op import triton_dtype
from medgpt_kernels.mx.reference import E4M3
from medgpt_kernels.mx.reference import quantise_rows as reference_quantise_rows
from medgpt_kernels.route import reference
from medgpt_kernels.route.auxiliary import losses
from medgpt_kernels.route.blocks import BLOCK_T, MAX_EXPERTS, block_e, cdiv, kernels, serves
from medgpt_kernels.route.rows import RowIndex, index, index_sorted

__all__ = ["Routing", "RowIndex", "index", "index_sorted", "losses", "route"]


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What the router makes of its tokens."""

    weights_TK: Tensor
    """fp32, the softmax over the chosen, largest first."""
    experts_TK: Tensor
    """int32."""
    logits_TE: Tensor
    """fp32."""
    normed_TH: Tensor
    """The input after its RMSNorm, or the input."""
    codes_TH: Tensor | None
    """``normed_TH`` as float8_e4m3fn with one scale per 128 columns, when asked for."""
    scales_TG: Tensor | None
    histogram: Tensor
    """(blocks of tokens, E) int32, for ``index``."""


@torch.library.custom_op("medgpt_kernels::route_fwd", mutates_args=())
def _route_fwd(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, norm_H: Tensor | None, eps: float, top_k: int, quantise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, H), E = x_TH.shape, weight_EH.shape[0]
    device, blocks = x_TH.device, cdiv(T, BLOCK_T)
    normed = torch.empty((T, H) if norm_H is not None else (0, H), dtype=x_TH.dtype, device=device)
    codes = torch.empty((T, H) if quantise else (0, H), dtype=torch.uint8, device=device)
    scales = torch.empty((codes.shape[0], cdiv(H, 128)), dtype=torch.float32, device=device)
    logits = torch.empty((T, E), dtype=torch.float32, device=device)
    weights = torch.empty((T, top_k), dtype=torch.float32, device=device)
    experts = torch.empty((T, top_k), dtype=torch.int32, device=device)
    histogram = torch.empty((blocks, E), dtype=torch.int32, device=device)
    if T:
        kernels().route_fwd_kernel[(blocks,)](
            x_TH, weight_EH, bias_E, norm_H if norm_H is not None else weight_EH, normed, codes, scales, logits,
            weights, experts, histogram, T, H, E, eps, K=top_k, NORM=norm_H is not None, QUANTISE=quantise,
            DTYPE=triton_dtype(x_TH.dtype), BLOCK_T=BLOCK_T, BLOCK_E=block_e(E),
        )  # fmt: skip
    return normed, codes, scales, logits, weights, experts, histogram


@_route_fwd.register_fake
def _(x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise):
    (T, H), E = x_TH.shape, weight_EH.shape[0]
    rows = T if quantise else 0
    return (
        x_TH.new_empty((T if norm_H is not None else 0, H)),
        x_TH.new_empty((rows, H), dtype=torch.uint8),
        x_TH.new_empty((rows, cdiv(H, 128)), dtype=torch.float32),
        x_TH.new_empty((T, E), dtype=torch.float32),
        x_TH.new_empty((T, top_k), dtype=torch.float32),
        x_TH.new_empty((T, top_k), dtype=torch.int32),
        x_TH.new_empty((cdiv(T, BLOCK_T), E), dtype=torch.int32),
    )


@torch.library.custom_op("medgpt_kernels::route_bwd", mutates_args=())
def _route_bwd(experts_TK: Tensor, weights_TK: Tensor, grad_weights_TK: Tensor, num_experts: int) -> Tensor:
    T, K = experts_TK.shape
    grad = torch.empty((T, num_experts), dtype=torch.float32, device=experts_TK.device)
    if T:
        kernels().route_bwd_kernel[(cdiv(T, BLOCK_T),)](
            experts_TK, weights_TK, grad_weights_TK, grad, T, num_experts, K=K, BLOCK_T=BLOCK_T,
            BLOCK_E=block_e(num_experts),
        )  # fmt: skip
    return grad


@_route_bwd.register_fake
def _(experts_TK, weights_TK, grad_weights_TK, num_experts):
    return weights_TK.new_empty((experts_TK.shape[0], num_experts))


@torch.library.custom_op("medgpt_kernels::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(x_TH: Tensor, norm_H: Tensor, grad_TH: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    T, H = x_TH.shape
    grad_x = torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device)
    grad_norm = torch.empty((cdiv(T, 32), H), dtype=torch.float32, device=x_TH.device)
    if T:
        kernels().rms_norm_bwd_kernel[(grad_norm.shape[0],)](
            x_TH, norm_H, grad_TH, grad_x, grad_norm, T, H, eps, DTYPE=triton_dtype(x_TH.dtype), BLOCK_T=32, BLOCK_H=128
        )
    return grad_x, grad_norm.sum(0).to(norm_H.dtype)


@_rms_norm_bwd.register_fake
def _(x_TH, norm_H, grad_TH, eps):
    return torch.empty_like(x_TH), torch.empty_like(norm_H)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise):
        normed, codes, scales, logits, weights, experts, histogram = _route_fwd(
            x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise
        )
        ctx.save_for_backward(x_TH, weight_EH, norm_H, normed, weights, experts)
        ctx.eps, ctx.bias_dtype = eps, bias_E.dtype
        ctx.mark_non_differentiable(codes, scales, experts, histogram)
        return normed, codes, scales, logits, weights, experts, histogram

    @staticmethod
    def backward(ctx, grad_normed, _codes, _scales, grad_logits, grad_weights, _experts, _histogram):
        x_TH, weight_EH, norm_H, normed_TH, weights_TK, experts_TK = ctx.saved_tensors
        grad = _route_bwd(experts_TK, weights_TK, grad_weights.contiguous(), weight_EH.shape[0]) + grad_logits
        routed_TH = x_TH if norm_H is None else normed_TH
        grad_x, grad_norm = grad.to(x_TH.dtype) @ weight_EH.to(x_TH.dtype), None
        if norm_H is not None:
            grad_x, grad_norm = _rms_norm_bwd(x_TH, norm_H, (grad_x + grad_normed).contiguous(), ctx.eps)
        grad_weight = (grad.to(x_TH.dtype).t() @ routed_TH).to(weight_EH.dtype)
        return grad_x, grad_weight, grad.sum(0).to(ctx.bias_dtype), grad_norm, None, None, None


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    norm_H: Tensor | None = None,
    eps: float = 1e-5,
    quantise: bool = False,
    implementation: str = "auto",
) -> Routing:
    """Choose the experts of every token, in one pass over the tokens (two with a norm).

    Args:
        x_TH: bf16, fp16 or fp32, contiguous; weight_EH of the same dtype, bias_E and norm_H of any of them.
        norm_H: weight of an RMSNorm in front of the router, which the experts see too; None for none.
        quantise: also give the (normed) tokens as FP8.

    Returns:
        A ``Routing``; gradients flow through ``weights_TK``, ``logits_TE`` and ``normed_TH``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check_axes("x_TH", x_TH, "(T, H)")
    check_axes("weight_EH", weight_EH, "(E, H)")
    E, H = weight_EH.shape
    check(x_TH.shape[1] == H, f"x_TH has width {x_TH.shape[1]}, weight_EH {H}; they must be equal")
    check_shape("bias_E", bias_E, (E,))
    check(1 <= top_k <= E <= MAX_EXPERTS, f"top_k={top_k} of {E} experts; allowed: 1 to E, E at most {MAX_EXPERTS}")
    allowed = ANY_FLOAT if implementation == "reference" else FLOATS
    given = {"x_TH": x_TH, "weight_EH": weight_EH, "bias_E": bias_E, **({} if norm_H is None else {"norm_H": norm_H})}
    for name, tensor in given.items():
        check_dtype(name, tensor, allowed)
    check_same_dtype("x_TH", x_TH=x_TH, weight_EH=weight_EH)
    check_positive(eps=eps)
    if norm_H is not None:
        check_shape("norm_H", norm_H, (H,))
    check_contiguous(**given)
    if choose("route", implementation, serves(x_TH)) == "reference":
        return _reference_route(x_TH, weight_EH, bias_E, top_k, norm_H, eps, quantise)
    normed, codes, scales, logits, weights, experts, histogram = _Route.apply(
        x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise
    )
    return Routing(
        weights, experts, logits, x_TH if norm_H is None else normed,
        codes.view(E4M3) if quantise else None, scales if quantise else None, histogram,
    )  # fmt: skip


def _reference_route(x_TH, weight_EH, bias_E, top_k, norm_H, eps, quantise) -> Routing:
    normed = x_TH if norm_H is None else reference.rms_norm(x_TH, norm_H, eps)
    logits = reference.logits(normed, weight_EH, bias_E)
    weights, experts = reference.top_k(logits, top_k)
    codes, scales = reference_quantise_rows(normed.detach()) if quantise else (None, None)
    chosen = torch.zeros_like(logits, dtype=torch.int32).scatter_(1, experts.long(), 1)
    histogram = torch.stack([part.sum(0, dtype=torch.int32) for part in chosen.split(BLOCK_T)] or [chosen.sum(0)])
    return Routing(weights, experts, logits, normed, codes, scales, histogram)
