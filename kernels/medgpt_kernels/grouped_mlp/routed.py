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

from medgpt_kernels.dispatch import check, check_contiguous, check_float, choose
from medgpt_kernels.grouped_mlp import launch, routed_reference
from medgpt_kernels.grouped_mlp.launch import Weights
from medgpt_kernels.grouped_mlp.weight_grads import GradSink
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx.op import FLOATS, triton_dtype
from medgpt_kernels.mx.reference import E4M3
from medgpt_kernels.permute.op import combine_rows
from medgpt_kernels.route.op import RowIndex, _block_e

KINDS = ("plain", "fp8", "mxfp4")


def plain(w_EKN: Tensor) -> Weights:
    return Weights("plain", w_EKN, w_EKN, w_EKN, tuple(w_EKN.shape[1:]))


def to_fp8(w_EKN: Tensor, *, passes: str = "both", implementation: str = "auto") -> Weights:
    """E4M3 of a bf16 or fp32 weight. Both orientations come from one rounding.

    Args:
        passes: ``forward``, ``backward`` or ``both``: the orientations that are made.
    """
    codes, scales = mx.quantise_tiles(w_EKN.detach(), implementation=implementation)
    return Weights("fp8", *_orientations(codes, passes, first="backward"), scales, tuple(w_EKN.shape[1:]))


def _orientations(codes: Tensor, passes: str, *, first: str) -> tuple[Tensor | None, Tensor | None]:
    """Codes for (forward, backward) of those that are of the ``first``; a pass that is not asked for costs nothing."""
    check(passes in ("forward", "backward", "both"), f"passes={passes!r}; allowed: forward, backward, both")
    made = {first: codes if passes in (first, "both") else None}
    other = "forward" if first == "backward" else "backward"
    made[other] = codes.transpose(1, 2).contiguous() if passes in (other, "both") else None
    return made["forward"], made["backward"]


def packed_to_fp8(
    blocks: Tensor, scales: Tensor, *, checked: bool = False, passes: str = "both", implementation: str = "auto"
) -> Weights:
    """The same numbers as MXFP4 weights, in E4M3.

    Args:
        checked: scales and tiles were checked before, as those of weights that do not change are: nothing waits for
            the device.
        passes: see ``to_fp8``.

    Raises:
        ValueError: a scale is NaN, or the exponents of some 128x128 tiles spread too far to be exact; their number is
            given.
    """
    codes, tile_scales, fits = mx.mxfp4_to_e4m3(blocks, scales, implementation=implementation)
    if not checked:
        mx.check_scales(scales)
        check_fits(fits)
    _, N, groups = scales.shape
    flipped = tile_scales.transpose(1, 2).contiguous()
    return Weights("fp8", *_orientations(codes, passes, first="forward"), flipped, (groups * 32, N))


def check_fits(fits: Tensor) -> None:
    """Refuse MXFP4 weights that E4M3 does not hold exactly. Reads the tensor on the host.

    Args:
        fits: of each tile, from ``mx.mxfp4_to_e4m3``.
    """
    bad = int((~fits).sum())
    check(
        bad == 0,
        f"blocks: {bad} of {fits.numel()} tiles have exponents that spread over more than 14 and are not exact in "
        "E4M3; use kind mxfp4, which decodes to bf16",
    )


def packed(blocks: Tensor, scales: Tensor, *, checked: bool = False) -> Weights:
    """Frozen weights that stay in MXFP4 and are decoded inside the products.

    Args:
        checked: see ``packed_to_fp8``.

    Raises:
        ValueError: a scale is NaN; dtypes, shapes or layouts that are not served.
    """
    mx._check_packed(blocks, scales)
    if not checked:
        mx.check_scales(scales)
    _, N, groups = scales.shape
    return Weights("mxfp4", blocks, blocks, scales, (groups * 32, N))


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
        grad_TH, bias_EH, dots, T, H, E, SAME=grad_TH.dtype == bias_EH.dtype, BLOCK_T=64, BLOCK_E=_block_e(E),
        BLOCK_H=64,
    )  # fmt: skip
    return dots


def weight_grads(
    a: Tensor, b: Tensor, weights_TK: Tensor, index: RowIndex, *, gather_a: bool, gather_b: bool, grad_EKN: Tensor,
    grad_bias_EN: Tensor, accumulate: bool,
) -> None:  # fmt: skip
    """Write, or add to, the gradients of one projection of all experts."""
    E, K_SIZE, N_SIZE = grad_EKN.shape
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_R": 64}
    _gradients().weight_grad_kernel[(launch.cdiv(K_SIZE, 128), launch.cdiv(N_SIZE, 128), E)](
        a, b, weights_TK, grad_EKN, grad_bias_EN, index.counts, index.row_entry, E, K_SIZE, N_SIZE,
        SLOTS=weights_TK.shape[1], GATHER_A=gather_a, GATHER_B=gather_b, ACCUMULATE=accumulate,
        GRAD_DTYPE=triton_dtype(grad_EKN.dtype), BIAS_DTYPE=triton_dtype(grad_bias_EN.dtype), TILE=index.tile,
        BLOCK_E=_block_e(E), **blocks, num_warps=8, num_stages=3,
    )  # fmt: skip


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights_TK, gate_up, b1, down, b2, index, w1, w2, limit, direct, schedule):
        made = _made(w1, "forward"), _made(w2, "forward")
        _check_call(x_TH, weights_TK, index, made[0], b1, made[1], b2)
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
                grad_bias_EN=sinks[1].out, accumulate=sinks[0].accumulate,
            )  # fmt: skip
            learned += [sink.hand_over() for sink in sinks]
        return dx, d_weights, *learned, *[None] * 6


