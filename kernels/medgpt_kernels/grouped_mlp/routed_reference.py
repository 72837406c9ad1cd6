"""The whole MoE layer behind the router in plain torch, forward and backward written out, in every precision.

In ``bf16`` it is ``reference.grouped_mlp`` between a gather and a weighted sum. In ``fp8`` operands are rounded where
the fused kernels round them: tokens, activations and gradients to E4M3 with a power of two per 128 of a row, weights
with one per 128x128 tile; weight gradients use the unrounded operands. In ``mxfp4`` weights alone are rounded, in
blocks along the axis that the forward product sums over; their gradients pass straight through. Experts that do not
learn may be packed. One matrix of one expert is rounded or decoded at a time, for the forward product and again for the
backward one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.reference import ALPHA
from medgpt_kernels.grouped_mlp.packed import PackedStack
from medgpt_kernels.grouped_mlp.weight_grads import GradSink
from medgpt_kernels.mx import reference as mx


@dataclass(frozen=True, slots=True)
class _Numbers:
    limit: float
    precision: str
    direct: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """What the left side of a product holds."""
        if self.precision != "fp8" or not x.shape[0]:
            return x
        return mx.dequantise_rows(*mx.quantise_rows(x), dtype=x.dtype)

    def weight(self, w_KN: Tensor) -> Tensor:
        if self.precision == "fp8":
            return mx.dequantise_tiles(*mx.quantise_tiles(w_KN[None]), dtype=w_KN.dtype)[0]
        if self.precision == "mxfp4":
            decode = mx.dequantise_mxfp4 if w_KN.is_cuda else mx.dequantise_mxfp4_by_table
            # Contiguous, so that a product runs as it does with a weight that needs no rounding, to the bit.
            return decode(*mx.quantise_mxfp4(w_KN.t()), w_KN.dtype).t().contiguous()
        return w_KN


def _halves(z_MG: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = z_MG[:, 0::2].clamp(max=limit), z_MG[:, 1::2].clamp(-limit, limit)
    return gate, up, torch.sigmoid(ALPHA * gate)


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, experts_TK, gate_up, gate_up_bias, down, down_bias, numbers):
        ctx.packed = (gate_up, down) if isinstance(gate_up, PackedStack) else None
        matrices = () if ctx.packed else (gate_up, down)
        ctx.save_for_backward(x_TH, weights_TK, experts_TK, gate_up_bias, down_bias, *matrices)
        ctx.numbers = numbers
        out_TH = torch.zeros_like(x_TH)
        for expert in range(gate_up_bias.shape[0]):
            token, slot = (experts_TK == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            z = numbers.rows(x_TH[token]) @ numbers.weight(gate_up[expert]) + gate_up_bias[expert]
            gate, up, sigmoid = _halves(z, numbers.limit)
            a = numbers.rows((up + 1) * gate * sigmoid)
            y = a @ numbers.weight(down[expert]) + down_bias[expert]
            out_TH.index_add_(0, token, (y * weights_TK[token, slot, None]).to(y.dtype))
        return out_TH

    @staticmethod
    def backward(ctx, grad_TH):
        x_TH, weights_TK, experts_TK, gate_up_bias, down_bias, *matrices = ctx.saved_tensors
        gate_up, down = ctx.packed or matrices
        numbers, limit = ctx.numbers, ctx.numbers.limit
        d_x, d_weights = torch.zeros_like(x_TH), torch.zeros_like(weights_TK)
        learning = () if not any(ctx.needs_input_grad[3:7]) else (gate_up, gate_up_bias, down, down_bias)
        sinks = [GradSink(weight, direct=numbers.direct) for weight in learning]
        for expert in range(gate_up_bias.shape[0]):
            token, slot = (experts_TK == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            x, grad = x_TH[token], grad_TH[token]
            weight = weights_TK[token, slot, None].to(x.dtype)
            w1, w2, rounded_grad = numbers.weight(gate_up[expert]), numbers.weight(down[expert]), numbers.rows(grad)
            z = numbers.rows(x) @ w1 + gate_up_bias[expert]
            gate, up, sigmoid = _halves(z, limit)
            swish = gate * sigmoid
            a = (up + 1) * swish
            d_a = rounded_grad @ w2.t()
            d_weights[token, slot] = ((d_a * a).sum(1) + grad @ down_bias[expert]).to(d_weights.dtype)
            d_a = d_a * weight
            d_z = torch.empty_like(z)
            d_z[:, 0::2] = d_a * (up + 1) * (sigmoid + ALPHA * swish * (1 - sigmoid)) * (z[:, 0::2] <= limit)
            d_z[:, 1::2] = d_a * swish * (z[:, 1::2].abs() <= limit)
            if sinks:
                sinks[0].add_product(expert, x, d_z)
                sinks[1].add(expert, d_z.sum(0))
                sinks[2].add_product(expert, a * weight, grad)
                sinks[3].add(expert, (grad * weight).sum(0))
            d_x.index_add_(0, token, numbers.rows(d_z) @ w1.t())
        return d_x, d_weights, None, *([sink.finish() for sink in sinks] or [None] * 4), None


def routed_mlp(
    x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_EHG: Tensor | PackedStack, gate_up_bias_EG: Tensor,
    down_EFH: Tensor | PackedStack, down_bias_EH: Tensor, *, limit: float, precision: str = "bf16",
    direct: bool = False,
) -> Tensor:  # fmt: skip
    """Tokens to the weighted sum of their experts' outputs, (T, H), in the dtype of ``x_TH``.

    Args:
        experts_TK: expert of each (token, slot); -1 for none.
        direct: see ``weight_grads``.
        gate_up_EHG, down_EFH: tensors, or both ``PackedStack``: then neither they nor the biases get gradients.
    """
    return _RoutedMLP.apply(
        x_TH, weights_TK, experts_TK, gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH,
        _Numbers(limit, precision, direct),
    )  # fmt: skip
