"""Routing with its gradients. Nothing here waits for the device: sizes are bounds known on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    check,
    check_axes,
    check_contiguous,
    check_float,
    check_shape,
    choose,
    triton_refusal,
)
from medgpt_kernels.mx.op import FLOATS, triton_dtype
from medgpt_kernels.mx.reference import E4M3
from medgpt_kernels.mx.reference import quantise_rows as reference_quantise_rows
from medgpt_kernels.route import reference
from medgpt_kernels.route.reference import num_tiles

BLOCK_T = 64
MAX_EXPERTS = 256
"""A block of tokens holds all its logits in registers."""


@dataclass(frozen=True, slots=True, eq=False)
class RowIndex:
    """Where the rows of a MoE layer lie: sorted by expert, within an expert by token, runs padded to whole tiles.

    R is a bound known on the host; what the choices do not need is marked unused.
    """

    row_entry: Tensor
    """(R,) int32: ``token * K + slot``, -1 on padding."""
    token_row: Tensor
    """(T, K) int32: the row of each choice."""
    tile_expert: Tensor
    """(R / tile,) int32: expert of each tile of rows, -1 on unused tiles."""
    counts: Tensor
    """(E,) int32: rows of each expert, without padding."""
    tile: int

    @property
    def num_rows(self) -> int:
        return self.row_entry.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What the router makes of its tokens."""

    weights_TK: Tensor
    """fp32, the softmax over the chosen, largest first."""
    experts_TK: Tensor
    """int32."""
    logits_TE: Tensor
    """fp32."""
    normed_TH: Tensor
    """The input after its RMSNorm, or the input."""
    codes_TH: Tensor | None
    """``normed_TH`` as float8_e4m3fn with one scale per 128 columns, when asked for."""
    scales_TG: Tensor | None
    histogram: Tensor
    """(blocks of tokens, E) int32, for ``index``."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _is_tile(tile: int) -> bool:
    return tile >= 16 and tile & (tile - 1) == 0


def _block_e(num_experts: int) -> int:
    return max(16, 1 << (num_experts - 1).bit_length())


def _kernels():
    from medgpt_kernels.route import triton

    return triton


def _serves(*tensors: Tensor) -> dict:
    return {"triton": lambda: triton_refusal(*tensors), "reference": lambda: None}


@torch.library.custom_op("medgpt_kernels::route_fwd", mutates_args=())
def _route_fwd(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, norm_H: Tensor | None, eps: float, top_k: int, quantise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, H), E = x_TH.shape, weight_EH.shape[0]
    device, blocks = x_TH.device, _cdiv(T, BLOCK_T)
    normed = torch.empty((T, H) if norm_H is not None else (0, H), dtype=x_TH.dtype, device=device)
    codes = torch.empty((T, H) if quantise else (0, H), dtype=torch.uint8, device=device)
    scales = torch.empty((codes.shape[0], _cdiv(H, 128)), dtype=torch.float32, device=device)
    logits = torch.empty((T, E), dtype=torch.float32, device=device)
    weights = torch.empty((T, top_k), dtype=torch.float32, device=device)
    experts = torch.empty((T, top_k), dtype=torch.int32, device=device)
    histogram = torch.empty((blocks, E), dtype=torch.int32, device=device)
    if T:
        _kernels().route_fwd_kernel[(blocks,)](
            x_TH, weight_EH, bias_E, norm_H if norm_H is not None else weight_EH, normed, codes, scales, logits,
            weights, experts, histogram, T, H, E, eps, K=top_k, NORM=norm_H is not None, QUANTISE=quantise,
            DTYPE=triton_dtype(x_TH.dtype), BLOCK_T=BLOCK_T, BLOCK_E=_block_e(E),
        )  # fmt: skip
    return normed, codes, scales, logits, weights, experts, histogram


@_route_fwd.register_fake
def _(x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise):
    (T, H), E = x_TH.shape, weight_EH.shape[0]
    rows = T if quantise else 0
    return (
        x_TH.new_empty((T if norm_H is not None else 0, H)),
        x_TH.new_empty((rows, H), dtype=torch.uint8),
        x_TH.new_empty((rows, _cdiv(H, 128)), dtype=torch.float32),
        x_TH.new_empty((T, E), dtype=torch.float32),
        x_TH.new_empty((T, top_k), dtype=torch.float32),
        x_TH.new_empty((T, top_k), dtype=torch.int32),
        x_TH.new_empty((_cdiv(T, BLOCK_T), E), dtype=torch.int32),
    )


@torch.library.custom_op("medgpt_kernels::route_bwd", mutates_args=())
def _route_bwd(experts_TK: Tensor, weights_TK: Tensor, grad_weights_TK: Tensor, num_experts: int) -> Tensor:
    T, K = experts_TK.shape
    grad = torch.empty((T, num_experts), dtype=torch.float32, device=experts_TK.device)
    if T:
        _kernels().route_bwd_kernel[(_cdiv(T, BLOCK_T),)](
            experts_TK, weights_TK, grad_weights_TK, grad, T, num_experts, K=K, BLOCK_T=BLOCK_T,
            BLOCK_E=_block_e(num_experts),
        )  # fmt: skip
    return grad


@_route_bwd.register_fake
def _(experts_TK, weights_TK, grad_weights_TK, num_experts):
    return weights_TK.new_empty((experts_TK.shape[0], num_experts))


@torch.library.custom_op("medgpt_kernels::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(x_TH: Tensor, norm_H: Tensor, grad_TH: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    T, H = x_TH.shape
    grad_x = torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device)
    grad_norm = torch.empty((_cdiv(T, 32), H), dtype=torch.float32, device=x_TH.device)
    if T:
        _kernels().rms_norm_bwd_kernel[(grad_norm.shape[0],)](
            x_TH, norm_H, grad_TH, grad_x, grad_norm, T, H, eps, DTYPE=triton_dtype(x_TH.dtype), BLOCK_T=32, BLOCK_H=128
        )
    return grad_x, grad_norm.sum(0).to(norm_H.dtype)


@_rms_norm_bwd.register_fake
def _(x_TH, norm_H, grad_TH, eps):
    return torch.empty_like(x_TH), torch.empty_like(norm_H)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise):
        normed, codes, scales, logits, weights, experts, histogram = _route_fwd(
            x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise
        )
        ctx.save_for_backward(x_TH, weight_EH, norm_H, normed, weights, experts)
        ctx.eps, ctx.bias_dtype = eps, bias_E.dtype
        ctx.mark_non_differentiable(codes, scales, experts, histogram)
        return normed, codes, scales, logits, weights, experts, histogram

    @staticmethod
    def backward(ctx, grad_normed, _codes, _scales, grad_logits, grad_weights, _experts, _histogram):
        x_TH, weight_EH, norm_H, normed_TH, weights_TK, experts_TK = ctx.saved_tensors
        grad = _route_bwd(experts_TK, weights_TK, grad_weights.contiguous(), weight_EH.shape[0]) + grad_logits
        routed_TH = x_TH if norm_H is None else normed_TH
        grad_x, grad_norm = grad.to(x_TH.dtype) @ weight_EH.to(x_TH.dtype), None
        if norm_H is not None:
            grad_x, grad_norm = _rms_norm_bwd(x_TH, norm_H, (grad_x + grad_normed).contiguous(), ctx.eps)
        grad_weight = (grad.to(x_TH.dtype).t() @ routed_TH).to(weight_EH.dtype)
        return grad_x, grad_weight, grad.sum(0).to(ctx.bias_dtype), grad_norm, None, None, None


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    norm_H: Tensor | None = None,
    eps: float = 1e-5,
    quantise: bool = False,
    implementation: str = "auto",
) -> Routing:
    """Choose the experts of every token, in one pass over the tokens (two with a norm).

    Args:
        x_TH: bf16, fp16 or fp32, contiguous; weight_EH, bias_E and norm_H of any of these dtypes.
        norm_H: weight of an RMSNorm in front of the router, which the experts see too; None for none.
        quantise: also give the (normed) tokens as FP8.

    Returns:
        A ``Routing``; gradients flow through ``weights_TK``, ``logits_TE`` and ``normed_TH``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check_axes("x_TH", x_TH, "(T, H)")
    check_axes("weight_EH", weight_EH, "(E, H)")
    E, H = weight_EH.shape
    check(x_TH.shape[1] == H, f"x_TH has width {x_TH.shape[1]}, weight_EH {H}; they must be equal")
    check(bias_E.shape == (E,), f"bias_E has shape {tuple(bias_E.shape)}; allowed: ({E},)")
    check(1 <= top_k <= E <= MAX_EXPERTS, f"top_k={top_k} of {E} experts; allowed: 1 to E, E at most {MAX_EXPERTS}")
    allowed = (*FLOATS, torch.float64) if implementation == "reference" else FLOATS
    given = {"x_TH": x_TH, "weight_EH": weight_EH, "bias_E": bias_E, **({} if norm_H is None else {"norm_H": norm_H})}
    for name, tensor in given.items():
        check_float(name, tensor, allowed)
    if norm_H is not None:
        check_shape("norm_H", norm_H, (H,))
    check_contiguous(**given)
    if choose("route", implementation, _serves(x_TH)) == "reference":
        return _reference_route(x_TH, weight_EH, bias_E, top_k, norm_H, eps, quantise)
    normed, codes, scales, logits, weights, experts, histogram = _Route.apply(
        x_TH, weight_EH, bias_E, norm_H, eps, top_k, quantise
    )
    return Routing(
        weights, experts, logits, x_TH if norm_H is None else normed,
        codes.view(E4M3) if quantise else None, scales if quantise else None, histogram,
    )  # fmt: skip


