"""Attention with sinks on PyTorch's fused CPU attention, exact in forward and backward.

The fused kernel knows no sinks, but it hands out the log-sum-exp L of each row's scores. With the sink's logit s the
true one is L' = log(exp L + exp s), and

    forward    O' = O * exp(L - L')
    backward   the kernel computes P = exp(S - L), D = rowsum(dO * O), dS = P * (dP - D), dV = P^T dO

so the kernel's backward, given O' and L' in place of O and L, returns the gradients of the softmax with the sink: its P
becomes P' and its D becomes rowsum(dO * O'), which is right because the sink's value is zero. What is left is
ds = -sum over rows of exp(s - L') * D. The same identity serves any attention with a log-sum-exp (Dao et al. 2022,
arXiv 2205.14135, section 3.1 and appendix B, for the backward).
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_BASD, key_BASD, value_BASD, sinks_A, mask_B1SS, scale):
        out, lse_BAS = _forward(query_BASD, key_BASD, value_BASD, 0.0, False, attn_mask=mask_B1SS, scale=scale)
        sink_1A1 = sinks_A.to(lse_BAS.dtype).view(1, -1, 1)
        with_sink_BAS = torch.logaddexp(lse_BAS, sink_1A1)
        out = out * torch.exp(lse_BAS - with_sink_BAS).unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(query_BASD, key_BASD, value_BASD, sinks_A, mask_B1SS, out, with_sink_BAS)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_BASD):
        query, key, value, sinks_A, mask, out, lse_BAS = ctx.saved_tensors
        grads = _backward(grad_BASD, query, key, value, out, lse_BAS, 0.0, False, attn_mask=mask, scale=ctx.scale)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            sink_1A1 = sinks_A.to(lse_BAS.dtype).view(1, -1, 1)
            row_BAS = (grad_BASD.to(lse_BAS.dtype) * out).sum(-1)
            grad_sinks = -(torch.exp(sink_1A1 - lse_BAS) * row_BAS).sum((0, 2)).to(sinks_A.dtype)
        return *grads, grad_sinks, None, None


def sink_attention(
    query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, sinks_A: Tensor, mask_B1SS: Tensor, *, scale: float
) -> Tensor:
    """Attention output (B, A, S, D).

    Args:
        mask_B1SS: additive, 0 where a query (third place) sees a key (last), minus infinity elsewhere; of the query's
            dtype.
    """
    repeats = query_BASD.shape[1] // key_BQSD.shape[1]
    if repeats > 1:
        key_BQSD = key_BQSD.repeat_interleave(repeats, dim=1)
        value_BQSD = value_BQSD.repeat_interleave(repeats, dim=1)
    return _SinkAttention.apply(query_BASD, key_BQSD, value_BQSD, sinks_A, mask_B1SS, scale)
