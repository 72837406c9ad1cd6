"""One new query per sequence against the keys and values kept of what stands before it; eager, no gradients.

Kept keys are read once per token, so the products are bound by memory and nothing is gained by fusing them on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    check,
    check_axes,
    check_dtype,
    check_positive,
    check_same_dtype,
    check_shape,
)


def cached_sink_attention(
    query_NAD: Tensor, key_NQTD: Tensor, value_NQTD: Tensor, sinks_A: Tensor, unseen_NT: Tensor | None, *, scale: float
) -> Tensor:
    """Attention output (N, A, D), in the dtype of the query. The softmax is at least float32.

    Args:
        query_NAD: the newest position of N sequences; head a reads group a // (A / Q).
        key_NQTD: T places of every sequence, in any order; value like it.
        unseen_NT: bool, true where a place holds nothing that the query may see; None where all do.

    Raises:
        ValueError: shapes or dtypes that are not served.
    """
    check_axes("query_NAD", query_NAD, "(N, A, D)")
    check_axes("key_NQTD", key_NQTD, "(N, Q, T, D)")
    num, heads, dim = query_NAD.shape
    groups, places = key_NQTD.shape[1:3]
    check(groups > 0 and heads % groups == 0, f"key_NQTD has {groups} groups; they must divide {heads} heads")
    for name, tensor in (("key_NQTD", key_NQTD), ("value_NQTD", value_NQTD)):
        check_shape(name, tensor, (num, groups, places, dim))
    check_dtype("query_NAD", query_NAD, ANY_FLOAT)
    check_same_dtype("query_NAD", query_NAD=query_NAD, key_NQTD=key_NQTD, value_NQTD=value_NQTD)
    check_shape("sinks_A", sinks_A, (heads,))
    if unseen_NT is not None:
        check_shape("unseen_NT", unseen_NT, (num, places))
        check_dtype("unseen_NT", unseen_NT, (torch.bool,))
    check_positive(scale=scale)
    query_NQRD = query_NAD.view(num, groups, heads // groups, dim)
    scores_NQRT = query_NQRD @ key_NQTD.transpose(-1, -2) * scale
    softmax_dtype = torch.promote_types(scores_NQRT.dtype, torch.float32)
    scores_NQRT = scores_NQRT.to(softmax_dtype)
    if unseen_NT is not None:
        scores_NQRT = scores_NQRT.masked_fill(unseen_NT[:, None, None], float("-inf"))
    sink_NQR1 = sinks_A.to(softmax_dtype).view(1, groups, -1, 1).expand(num, -1, -1, 1)
    probs_NQRT = torch.softmax(torch.cat([scores_NQRT, sink_NQR1], dim=-1), dim=-1)[..., :-1]
    return (probs_NQRT.to(value_NQTD.dtype) @ value_NQTD).reshape(num, heads, dim)