def _reference_route(x_TH, weight_EH, bias_E, top_k, norm_H, eps, quantise) -> Routing:
    normed = x_TH if norm_H is None else reference.rms_norm(x_TH, norm_H, eps)
    logits = reference.logits(normed, weight_EH, bias_E)
    weights, experts = reference.top_k(logits, top_k)
    codes, scales = reference_quantise_rows(normed.detach()) if quantise else (None, None)
    chosen = torch.zeros_like(logits, dtype=torch.int32).scatter_(1, experts.long(), 1)
    histogram = torch.stack([part.sum(0, dtype=torch.int32) for part in chosen.split(BLOCK_T)] or [chosen.sum(0)])
    return Routing(weights, experts, logits, normed, codes, scales, histogram)


@torch.library.custom_op("medgpt_kernels::row_index", mutates_args=())
def _index(
    experts_TK: Tensor, histogram: Tensor | None, num_experts: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, K), device, block_e = experts_TK.shape, experts_TK.device, _block_e(num_experts)
    blocks, tiles = _cdiv(T, BLOCK_T), num_tiles(T * K, num_experts, tile)
    made = {"dtype": torch.int32, "device": device}
    row_entry, token_row = torch.empty(tiles * tile, **made), torch.empty((T, K), **made)
    tile_expert = torch.empty(tiles if tile > 1 else 0, **made)
    counts = torch.empty(num_experts, **made)
    kernels = _kernels()
    if histogram is None:
        histogram = torch.empty((blocks, num_experts), **made)
        if blocks:
            kernels.histogram_kernel[(blocks,)](
                experts_TK, histogram, T, num_experts, K=K, BLOCK_T=BLOCK_T, BLOCK_E=block_e
            )
    base = torch.empty((blocks, num_experts), **made)
    kernels.scan_kernel[(1,)](
        histogram,
        base,
        counts,
        tile_expert,
        row_entry,
        blocks,
        tiles,
        num_experts,
        TILE=tile,
        BLOCK_E=block_e,
        CHUNK=64,
    )
    if blocks:
        kernels.index_kernel[(blocks,)](
            experts_TK, base, row_entry, token_row, T, num_experts, K=K, BLOCK_T=BLOCK_T, BLOCK_E=block_e
        )
    return row_entry, token_row, tile_expert, counts


