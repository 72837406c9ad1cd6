"""What a user would otherwise run for GPT-oss's experts: each peer is one function of the same arguments.

A peer that is not installed or refuses the case raises; the benchmark records why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALPHA, LIMIT = 1.702, 7.0


def _sorted(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts_TK.flatten().long()
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_experts), 0).to(torch.int32)
    return order, flat[order], ends


def grouped_mm(x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """PyTorch's grouped product with eager glue."""
    order, expert, ends = _sorted(experts, w1.shape[0])
    token = order // experts.shape[1]
    z = torch._grouped_mm(x[token], w1, offs=ends) + b1[expert]
    gate, up = z[:, 0::2].clamp(max=LIMIT), z[:, 1::2].clamp(-LIMIT, LIMIT)
    y = torch._grouped_mm((up + 1) * gate * torch.sigmoid(ALPHA * gate), w2, offs=ends) + b2[expert]
    weighted = y * weights.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def megatron_core(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """The order of operations of megatron-core 0.16.1's grouped experts: counts on the host, halves instead of
    alternating columns, clamps outside the fused activation, biases expert by expert in fp32."""
    order, _, ends = _sorted(experts, w1.shape[0])
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    token = order // experts.shape[1]

    def with_bias(rows: Tensor, bias: Tensor) -> Tensor:
        parts = [part.float() + b.float() for part, b in zip(rows.split(counts), bias)]
        return torch.cat(parts).to(rows.dtype)

    z = with_bias(torch._grouped_mm(x.index_select(0, token), w1, offs=ends), b1)
    gate, up = z[:, 0::2], z[:, 1::2]
    z = torch.cat((gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)), -1)
    gate, up = z.chunk(2, -1)
    a = gate * torch.sigmoid(ALPHA * gate) * (up + 1) * weights.flatten()[order, None].to(z.dtype)
    y = torch._grouped_mm(a, w2, offs=ends)
    parts = [b[None] * w[:, None].to(b.dtype) for b, w in zip(b2, weights.flatten()[order].split(counts))]
    y = (y.float() + torch.cat(parts).float()).to(y.dtype)
    return torch.zeros_like(x).index_add(0, token, y)


def transformers_experts(num_experts: int, hidden: int, inner: int, implementation: str) -> Callable[..., Tensor]:
    """transformers' own module with our tensors in the place of its parameters.

    Args:
        implementation: ``eager`` (expert by expert) or ``grouped_mm``.
    """
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(num_local_experts=num_experts, hidden_size=hidden, intermediate_size=inner)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = GptOssExperts(config)

    def call(x, weights, experts, w1, b1, w2, b2):
        named = {"gate_up_proj": w1, "gate_up_proj_bias": b1, "down_proj": w2, "down_proj_bias": b2}
        return torch.func.functional_call(module, named, (x, experts.long(), weights.to(x.dtype))).view_as(x)

    return call


def liger() -> Callable[..., Tensor]:
    """Liger's fused MoE. It has neither biases nor GPT-oss's activation, so it is given less to do.

    Weights come as it keeps them (``liger_layout``), so that no transposition is timed.
    """
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def call(x, weights, experts, w1, b1, w2, b2):
        return LigerFusedMoEFunction.apply(x, w1, w2, experts, weights.to(x.dtype))

    return call


def liger_layout(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with weights as (E, outputs, inputs)."""
    flipped = {name: given[name].detach().transpose(1, 2).contiguous() for name in ("gate_up_EHG", "down_EFH")}
    return {**given, **{name: weight.requires_grad_(given[name].requires_grad) for name, weight in flipped.items()}}