def _check_call(x_TH, weights_TK, index, w1: Weights, b1, w2: Weights, b2) -> None:
    check(x_TH.dim() == 2, f"x_TH has shape {tuple(x_TH.shape)}; allowed: (T, H)")
    T, H = x_TH.shape
    check_float("x_TH", x_TH, FLOATS)
    check_float("weights_TK", weights_TK, (torch.float32,))
    K1, G = w1.sizes
    check(K1 == H, f"x_TH has width {H}, gate_up {K1}; they must be equal")
    check(w2.sizes == (G // 2, H), f"down is {w2.sizes}; gate_up asks for {(G // 2, H)}")
    stored = [w.stored(transposed=False) for w in (w1, w2)]
    (E, *_), (of_down, *_), of_index = stored[0].shape, stored[1].shape, index.counts.shape[0]
    check(E == of_down == of_index, f"down holds {of_down} experts; gate_up {E}, the index {of_index}")
    check(
        weights_TK.shape == index.token_row.shape,
        f"weights_TK has shape {tuple(weights_TK.shape)}; the index is for {tuple(index.token_row.shape)}",
    )
    check(weights_TK.shape[0] == T, f"x_TH has {T} tokens, weights_TK {weights_TK.shape[0]}")
    check(index.tile >= 16, f"index.tile={index.tile}; products need tiles of at least 16 rows")
    check(w1.kind == w2.kind, f"gate_up is {w1.kind}, down {w2.kind}; they must be of one kind")
    for name, w, read, bias in (("gate_up", w1, stored[0], b1), ("down", w2, stored[1], b2)):
        check(w.kind in KINDS, f"{name} is of kind {w.kind!r}; allowed: {', '.join(KINDS)}")
        if w.kind == "plain":
            check(read.dtype == x_TH.dtype, f"{name} is {read.dtype}, x_TH {x_TH.dtype}; they must be equal")
        check_float(f"{name}_bias", bias, FLOATS)
        allowed = (E, w.sizes[1])
        check(bias.shape == allowed, f"{name}_bias has shape {tuple(bias.shape)}; allowed: {allowed}")
    check_contiguous(
        x_TH=x_TH, weights_TK=weights_TK, gate_up=stored[0], gate_up_bias=b1, down=stored[1], down_bias=b2,
        index=index.row_entry,
    )  # fmt: skip


def routed_mlp(
    x_TH: Tensor, weights_TK: Tensor, index: RowIndex, gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float, precision: str = "bf16", direct: bool = False,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Tokens to the weighted sum of their experts' outputs, with all gradients.

    Args:
        x_TH: bf16, fp16 or fp32, contiguous.
        weights_TK: fp32 router weights.
        index: of ``route.index`` for the same choices, or ``route.index_sorted`` for rows that are sorted already.
        gate_up_EHG, down_EFH: of the dtype of ``x_TH``, GPT-oss's layout; biases of any served dtype.
        precision: ``bf16`` multiplies in the dtype of ``x_TH``; ``fp8`` rounds tokens, activations, gradients and
            weights to E4M3 for the products (weight gradients stay in the dtype of ``x_TH``).
        direct: gradients of weights that have a ``main_grad`` are written there (``weight_grads``), in its dtype.

    Returns:
        (T, H), in the dtype of ``x_TH``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check(precision in ("bf16", "fp8"), f"precision={precision!r}; allowed: bf16, fp8")
    for name, stack in (("gate_up_EHG", gate_up_EHG), ("down_EFH", down_EFH)):
        check(stack.dim() == 3, f"{name} has shape {tuple(stack.shape)}; allowed: (E, K, N)")
    chosen = choose("grouped_mlp", implementation, _serves(x_TH, gate_up_EHG.shape[2] // 2, precision == "fp8"))
    if chosen == "reference":
        return routed_reference.routed_mlp(
            x_TH, weights_TK, experts_of(index), gate_up_EHG, gate_up_bias_EG, down_EFH, down_bias_EH, limit=limit,
            fp8=precision == "fp8", direct=direct,
        )  # fmt: skip
    if precision == "bf16":
        w1, w2 = plain(gate_up_EHG), plain(down_EFH)
    else:  # made in each pass and not kept in between: two bytes a weight of every layer would stay until its backward
        w1, w2 = partial(to_fp8, gate_up_EHG), partial(to_fp8, down_EFH)
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
    """
    for name, bias in (("gate_up_bias_EG", gate_up_bias_EG), ("down_bias_EH", down_bias_EH)):
        check(not bias.requires_grad, f"{name} requires a gradient; experts of this call do not learn")
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
