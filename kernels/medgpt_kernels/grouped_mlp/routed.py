"""The MoE layer behind the router, fused: saves the tokens, the pre-activation and the index, and nothing else.

forward     z = x[token] @ W1 + b1, a = clamped SwiGLU        one launch
            y = a @ W2 + b2                                   one launch
            out = sum of weight * y over the slots            one launch (none where a token has one slot)
backward    dz, weight * a, d weight                          one launch
            dW2, db2; dW1, db1                                one launch each
            dx = sum of dz @ W1^T over the slots              two launches (one)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_positive,
    check_same_dtype,
    check_shape,
    choose,
)
from medgpt_kernels.grouped_mlp import launch, routed_reference
from medgpt_kernels.grouped_mlp.checks import check_made, check_stacks, check_tokens
from medgpt_kernels.grouped_mlp.formats import check_fits, packed, packed_to_fp8, plain, to_fp8, to_mxfp4
from medgpt_kernels.grouped_mlp.launch import Weights
from medgpt_kernels.grouped_mlp.weight_grads import GradSink
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx.op import sum_block, triton_dtype
from medgpt_kernels.mx.reference import E4M3
from medgpt_kernels.permute.op import combine_rows
from medgpt_kernels.route.blocks import block_e
from medgpt_kernels.route.rows import RowIndex

__all__ = [
    "Weights", "check_fits", "experts_of", "packed", "packed_to_fp8", "plain", "routed_mlp", "routed_mlp_frozen",
    "to_fp8", "to_mxfp4", "weight_grads",
]  # fmt: skip
PRECISIONS = ("bf16", "fp8", "mxfp4")


def _rounded(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows as the left side of a product with weights of a kind: (values, scales)."""
    return mx.quantise_rows(x, implementation="triton") if kind == "fp8" else (x, x)


