"""Eager attention with sinks: every step written out, any floating dtype, gradients by autograd.

A sink is one more key per head with a learnable logit and a value of zero (openai/gpt-oss ``gpt_oss/torch/model.py``,
``sdpa``): it takes part in the softmax and nothing of it reaches the output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    document_ids_BS: Tensor, window: int | None, branches: tuple[Tensor, Tensor] | None = None
) -> Tensor:  # fmt: skip
    """Which keys a query sees: (B, 1, S, S) bool, query position before key position.

    A position sees itself and what stands before it in the same document, at most ``window`` positions in all.

    With ``branches`` (branch ids and position ids, (B, S) each) a document may fork: branch 0 is its trunk, and a
    position of branch i > 0 sees the trunk and branch i alone. Positions of a branch continue those of the trunk, and
    the window is counted in them.
    """
    positions_S = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    distance_SS = positions_S[:, None] - positions_S[None, :]
    near_SS = distance_SS >= 0
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    if branches is not None:
        branch_BS, position_BS = branches
        same_BSS = same_BSS & ((branch_BS[:, None, :] == 0) | (branch_BS[:, :, None] == branch_BS[:, None, :]))
        distance_SS = position_BS[:, :, None] - position_BS[:, None, :]
    if window is not None:
        near_SS = near_SS & (distance_SS < window)
    return (near_SS & same_BSS)[:, None]


def sink_attention(
    query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, sinks_A: Tensor, document_ids_BS: Tensor,
    *, window: int | None, scale: float, branches: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention output, (B, A, S, D), in the dtype of the query. The softmax is at least float32."""
    repeats = query_BASD.shape[1] // key_BQSD.shape[1]
    key_BASD = key_BQSD.repeat_interleave(repeats, dim=1)
    value_BASD = value_BQSD.repeat_interleave(repeats, dim=1)
    scores_BASS = query_BASD @ key_BASD.transpose(-1, -2) * scale
    softmax_dtype = torch.promote_types(scores_BASS.dtype, torch.float32)
    scores_BASS = scores_BASS.to(softmax_dtype).masked_fill(~visible(document_ids_BS, window, branches), float("-inf"))
    batch, heads, length, _ = scores_BASS.shape
    sink_BAS1 = sinks_A.to(softmax_dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
    probs = torch.softmax(torch.cat([scores_BASS, sink_BAS1], dim=-1), dim=-1)[..., :-1]
    return probs.to(value_BASD.dtype) @ value_BASD
