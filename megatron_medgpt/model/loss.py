"""Cross entropy over a vocabulary that is split over the tensor group.

megatron-core's own casts to float32 always; this one computes in at least float32 and keeps float64, and it keeps the
logits instead of a second tensor of their size for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medgpt.types import IGNORE_INDEX


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, group: Any) -> Tensor:
        width = logits_NV.shape[1]
        place_N = labels_N - _rank(group) * width
        here_N = (place_N >= 0) & (place_N < width)
        place_N = place_N.clamp(0, width - 1)
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        target_N = wide.gather(1, place_N[:, None])[:, 0] * here_N
        lse_N = torch.logsumexp(wide, dim=1)
        if _size(group) > 1:
            largest_N = lse_N.clone()
            dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
            sums_2N = torch.stack([torch.exp(lse_N - largest_N), target_N])
            dist.all_reduce(sums_2N, group=group)
            lse_N, target_N = largest_N + sums_2N[0].log(), sums_2N[1]
        counted_N = labels_N != IGNORE_INDEX
        ctx.save_for_backward(logits_NV, lse_N, place_N, here_N, counted_N)
        return (lse_N - target_N) * counted_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        logits_NV, lse_N, place_N, here_N, counted_N = ctx.saved_tensors
        grad_NV = torch.exp(logits_NV.to(lse_N.dtype) - lse_N[:, None])
        grad_NV.scatter_add_(1, place_N[:, None], -here_N.to(lse_N.dtype)[:, None])
        grad_NV *= (grad_N * counted_N)[:, None]
        return grad_NV.to(logits_NV.dtype), None, None


def _rank(group: Any) -> int:
    return 0 if group is None else group.rank()


def _size(group: Any) -> int:
    return 1 if group is None else group.size()


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, group: Any = None) -> Tensor:
    """Loss of every row, (N,), at least float32; 0 where the label is ``IGNORE_INDEX``.

    Args:
        logits_NV: this tensor rank's slice of the vocabulary: rank r holds the ids ``[r * V / TP, (r + 1) * V / TP)``.
        labels_N: int64 ids of the whole vocabulary, the same on every rank of the group.
        group: the tensor group; None for one process.
    """
    return _CrossEntropy.apply(logits_NV, labels_N, group)