@_index.register_fake
def _(experts_TK, histogram, num_experts, tile):
    T, K = experts_TK.shape
    tiles = num_tiles(T * K, num_experts, tile)
    made = {"dtype": torch.int32}
    return (
        experts_TK.new_empty((tiles * tile,), **made),
        experts_TK.new_empty((T, K), **made),
        experts_TK.new_empty((tiles if tile > 1 else 0,), **made),
        experts_TK.new_empty((num_experts,), **made),
    )


def index(
    experts_TK: Tensor, num_experts: int, *, tile: int = 128, histogram: Tensor | None = None,
    implementation: str = "auto",
) -> RowIndex:  # fmt: skip
    """Sort the choices by expert, stably, in two launches (three without the router's histogram).

    Args:
        experts_TK: int32, contiguous, distinct within a token, each in 0 .. num_experts - 1.
        tile: rows of a tile of the grouped products, a power of two of at least 16; or 1 for rows without padding, as
            an exchange between ranks wants them (``tile_expert`` is then empty).
        histogram: ``Routing.histogram`` of the same choices.
    """
    check(experts_TK.dtype == torch.int32, f"experts_TK is {experts_TK.dtype}; allowed: int32")
    check(experts_TK.dim() == 2, f"experts_TK has shape {tuple(experts_TK.shape)}; allowed: (T, K)")
    check(tile == 1 or _is_tile(tile), f"tile={tile}; allowed: 1 and powers of two from 16")
    check(1 <= num_experts <= MAX_EXPERTS, f"num_experts={num_experts}; allowed: 1 to {MAX_EXPERTS}")
    check_contiguous(experts_TK=experts_TK)
    if histogram is not None:
        check(histogram.dtype == torch.int32, f"histogram is {histogram.dtype}; allowed: int32")
        check_shape("histogram", histogram, (_cdiv(experts_TK.shape[0], BLOCK_T), num_experts))
        check_contiguous(experts_TK=experts_TK, histogram=histogram)
    if choose("route.index", implementation, _serves(experts_TK)) == "reference":
        made = list(reference.index(experts_TK.cpu(), num_experts, tile))
        made[2] = made[2] if tile > 1 else made[2][:0]
        return RowIndex(*(part.to(experts_TK.device) for part in made), tile)
    return RowIndex(*_index(experts_TK, histogram, num_experts, tile), tile)


