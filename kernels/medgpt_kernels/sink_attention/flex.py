"""Attention with sinks through PyTorch's FlexAttention, for CUDA.

FlexAttention skips blocks that the window or the documents mask out and hands out each row's log-sum-exp L. Multiplying
its output by sigmoid(L - s) puts the sink's logit s into the softmax: exp L / (exp L + exp s). Autograd carries the
gradient of L, so the gradients of query, key and sinks are exact too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def block_mask(
    document_ids_BS: Tensor, window: int | None, branches: tuple[Tensor, Tensor] | None = None
) -> BlockMask:  # fmt: skip
    """The visible keys of ``reference.visible`` as blocks, computed once per micro-batch."""
    batch, length = document_ids_BS.shape

    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query >= key
        if window is not None:
            near = near & (query - key < window)
        return near & (document_ids_BS[b, query] == document_ids_BS[b, key])

    def sees_of_branches(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch_BS, position_BS = branches
        seen = (query >= key) & (document_ids_BS[b, query] == document_ids_BS[b, key])
        seen = seen & ((branch_BS[b, key] == 0) | (branch_BS[b, key] == branch_BS[b, query]))
        if window is not None:
            seen = seen & (position_BS[b, query] - position_BS[b, key] < window)
        return seen

    rule = sees if branches is None else sees_of_branches
    return create_block_mask(rule, batch, None, length, length, device=document_ids_BS.device)


def sink_attention(
    query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, sinks_A: Tensor, mask: BlockMask, *, scale: float
) -> Tensor:
    """Attention output (B, A, S, D). Compiled on CUDA; on a CPU it runs uncompiled, for tests."""
    attend = _compiled() if query_BASD.is_cuda else flex_attention
    out, aux = attend(
        query_BASD, key_BQSD, value_BQSD, block_mask=mask, scale=scale, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    keep_BAS = torch.sigmoid(aux.lse - sinks_A.to(aux.lse.dtype).view(1, -1, 1))
    return out * keep_BAS.unsqueeze(-1).to(out.dtype)
