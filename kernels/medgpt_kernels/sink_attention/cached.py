"""One new query per sequence against the keys and values kept of what stands before it; eager, no gradients.

Kept keys are read once per token, so the products are bound by memory and nothing is gained by fusing them on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cached_sink_attention(
    query_NAD: Tensor, key_NQTD: Tensor, value_NQTD: Tensor, sinks_A: Tensor, unseen_NT: Tensor | None, *, scale: float
) -> Tensor:
    """Attention output (N, A, D), in the dtype of the query. The softmax is at least float32.

    Args:
        query_NAD: the newest position of N sequences; head a reads group a // (A / Q).
        key_NQTD: T places of every sequence, in any order; value like it.
        unseen_NT: bool, true where a place holds nothing that the query may see; None where all do.
    """
    num, heads, dim = query_NAD.shape
    groups = key_NQTD.shape[1]
    query_NQRD = query_NAD.view(num, groups, heads // groups, dim)
    scores_NQRT = query_NQRD @ key_NQTD.transpose(-1, -2) * scale
    softmax_dtype = torch.promote_types(scores_NQRT.dtype, torch.float32)
    scores_NQRT = scores_NQRT.to(softmax_dtype)
    if unseen_NT is not None:
        scores_NQRT = scores_NQRT.masked_fill(unseen_NT[:, None, None], float("-inf"))
    sink_NQR1 = sinks_A.to(softmax_dtype).view(1, groups, -1, 1).expand(num, -1, -1, 1)
    probs_NQRT = torch.softmax(torch.cat([scores_NQRT, sink_NQR1], dim=-1), dim=-1)[..., :-1]
    return (probs_NQRT.to(value_NQTD.dtype) @ value_NQTD).reshape(num, heads, dim)
