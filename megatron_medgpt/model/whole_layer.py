"""A decoder layer that lies whole on this rank, for new tokens: the same arithmetic without the engine's machinery.

megatron-core's layer spends 1.0 ms of Python on a token of a small model (CPU), most of it on dispatching to experts
of other ranks. Where there are none, and no gradient is wanted, this is what is left. Layouts that split the layer go
through the engine's, and write the same tokens (``tests/unit/evaluate/test_engine_layouts.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medgpt.model.attention import RowInfo


def lies_whole(layer: Any) -> bool:
    """No rank shares the layer's tensors or experts, and nothing but the rows' precision is exchanged."""
    config = layer.config
    return config.tensor_model_parallel_size == 1 and config.expert_model_parallel_size == 1


def run_whole(layer: Any, hidden_SBH: Tensor, rows: RowInfo) -> Tensor:
    """Hidden states after a layer, (S, B, H), without gradients.

    Args:
        layer: a built ``specs.Layer``.
    """
    attention = layer.self_attention
    projected = _linear(attention.linear_qkv, _normed(layer.input_layernorm, hidden_SBH))
    # Group after group its queries, its key and its value, as the engine lays them out.
    grouped = projected.unflatten(
        -1, (attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head)
    )
    query_SBAD, key_SBQD, value_SBQD = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    attended = attention.core_attention(query_SBAD, key_SBQD, value_SBQD, rows)
    hidden_SBH = hidden_SBH + _linear(attention.linear_proj, attended)
    normed_TH = _normed(layer.pre_mlp_layernorm, hidden_SBH).flatten(0, 1)
    return hidden_SBH + _experts(layer.mlp, normed_TH).view_as(hidden_SBH)


def _normed(norm: Any, hidden_SBH: Tensor) -> Tensor:
    """``specs.RMSNorm`` in one call where the weights are as wide as it computes."""
    if hidden_SBH.dtype in (torch.float32, torch.float64):
        return F.rms_norm(hidden_SBH, hidden_SBH.shape[-1:], norm.weight, norm.eps)
    return norm(hidden_SBH)


def _linear(module: Any, rows: Tensor) -> Tensor:
    return F.linear(rows, module.weight, module.bias)


def _experts(mixture: Any, hidden_TH: Tensor) -> Tensor:
    """(T, H): the chosen experts' outputs of every token, added up."""
    _, weights_TK, experts_TK = mixture.router.choose(hidden_TH)
    num_chosen = experts_TK.shape[1]
    experts_M = experts_TK.flatten()
    order_M = experts_M.argsort(stable=True)
    counts_E = torch.bincount(experts_M, minlength=mixture.config.num_moe_experts)
    weights_M = weights_TK.to(hidden_TH.dtype).flatten()[order_M]
    sorted_MH, _ = mixture.experts(hidden_TH[order_M // num_chosen], counts_E, weights_M)
    rows_MH = torch.empty_like(sorted_MH)
    rows_MH[order_M] = sorted_MH
    return rows_MH.view(-1, num_chosen, hidden_TH.shape[1]).sum(1)
