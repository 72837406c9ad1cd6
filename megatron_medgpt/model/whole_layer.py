"""Decoder layers that lie whole on this rank, for new tokens: the same arithmetic without the engine's machinery.

megatron-core spends 1.0 ms of Python on a token in a layer of a small model (CPU), most of it on dispatching to experts
of other ranks, and 0.3 ms around the layers. Where there are none, and no gradient is wanted, this is what is left.
Layouts that split a layer go through the engine's, and write the same tokens
(``tests/unit/evaluate/test_engine_layouts.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medgpt.model.attention import RowInfo
from megatron_medgpt.model.rope import rotate


def lies_whole(config: Any) -> bool:
    """No rank shares a layer's tensors or experts, and nothing but the rows' precision is exchanged."""
    return config.tensor_model_parallel_size == 1 and config.expert_model_parallel_size == 1


@torch.inference_mode()  # faster than no_grad; never around the engine, whose buffers would be unfit for training
def continue_whole(decoder: Any, hidden_SBH: Tensor | None, rows: RowInfo) -> Tensor:
    """Hidden states of newest tokens after the layers of a chunk, (S, 1, H), without gradients.

    Args:
        decoder: megatron-core's ``TransformerBlock`` of ``specs.Layer``.
        hidden_SBH: of one row; None where another chunk hands them over.
        rows: with a cache that is filled.
    """
    hidden_SBH = decoder.input_tensor if hidden_SBH is None else hidden_SBH
    cos_sin = rows.cos_sin.transpose(1, 2)[:, :, :, None]  # as the heads lie: positions, the row, groups, heads of one
    for layer in decoder.layers:
        hidden_SBH = _layer(layer, hidden_SBH, rows, cos_sin)
    return hidden_SBH if decoder.final_layernorm is None else _normed(decoder.final_layernorm, hidden_SBH)


def _layer(layer: Any, hidden_SBH: Tensor, rows: RowInfo, cos_sin: Tensor) -> Tensor:
    attention = layer.self_attention
    projected = _linear(attention.linear_qkv, _normed(layer.input_layernorm, hidden_SBH))
    # Group after group its queries, its key and its value, as the engine lays them out.
    grouped = projected.unflatten(
        -1, (attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head)
    )
    turned = rotate(grouped[..., :-1, :], cos_sin)
    attended = attention.core_attention.continue_texts(
        rows.cache, turned[:, 0, :, :-1].flatten(1, 2), turned[:, 0, :, -1], grouped[:, 0, :, -1]
    )
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
    num_tokens, num_chosen = experts_TK.shape
    if num_tokens == 1:  # its experts' rows are one row: nothing is sorted but the choice
        experts_1K, order_1K = experts_TK.sort()
        counts = [0] * mixture.config.num_moe_experts
        for expert in experts_1K[0].tolist():
            counts[expert] = 1
        weights_K = weights_TK.to(hidden_TH.dtype).gather(1, order_1K)[0]
        return mixture.experts(hidden_TH.expand(num_chosen, -1), counts, weights_K)[0].sum(0, keepdim=True)
    experts_M = experts_TK.flatten()
    order_M = experts_M.argsort(stable=True)
    counts_E = torch.bincount(experts_M, minlength=mixture.config.num_moe_experts)
    weights_M = weights_TK.to(hidden_TH.dtype).flatten()[order_M]
    sorted_MH, _ = mixture.experts(hidden_TH[order_M // num_chosen], counts_E, weights_M)
    rows_MH = torch.empty_like(sorted_MH)
    rows_MH[order_M] = sorted_MH
    return rows_MH.view(-1, num_chosen, hidden_TH.shape[1]).sum(1)