@torch.library.custom_op("medgpt_kernels::row_index_sorted", mutates_args=())
def _index_sorted(counts_E: Tensor, num_rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    E = counts_E.shape[0]
    tiles = num_tiles(num_rows, E, tile)
    made = {"dtype": torch.int32, "device": counts_E.device}
    row_entry, token_row = torch.empty(tiles * tile, **made), torch.empty((num_rows, 1), **made)
    tile_expert = torch.empty(tiles, **made)
    if tiles:
        _kernels().index_sorted_kernel[(tiles,)](
            counts_E, row_entry, token_row, tile_expert, E, TILE=tile, BLOCK_E=_block_e(E)
        )
    return row_entry, token_row, tile_expert


@_index_sorted.register_fake
def _(counts_E, num_rows, tile):
    tiles = num_tiles(num_rows, counts_E.shape[0], tile)
    made = {"dtype": torch.int32}
    return (
        counts_E.new_empty((tiles * tile,), **made),
        counts_E.new_empty((num_rows, 1), **made),
        counts_E.new_empty((tiles,), **made),
    )


def index_sorted(counts_E: Tensor, num_rows: int, *, tile: int = 128, implementation: str = "auto") -> RowIndex:
    """The index of rows that are sorted by expert already, in one launch; "tokens" are these rows, K is 1.

    Args:
        counts_E: int32 or int64 on the device, adding up to ``num_rows``.
    """
    check_axes("counts_E", counts_E, "(E)")
    check(num_rows >= 0, f"num_rows={num_rows}; it must not be negative")
    check(counts_E.dtype in (torch.int32, torch.int64), f"counts_E is {counts_E.dtype}; allowed: int32, int64")
    check(_is_tile(tile), f"tile={tile}; allowed: powers of two from 16")
    check_contiguous(counts_E=counts_E)
    if choose("route.index_sorted", implementation, _serves(counts_E)) == "reference":
        made = (part.to(counts_E.device) for part in reference.index_sorted(counts_E, num_rows, tile))
    else:
        made = _index_sorted(counts_E, num_rows, tile)
    row_entry, token_row, tile_expert = made
    return RowIndex(row_entry, token_row, tile_expert, counts_E.to(torch.int32), tile)


@torch.library.custom_op("medgpt_kernels::router_losses_fwd", mutates_args=())
def _losses_fwd(logits_TE: Tensor, kept_T: Tensor) -> tuple[Tensor, Tensor]:
    T, E = logits_TE.shape
    blocks = _cdiv(T, BLOCK_T)
    probs = torch.empty((blocks, E), dtype=torch.float32, device=logits_TE.device)
    z = torch.empty(blocks, dtype=torch.float32, device=logits_TE.device)
    if blocks:
        _kernels().losses_fwd_kernel[(blocks,)](logits_TE, kept_T, probs, z, T, E, BLOCK_T=BLOCK_T, BLOCK_E=_block_e(E))
    return probs.sum(0), z.sum()


@_losses_fwd.register_fake
def _(logits_TE, kept_T):
    return logits_TE.new_empty((logits_TE.shape[1],)), logits_TE.new_empty(())


@torch.library.custom_op("medgpt_kernels::router_losses_bwd", mutates_args=())
def _losses_bwd(logits_TE: Tensor, kept_T: Tensor, slope_E: Tensor, z_slope: Tensor) -> Tensor:
    T, E = logits_TE.shape
    grad = torch.empty((T, E), dtype=torch.float32, device=logits_TE.device)
    if T:
        _kernels().losses_bwd_kernel[(_cdiv(T, BLOCK_T),)](
            logits_TE, kept_T, slope_E, z_slope, grad, T, E, BLOCK_T=BLOCK_T, BLOCK_E=_block_e(E)
        )
    return grad


@_losses_bwd.register_fake
def _(logits_TE, kept_T, slope_E, z_slope):
    return torch.empty_like(logits_TE)


class _Sums(torch.autograd.Function):
    """Sums over the kept tokens of the probabilities of each expert, and of the squared log-sum-exp."""

    @staticmethod
    def forward(ctx, logits_TE, kept_T):
        ctx.save_for_backward(logits_TE, kept_T)
        return _losses_fwd(logits_TE, kept_T)

    @staticmethod
    def backward(ctx, slope_E, z_slope):
        logits_TE, kept_T = ctx.saved_tensors
        return _losses_bwd(logits_TE, kept_T, slope_E.contiguous(), z_slope.contiguous()), None


def losses(
    logits_TE: Tensor, share_E: Tensor, kept_T: Tensor, num_tokens: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Balance and z loss of one layer. See ``reference.losses``; the gradient flows to the logits.

    Args:
        logits_TE: fp32, contiguous; kept_T fp32, 1 for tokens that count and 0 for padding.
    """
    check_axes("logits_TE", logits_TE, "(T, E)")
    T, E = logits_TE.shape
    check_shape("share_E", share_E, (E,))
    check_shape("kept_T", kept_T, (T,))
    check_contiguous(logits_TE=logits_TE, kept_T=kept_T, share_E=share_E)
    if choose("route.losses", implementation, _serves(logits_TE)) == "reference":
        return reference.losses(logits_TE, share_E, kept_T, num_tokens)
    check_float("logits_TE", logits_TE, (torch.float32,))
    check_float("kept_T", kept_T, (torch.float32,))
    probs_E, z = _Sums.apply(logits_TE, kept_T)
    return logits_TE.shape[1] * (share_E * probs_E).sum() / num_tokens, z / num_tokens
