"""One pass over a chunk of logits each way. A program owns a token, so nothing is shared and nothing is atomic."""

from __future__ import annotations

import triton
import triton.language as tl

from medgpt_kernels import rounding


@triton.jit
def token_sums_kernel(logits_ptr, labels_ptr, largest_ptr, total_ptr, target_ptr, V, first_id, BLOCK_V: tl.constexpr):
    """Of this rank's part of the vocabulary: the largest logit, the sum of exponentials under it, the label's logit (0
    where the label is another rank's)."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token) - first_id
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    target = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + token * V + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, logits)
        safe = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - safe) + tl.exp(logits - safe)
        largest = above
        target += tl.where((columns == label) & (columns < V), logits, 0.0)
    best = tl.max(largest, 0)
    tl.store(largest_ptr + token, best)
    tl.store(total_ptr + token, tl.sum(total * tl.exp(largest - best), 0))
    tl.store(target_ptr + token, tl.sum(target, 0))


@triton.jit
def logits_grad_kernel(
    logits_ptr, labels_ptr, lse_ptr, grad_ptr, V, first_id, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Logits to their gradient, in place: ``grad * (softmax - onehot)``; a gradient of 0 (no target) gives 0."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    label = tl.load(labels_ptr + token) - first_id
    lse = tl.load(lse_ptr + token)
    grad = tl.load(grad_ptr + token)
    logits = tl.load(logits_ptr + token * V + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    slope = (tl.exp(logits - lse) - tl.where(columns == label, 1.0, 0.0)) * grad
    tl.store(logits_ptr + token * V + columns, rounding.cast(slope, DTYPE), mask=columns < V)
