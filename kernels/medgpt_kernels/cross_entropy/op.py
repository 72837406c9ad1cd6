"""Cross entropy in chunks of tokens: forward keeps a log-sum-exp per token, backward makes each chunk's logits again.

Peak memory is one chunk of logits. The price is one more product with the head's weight in the backward pass than with
kept logits: 4 instead of 3.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_dtype,
    check_same_dtype,
    check_shape,
    choose,
    triton_refusal,
)
from medgpt_kernels.mx.op import triton_dtype

CHUNK_BYTES = 2**28
"""Default size of a chunk of logits."""


def _kernels():
    from medgpt_kernels.cross_entropy import triton

    return triton


def _sums(logits: Tensor, labels: Tensor, first_id: int, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exponentials under it, and the label's logit, each (tokens,), of this part."""
    tokens, V = logits.shape
    if implementation == "triton":
        largest, total, target = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(3))
        _kernels().token_sums_kernel[(tokens,)](logits, labels, largest, total, target, V, first_id, BLOCK_V=1024)
        return largest, total, target
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(1)
    place = labels - first_id
    mine = (place >= 0) & (place < V)
    target = wide.gather(1, torch.where(mine, place, torch.zeros_like(place))[:, None])[:, 0]
    return largest, torch.exp(wide - largest[:, None]).sum(1), torch.where(mine, target, torch.zeros_like(target))


def _slopes(logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, first_id: int, implementation: str) -> Tensor:
    tokens, V = logits.shape
    if implementation == "triton":
        _kernels().logits_grad_kernel[(tokens, -(-V // 1024))](
            logits, labels, lse, grad, V, first_id, DTYPE=triton_dtype(logits.dtype), BLOCK_V=1024
        )
        return logits
    slope = torch.exp(logits.to(lse.dtype) - lse[:, None])
    place = labels - first_id
    mine = (place >= 0) & (place < V)
    slope[mine.nonzero()[:, 0], place[mine]] -= 1
    return (slope * grad[:, None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, labels_T, first_id, group, ignore_index, chunk, implementation):
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        lse_T = torch.empty(hidden_TH.shape[0], dtype=wide, device=hidden_TH.device)
        loss_T = torch.empty_like(lse_T)
        for at in _chunks(hidden_TH.shape[0], chunk):
            logits = hidden_TH[at] @ weight_VH.t()
            largest, total, target = _sums(logits, labels_T[at], first_id, implementation)
            if group is not None and group.size() > 1:
                part = largest
                largest = part.clone()
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
                sums = torch.stack((total * torch.exp(part - largest), target))
                dist.all_reduce(sums, group=group)
                total, target = sums
            lse_T[at] = largest + torch.log(total)
            loss_T[at] = lse_T[at] - target
        is_target_T = labels_T != ignore_index
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, lse_T, is_target_T)
        ctx.settings = first_id, chunk, implementation
        return torch.where(is_target_T, loss_T, torch.zeros_like(loss_T))

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TH, weight_VH, labels_T, lse_T, is_target_T = ctx.saved_tensors
        first_id, chunk, implementation = ctx.settings
        grad_T = torch.where(is_target_T, grad_T, torch.zeros_like(grad_T)).contiguous()
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_TH) if for_hidden else None
        # bf16 sums over hundreds of chunks would lose the small ones.
        d_weight = torch.zeros_like(weight_VH, dtype=lse_T.dtype) if for_weight else None
        for at in _chunks(hidden_TH.shape[0], chunk):
            logits = hidden_TH[at] @ weight_VH.t()
            slopes = _slopes(logits, labels_T[at], lse_T[at], grad_T[at], first_id, implementation)
            if for_hidden:
                d_hidden[at] = slopes @ weight_VH
            if for_weight:
                d_weight += slopes.t() @ hidden_TH[at]
        return d_hidden, None if d_weight is None else d_weight.to(weight_VH.dtype), *[None] * 6


def _chunks(num_tokens: int, chunk: int):
    return [slice(first, min(first + chunk, num_tokens)) for first in range(0, num_tokens, chunk)]


def cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    first_id: int = 0,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Loss of every token from the last hidden states and this rank's rows of the head.

    Args:
        hidden_TH: all tokens of the group, the same on every rank; contiguous.
        weight_VH: the head's rows for ids ``first_id .. first_id + V``, of the dtype of ``hidden_TH``.
        labels_T: int64 ids of the whole vocabulary, or ``ignore_index``.
        group: ranks that hold the other parts of the vocabulary; None when this rank holds it all.
        chunk_tokens: tokens whose logits exist at a time; 2^28 bytes of logits when not given.

    Returns:
        (T,), at least fp32, 0 at ``ignore_index``, the same on every rank. The gradient of ``hidden_TH`` is this rank's
        part: the caller sums it over the group, as the backward of megatron-core's gather or copy does.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check_axes("hidden_TH", hidden_TH, "(T, H)")
    check_axes("weight_VH", weight_VH, "(V, H)")
    (T, H), V = hidden_TH.shape, weight_VH.shape[0]
    check_dtype("hidden_TH", hidden_TH, ANY_FLOAT)
    check(V > 0 and weight_VH.shape[1] == H, f"weight_VH has shape {tuple(weight_VH.shape)}; allowed: (V, {H}), V > 0")
    check_same_dtype("hidden_TH", hidden_TH=hidden_TH, weight_VH=weight_VH)
    check_shape("labels_T", labels_T, (T,))
    check_dtype("labels_T", labels_T, (torch.int64,))
    check(first_id >= 0, f"first_id={first_id}; it must not be negative")
    check_contiguous(hidden_TH=hidden_TH, weight_VH=weight_VH, labels_T=labels_T)
    check(chunk_tokens is None or chunk_tokens > 0, f"chunk_tokens={chunk_tokens}; it must be greater than 0")
    serves = {"triton": lambda: _triton_refusal(hidden_TH), "reference": lambda: None}
    name = choose("cross_entropy", implementation, serves)
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (V * hidden_TH.element_size()))
    return _CrossEntropy.apply(hidden_TH, weight_VH, labels_T, first_id, group, ignore_index, chunk, name)


def _triton_refusal(hidden_TH: Tensor) -> str | None:
    if hidden_TH.dtype not in FLOATS:
        return f"hidden_TH is {hidden_TH.dtype}"
    return triton_refusal(hidden_TH)
