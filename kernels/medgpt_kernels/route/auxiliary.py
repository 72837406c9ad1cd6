"""The auxiliary losses of a router, balance and z, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.dispatch import ANY_FLOAT, check, check_axes, check_contiguous, check_dtype, check_shape, choose
from medgpt_kernels.route import reference
from medgpt_kernels.route.blocks import BLOCK_T, block_e, cdiv, kernels, serves


@torch.library.custom_op("medgpt_kernels::router_losses_fwd", mutates_args=())
def _losses_fwd(logits_TE: Tensor, kept_T: Tensor) -> tuple[Tensor, Tensor]:
    T, E = logits_TE.shape
    blocks = cdiv(T, BLOCK_T)
    probs = torch.empty((blocks, E), dtype=torch.float32, device=logits_TE.device)
    z = torch.empty(blocks, dtype=torch.float32, device=logits_TE.device)
    if blocks:
        kernels().losses_fwd_kernel[(blocks,)](logits_TE, kept_T, probs, z, T, E, BLOCK_T=BLOCK_T, BLOCK_E=block_e(E))
    return probs.sum(0), z.sum()


@_losses_fwd.register_fake
def _(logits_TE, kept_T):
    return logits_TE.new_empty((logits_TE.shape[1],)), logits_TE.new_empty(())


@torch.library.custom_op("medgpt_kernels::router_losses_bwd", mutates_args=())
def _losses_bwd(logits_TE: Tensor, kept_T: Tensor, slope_E: Tensor, z_slope: Tensor) -> Tensor:
    T, E = logits_TE.shape
    grad = torch.empty((T, E), dtype=torch.float32, device=logits_TE.device)
    if T:
        kernels().losses_bwd_kernel[(cdiv(T, BLOCK_T),)](
            logits_TE, kept_T, slope_E, z_slope, grad, T, E, BLOCK_T=BLOCK_T, BLOCK_E=block_e(E)
        )
    return grad


@_losses_bwd.register_fake
def _(logits_TE, kept_T, slope_E, z_slope):
    return torch.empty_like(logits_TE)


class _Sums(torch.autograd.Function):
    """Sums over the kept tokens of the probabilities of each expert, and of the squared log-sum-exp."""

    @staticmethod
    def forward(ctx, logits_TE, kept_T):
        ctx.save_for_backward(logits_TE, kept_T)
        return _losses_fwd(logits_TE, kept_T)

    @staticmethod
    def backward(ctx, slope_E, z_slope):
        logits_TE, kept_T = ctx.saved_tensors
        return _losses_bwd(logits_TE, kept_T, slope_E.contiguous(), z_slope.contiguous()), None


def losses(
    logits_TE: Tensor, share_E: Tensor, kept_T: Tensor, num_tokens: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Balance and z loss of one layer. See ``reference.losses``; the gradient flows to the logits.

    Args:
        logits_TE: fp32, contiguous; kept_T fp32, 1 for tokens that count and 0 for padding.
    """
    check_axes("logits_TE", logits_TE, "(T, E)")
    T, E = logits_TE.shape
    check_shape("share_E", share_E, (E,))
    check_shape("kept_T", kept_T, (T,))
    check(num_tokens.numel() == 1, f"num_tokens has shape {tuple(num_tokens.shape)}; allowed: one number")
    allowed = ANY_FLOAT if implementation == "reference" else (torch.float32,)
    check_dtype("logits_TE", logits_TE, allowed)
    check_dtype("kept_T", kept_T, allowed)
    check_dtype("share_E", share_E, ANY_FLOAT)
    check_contiguous(logits_TE=logits_TE, kept_T=kept_T, share_E=share_E, num_tokens=num_tokens)
    if choose("route.losses", implementation, serves(logits_TE)) == "reference":
        return reference.losses(logits_TE, share_E, kept_T, num_tokens)
    probs_E, z = _Sums.apply(logits_TE, kept_T)
    return logits_TE.shape[1] * (share_E * probs_E).sum() / num_tokens, z / num_tokens