def _rows_like(x: Tensor, rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """Room for rows that are the left side of a product with weights of a kind: (values, scales)."""
    if kind != "fp8":
        made = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        return made, made
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((rows, launch.cdiv(columns, 128)), dtype=torch.float32, device=x.device)


def _values(rows: Tensor) -> Tensor:
    """Codes as the E4M3 values they are."""
    return rows.view(E4M3) if rows.dtype == torch.uint8 else rows


def _forward(schedule, x_TH, weights_TK, index: RowIndex, w1: Weights, b1, w2: Weights, b2, limit):
    (T, H), (_, G), K = x_TH.shape, w1.sizes, weights_TK.shape[1]
    R, made = index.num_rows, {"dtype": x_TH.dtype, "device": x_TH.device}
    z, (a, a_scales) = torch.empty((R, G), **made), _rows_like(x_TH, R, G // 2, w1.kind)
    rows = torch.empty((T if K == 1 else R, H), **made)
    if R:
        x, x_scales = _rounded(x_TH, w1.kind)
        launch.gate_up_fwd(schedule, x, x_scales, w1, b1, z, a, a_scales, index, limit, K)
        launch.rows_times(schedule, _values(a), a_scales, w2, b2, weights_TK, rows, index, transposed=False)
    return (rows if K == 1 else combine_rows(rows, index.token_row, weights_TK)), z


def _input_grads(schedule, x_TH, weights_TK, index: RowIndex, w1: Weights, w2: Weights, b2, limit, z, grad_TH):
    """dx, d weights, dz and weight * a."""
    (T, H), (_, G), K, kind = x_TH.shape, w1.sizes, weights_TK.shape[1], w1.kind
    R, made = index.num_rows, {"dtype": x_TH.dtype, "device": x_TH.device}
    dz, weighted_a = torch.empty((R, G), **made), torch.empty((R, G // 2), **made)
    codes, scales = _rows_like(x_TH, R, G, kind) if kind == "fp8" else (dz, dz)
    parts = torch.empty(
        (launch.cdiv(G // 2, launch.backward_columns(kind)), R), dtype=torch.float32, device=x_TH.device
    )
    dx = torch.empty((T if K == 1 else R, H), **made)
    if R:
        grad, grad_scales = _rounded(grad_TH, kind)
        dots = _expert_dots(grad_TH, b2)
        launch.down_bwd(
            schedule, grad, grad_scales, w2, dots, z, weights_TK, dz, codes, scales, weighted_a, parts, index, limit
        )
        launch.rows_times(schedule, _values(codes), scales, w1, None, weights_TK, dx, index, transposed=True)
    d_weights = parts.sum(0)[index.token_row.long()] if R else torch.zeros_like(weights_TK)
    return (dx if K == 1 else combine_rows(dx, index.token_row, None)), d_weights, dz, weighted_a


def _gradients():
    from medgpt_kernels.grouped_mlp import gradients

    return gradients


def _expert_dots(grad_TH: Tensor, bias_EH: Tensor) -> Tensor:
    """(T, E) fp32: every token's gradient times every expert's bias, of which the router's gradient needs K."""
    (T, H), E = grad_TH.shape, bias_EH.shape[0]
    dots = torch.empty((T, E), dtype=torch.float32, device=grad_TH.device)
    _gradients().expert_dots_kernel[(launch.cdiv(T, 64),)](
        grad_TH, bias_EH, dots, T, H, E, SAME=grad_TH.dtype == bias_EH.dtype, BLOCK_T=64, BLOCK_E=block_e(E),
        BLOCK_H=64,
    )  # fmt: skip
    return dots


def weight_grads(
    a: Tensor, b: Tensor, weights_TK: Tensor, index: RowIndex, *, gather_a: bool, gather_b: bool, grad_EKN: Tensor,
    grad_bias_EN: Tensor, accumulate: bool, columns: int = 128,
) -> None:  # fmt: skip
    """Write, or add to, the gradients of one projection of all experts, in tiles of 128 rows and some columns.

    Raises:
        ValueError: rows, gradients or the index do not fit one another.
    """
    check_axes("grad_EKN", grad_EKN, "(E, K, N)")
    E, K_SIZE, N_SIZE = grad_EKN.shape
    rows = {True: weights_TK.shape[0], False: index.num_rows}
    check_shape("a", a, (rows[gather_a], K_SIZE))
    check_shape("b", b, (rows[gather_b], N_SIZE))
    check_shape("grad_bias_EN", grad_bias_EN, (E, N_SIZE))
    check_same_dtype("a", a=a, b=b)
    check_contiguous(a=a, b=b, weights_TK=weights_TK, grad_EKN=grad_EKN, grad_bias_EN=grad_bias_EN)
    blocks = {"BLOCK_M": 128, "BLOCK_R": sum_block(a.dtype)}
    for first, count, width in ((0, 1, 128), (1, launch.cdiv(K_SIZE, 128) - 1, columns)):
        if count:
            _gradients().weight_grad_kernel[(count, launch.cdiv(N_SIZE, width), E)](
                a, b, weights_TK, grad_EKN, grad_bias_EN, index.counts, index.row_entry, E, K_SIZE, N_SIZE, FIRST=first,
                SLOTS=weights_TK.shape[1], GATHER_A=gather_a, GATHER_B=gather_b, ACCUMULATE=accumulate,
                GRAD_DTYPE=triton_dtype(grad_EKN.dtype), BIAS_DTYPE=triton_dtype(grad_bias_EN.dtype), TILE=index.tile,
                BLOCK_E=block_e(E), BLOCK_N=width, **blocks, num_warps=8, num_stages=3,
            )  # fmt: skip


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, gate_up, b1, down, b2, index, w1, w2, limit, direct, schedule):
        made = _made(w1, "forward"), _made(w2, "forward")
        check_made(x_TH, index, made[0], b1, made[1], b2)
        out, z = _forward(schedule, x_TH, weights_TK, index, made[0], b1, made[1], b2, limit)
        ctx.save_for_backward(x_TH, weights_TK, gate_up, b1, down, b2, z)
        ctx.index, ctx.w1, ctx.w2, ctx.limit, ctx.direct, ctx.schedule = index, w1, w2, limit, direct, schedule
        return out

    @staticmethod
    def backward(ctx, grad_TH):
        x_TH, weights_TK, gate_up, b1, down, b2, z = ctx.saved_tensors
        index, w1, w2 = ctx.index, _made(ctx.w1, "backward"), _made(ctx.w2, "backward")
        grad_TH = grad_TH.contiguous()
        dx, d_weights, dz, weighted_a = _input_grads(
            ctx.schedule, x_TH, weights_TK, index, w1, w2, b2, ctx.limit, z, grad_TH
        )
        if not any(ctx.needs_input_grad[2:6]):
            return dx, d_weights, *[None] * 10
        learned = []
        for weight, bias, a, b, gather_a in ((gate_up, b1, x_TH, dz, True), (down, b2, weighted_a, grad_TH, False)):
            sinks = [GradSink(stack, direct=ctx.direct) for stack in (weight, bias)]
            check(
                sinks[0].accumulate == sinks[1].accumulate,
                "main_grad of a weight and of its bias must be cleared together; one of them holds gradients",
            )
            weight_grads(
                a, b, weights_TK, index, gather_a=gather_a, gather_b=not gather_a, grad_EKN=sinks[0].out,
                grad_bias_EN=sinks[1].out, accumulate=sinks[0].accumulate, columns=ctx.schedule.grad_columns,
            )  # fmt: skip
            learned += [sink.hand_over() for sink in sinks]
        return dx, d_weights, *learned, *[None] * 6


def routed_mlp(
    x_TH: Tensor, weights_TK: Tensor, index: RowIndex, gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float, precision: str = "bf16", direct: bool = False,
    rounded: tuple[Weights, Weights] | None = None, implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Tokens to the weighted sum of their experts' outputs, with all gradients.

    Args:
        x_TH: bf16, fp16 or fp32, contiguous.
        weights_TK: fp32 router weights.
        index: of ``route.index`` for the same choices, or ``route.index_sorted`` for rows that are sorted already.
        gate_up_EHG, down_EFH: of the dtype of ``x_TH``, GPT-oss's layout; biases of any served dtype.
        precision: ``bf16`` multiplies in the dtype of ``x_TH``; ``fp8`` rounds tokens, activations, gradients and
            weights to E4M3 for the products (weight gradients stay in the dtype of ``x_TH``); ``mxfp4`` rounds the
            weights alone, and their gradients pass straight through.
        direct: gradients of weights that have a ``main_grad`` are written there (``weight_grads``), in its dtype.
        rounded: ``to_fp8`` or ``to_mxfp4`` of both stacks as they are now, for ``precision`` fp8 or mxfp4: made once
            and kept for the micro-batches of an optimizer's step. Without it each pass rounds them anew.

    Returns:
        (T, H), in the dtype of ``x_TH``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check(precision in PRECISIONS, f"precision={precision!r}; allowed: {', '.join(PRECISIONS)}")
    for w in rounded or ():
        check(w.kind == precision, f"rounded is of kind {w.kind}; precision={precision}, they must be equal")
    check_tokens(x_TH, weights_TK, index, ANY_FLOAT if implementation == "reference" else FLOATS)
    given = {"gate_up_EHG": gate_up_EHG, "down_EFH": down_EFH}
    for name, stack in given.items():
        check_axes(name, stack, "(E, K, N)")
    check_same_dtype("x_TH", x_TH=x_TH, **given)
    stacks = {name: (stack, (stack.shape[1], stack.shape[2])) for name, stack in given.items()}
    check_stacks(x_TH, index, stacks, {"gate_up_bias_EG": gate_up_bias_EG, "down_bias_EH": down_bias_EH})
    check_positive(limit=limit)
    chosen = choose("grouped_mlp", implementation, _serves(x_TH, gate_up_EHG.shape[2] // 2, precision == "fp8"))
    if chosen == "reference":
        return routed_reference.routed_mlp(
            x_TH, weights_TK, experts_of(index), gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH, limit=limit,
            precision=precision, direct=direct,
        )  # fmt: skip
    if precision == "bf16":
        w1, w2 = plain(gate_up_EHG), plain(down_EFH)
    elif rounded is not None:
        w1, w2 = rounded
    else:  # made in each pass and not kept in between: they would stay for every layer until its backward pass
        made = to_fp8 if precision == "fp8" else to_mxfp4
        w1, w2 = partial(made, gate_up_EHG), partial(made, down_EFH)
    return _RoutedMLP.apply(
        x_TH, weights_TK, gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH, index, w1, w2, limit, direct,
        launch.SCHEDULES[chosen],
    )  # fmt: skip


def routed_mlp_frozen(
    x_TH: Tensor, weights_TK: Tensor, index: RowIndex, gate_up: Weights | Callable[..., Weights],
    gate_up_bias_EG: Tensor, down: Weights | Callable[..., Weights], down_bias_EH: Tensor, *, limit: float,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """As ``routed_mlp`` with experts that do not learn, in any format (``packed``, ``packed_to_fp8``, ``to_fp8``).

    Gradients flow to the tokens and the router weights.

    Args:
        gate_up, down: weights, or functions of ``passes`` that make them: called in the forward pass and again in the
            backward pass, so that what they make (a layer of MXFP4 in E4M3) is not kept in between.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served; a bias requires a gradient.
    """
    for name, bias in (("gate_up_bias_EG", gate_up_bias_EG), ("down_bias_EH", down_bias_EH)):
        check(not bias.requires_grad, f"{name} requires a gradient; experts of this call do not learn")
    check_tokens(x_TH, weights_TK, index, FLOATS)
    check_positive(limit=limit)
    fp8 = not isinstance(gate_up, Weights) or gate_up.kind == "fp8"
    serves = _serves(x_TH, gate_up_bias_EG.shape[-1] // 2, fp8)
    del serves["reference"]
    chosen = choose("grouped_mlp.frozen", implementation, serves)
    return _RoutedMLP.apply(
        x_TH, weights_TK, None, gate_up_bias_EG, None, down_bias_EH, index, gate_up, down, limit, False,
        launch.SCHEDULES[chosen],
    )  # fmt: skip


def _made(weights: Weights | Callable[..., Weights], passes: str) -> Weights:
    return weights if isinstance(weights, Weights) else weights(passes=passes)


def _serves(x_TH: Tensor, inner: int, fp8: bool) -> dict:
    widths, of_one = (x_TH.shape[1], inner), 1 if fp8 else x_TH.element_size()
    serves = {name: partial(launch.refusal, name, x_TH, widths, of_one) for name in launch.SCHEDULES}
    return {**serves, "reference": lambda: None}


def experts_of(index: RowIndex) -> Tensor:
    """(T, K): the expert of each choice, from where its row lies."""
    return index.tile_expert[(index.token_row // index.tile).long()]
