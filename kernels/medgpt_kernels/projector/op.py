"""The projector from the encoder's features to the sequence, with all gradients and no mask arithmetic.

Maps are made on the host from plain integers (which rows go where is known before the step), so nothing waits for the
device. Under sequence parallelism a rank gives only the image tokens and places of its own slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_dtype,
    check_positive,
    check_same_dtype,
    check_shape,
    choose,
    triton_refusal,
)
from medgpt_kernels.mx.op import sum_block, triton_dtype
from medgpt_kernels.projector import reference

LAUNCH = {"num_warps": 8, "num_stages": 3}


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Which image tokens are projected, and where each goes."""

    patch_N: Tensor
    """int32: top left patch of the token, counted over all images."""
    place_N: Tensor
    """int32: row of the sequence, its first two axes flattened; all different."""
    users: Tensor
    """(tokens of all images, U) int32: rows that use a token, -1 for none; U is the largest number of users."""
    side: int
    """Patches along one edge of an image."""
    fold: int
    num_images: int
    num_places: int
    """One more than the largest place: a sequence needs that many rows."""


def placement(
    tokens: Sequence[int], places: Sequence[int], *, num_images: int, side: int, fold: int = 1,
    device: torch.device | str = "cpu",
) -> Placement:  # fmt: skip
    """Maps of a micro-batch.

    Args:
        tokens: image tokens in the order of the rows, counted over all images (after the pixel shuffle).
        places: where each goes.

    Raises:
        ValueError: a token or place is out of range, or a place is named twice.
    """
    check(num_images >= 0, f"num_images={num_images}; it must not be negative")
    check_positive(side=side, fold=fold)
    per_image = (side // fold) ** 2
    check(side % fold == 0, f"fold={fold} does not divide side={side}")
    check(len(tokens) == len(places), f"{len(tokens)} tokens for {len(places)} places")
    check(len(set(places)) == len(places), "places names a position twice")
    check(min(places, default=0) >= 0, f"places holds {min(places, default=0)}; a place must not be negative")
    check(all(0 <= t < num_images * per_image for t in tokens), f"tokens must lie in 0 .. {num_images * per_image - 1}")
    most = max(Counter(tokens).values(), default=1)
    users = torch.full((num_images * per_image, most), -1, dtype=torch.int32)
    taken: Counter = Counter()
    for row, token in enumerate(tokens):
        users[token, taken[token]] = row
        taken[token] += 1
    first = reference.first_patches(num_images, side, fold)
    patch = first[torch.tensor(list(tokens), dtype=torch.long)]
    place = torch.tensor(list(places), dtype=torch.int32)
    return Placement(
        patch.to(device), place.to(device), users.to(device), side, fold, num_images, max(places, default=-1) + 1
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _kernels():
    from medgpt_kernels.projector import triton

    return triton


def _linear(a, a_map, weight, *, at: Placement, out, bias=None, saved=None, inner=None, out_map=None, epilogue="none",
            transposed=False, shuffled=False, width=0) -> None:  # fmt: skip
    """``a @ weight^T`` of a linear layer (OUT, K), or ``a @ weight`` with ``transposed``."""
    OUT, K = weight.shape if not transposed else (weight.shape[1], weight.shape[0])
    stride_k, stride_n = (weight.shape[1], 1) if transposed else (1, weight.shape[1])
    N = at.patch_N.shape[0]
    unused = out
    _kernels().linear_kernel[(_cdiv(N, 128), _cdiv(OUT, 128))](
        a, unused if a_map is None else a_map, weight, unused if bias is None else bias,
        unused if saved is None else saved, out, unused if inner is None else inner,
        unused if out_map is None else out_map, N, K, OUT, width, at.side, stride_k, stride_n, SHUFFLED=shuffled,
        MAPPED=a_map is not None and not shuffled, EPILOGUE=epilogue, SCATTER=out_map is not None, FOLD=at.fold,
        DTYPE=triton_dtype(out.dtype), BLOCK_M=128, BLOCK_N=128, BLOCK_K=sum_block(out.dtype), **LAUNCH,
    )  # fmt: skip


def _linear_grad(d, d_map, x, at: Placement, weight, *, shuffled=False, width=0) -> tuple[Tensor, Tensor]:
    OUT, K = weight.shape
    grad = torch.empty((OUT, K), dtype=weight.dtype, device=weight.device)
    bias = torch.empty((OUT,), dtype=weight.dtype, device=weight.device)
    _kernels().linear_grad_kernel[(_cdiv(OUT, 128), _cdiv(K, 128))](
        d, grad if d_map is None else d_map, x, at.patch_N, grad, bias, at.patch_N.shape[0], OUT, K, width, at.side,
        MAPPED=d_map is not None, SHUFFLED=shuffled, FOLD=at.fold, GRAD_DTYPE=triton_dtype(weight.dtype), BLOCK_M=128,
        BLOCK_N=128, BLOCK_R=sum_block(x.dtype), **LAUNCH,
    )  # fmt: skip
    return grad, bias


def _patch_grad(rows_ND: Tensor, at: Placement, shape: torch.Size) -> Tensor:
    images, patches, width = shape
    grad = torch.empty(shape, dtype=rows_ND.dtype, device=rows_ND.device)
    if grad.numel():
        _kernels().patch_grad_kernel[(_cdiv(images * patches, 32), _cdiv(width, 128))](
            rows_ND, at.users, grad, images * patches, width, at.side, rows_ND.shape[1], FOLD=at.fold,
            USERS=at.users.shape[1], DTYPE=triton_dtype(rows_ND.dtype), BLOCK_P=32, BLOCK_F=128,
        )  # fmt: skip
    return grad


class _Front(torch.autograd.Function):
    """Pixel shuffle and LayerNorm, (N, fold * fold * F)."""

    @staticmethod
    def forward(ctx, features_IPF, weight_D, bias_D, at, eps):
        N, width, D = at.patch_N.shape[0], features_IPF.shape[-1], weight_D.shape[0]
        rows = torch.empty((N, D), dtype=features_IPF.dtype, device=features_IPF.device)
        mean, rstd = (torch.empty((N,), dtype=torch.float32, device=rows.device) for _ in range(2))
        if N:
            _kernels().front_fwd_kernel[(_cdiv(N, 16),)](
                features_IPF, at.patch_N, weight_D, bias_D, rows, mean, rstd, N, width, at.side, D, eps, FOLD=at.fold,
                DTYPE=triton_dtype(rows.dtype), BLOCK_N=16, BLOCK_D=256,
            )  # fmt: skip
        ctx.save_for_backward(features_IPF, weight_D, mean, rstd)
        ctx.at, ctx.bias_dtype = at, bias_D.dtype
        return rows

    @staticmethod
    def backward(ctx, grad_ND):
        features_IPF, weight_D, mean, rstd = ctx.saved_tensors
        at, (N, D) = ctx.at, grad_ND.shape
        rows = torch.empty_like(grad_ND)
        parts = torch.empty((2, _cdiv(N, 16), D), dtype=torch.float32, device=rows.device)
        if N:
            _kernels().front_bwd_kernel[(parts.shape[1],)](
                features_IPF, at.patch_N, weight_D, mean, rstd, grad_ND.contiguous(), rows, parts[0], parts[1], N,
                features_IPF.shape[-1], at.side, D, FOLD=at.fold, DTYPE=triton_dtype(rows.dtype), BLOCK_N=16,
                BLOCK_D=256,
            )  # fmt: skip
        d_weight, d_bias = parts.sum(1)
        d_features = _patch_grad(rows, at, features_IPF.shape) if ctx.needs_input_grad[0] else None
        return d_features, d_weight.to(weight_D.dtype), d_bias.to(ctx.bias_dtype), None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text_SBH, source, weight_1, bias_1, weight_2, bias_2, at, shuffled):
        N, inner = at.patch_N.shape[0], weight_1.shape[0]
        merged = text_SBH.clone()
        u = torch.empty((N, inner), dtype=source.dtype, device=source.device)
        if N:
            g = torch.empty_like(u)
            width = source.shape[-1]
            _linear(source, at.patch_N if shuffled else None, weight_1, at=at, bias=bias_1, saved=u, out=g,
                    epilogue="gelu", shuffled=shuffled, width=width)  # fmt: skip
            _linear(g, None, weight_2, at=at, bias=bias_2, out=merged, out_map=at.place_N, epilogue="bias")
        ctx.save_for_backward(source, weight_1, weight_2, u)
        ctx.at, ctx.shuffled = at, shuffled
        return merged

    @staticmethod
    def backward(ctx, grad_SBH):
        source, weight_1, weight_2, u = ctx.saved_tensors
        at, shuffled = ctx.at, ctx.shuffled
        grad_SBH = grad_SBH.contiguous()
        d_text = None
        if ctx.needs_input_grad[0]:
            d_text = grad_SBH.clone()
            d_text.view(-1, d_text.shape[-1]).index_fill_(0, at.place_N.long(), 0)
        if not u.shape[0]:
            zeros = [torch.zeros_like(w) for w in (weight_1, weight_1[:, 0], weight_2, weight_2[:, 0])]
            return d_text, torch.zeros_like(source), *zeros, None, None
        du, g = torch.empty_like(u), torch.empty_like(u)
        _linear(grad_SBH, at.place_N, weight_2, at=at, saved=u, inner=g, out=du, epilogue="dgelu", transposed=True)
        d_weight_2, d_bias_2 = _linear_grad(grad_SBH, at.place_N, g, at, weight_2)
        width = source.shape[-1]
        d_weight_1, d_bias_1 = _linear_grad(du, None, source, at, weight_1, shuffled=shuffled, width=width)
        d_source = None
        if ctx.needs_input_grad[1]:
            d_rows = torch.empty((u.shape[0], weight_1.shape[1]), dtype=u.dtype, device=u.device)
            _linear(du, None, weight_1, at=at, out=d_rows, transposed=True)
            d_source = _patch_grad(d_rows, at, source.shape) if shuffled else d_rows
        return d_text, d_source, d_weight_1, d_bias_1, d_weight_2, d_bias_2, None, None


def project_into(
    text_SBH: Tensor, features_IPF: Tensor, at: Placement, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor,
    bias_2: Tensor, *, norm: tuple[Tensor, Tensor] | None = None, eps: float = 1e-5, implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """The sequence's embeddings with the projected image tokens at their places.

    Args:
        text_SBH: embeddings of this rank's slice of the sequence, contiguous; not changed.
        features_IPF: of the encoder, contiguous, P = side * side patches an image.
        weight_1, weight_2: of the two linear layers, (Hp, fold * fold * F) and (H, Hp), of the features' dtype.
        norm: weight and bias of a LayerNorm over the shuffled row, in front of the first layer.

    Returns:
        Like ``text_SBH``. Gradients flow to everything; the text's is 0 at the places.

    Raises:
        ValueError: shapes, dtypes, layouts or devices that are not served.
    """
    check_axes("text_SBH", text_SBH, "(S, B, H)")
    check_axes("features_IPF", features_IPF, "(I, P, F)")
    check_axes("weight_1", weight_1, "(Hp, D)")
    images, patches, width = features_IPF.shape
    D = at.fold * at.fold * width
    check(patches == at.side**2, f"features_IPF has {patches} patches an image; the placement is for {at.side**2}")
    check(images == at.num_images, f"features_IPF has {images} images; the placement is for {at.num_images}")
    check(weight_1.shape[1] == D, f"weight_1 has {weight_1.shape[1]} columns; the shuffled rows have {D}")
    check(weight_2.shape == (text_SBH.shape[-1], weight_1.shape[0]), f"weight_2 has shape {tuple(weight_2.shape)}; "
          f"allowed: {(text_SBH.shape[-1], weight_1.shape[0])}")  # fmt: skip
    rows = text_SBH.shape[0] * text_SBH.shape[1]
    check(at.num_places <= rows, f"text_SBH has {rows} rows; the placement writes to row {at.num_places - 1}")
    check_dtype("features_IPF", features_IPF, ANY_FLOAT if implementation == "reference" else FLOATS)
    check_same_dtype("features_IPF", features_IPF=features_IPF, text_SBH=text_SBH, weight_1=weight_1, weight_2=weight_2)
    check_positive(eps=eps)
    learned = {"bias_1": (bias_1, weight_1.shape[0]), "bias_2": (bias_2, weight_2.shape[0])}
    if norm is not None:
        learned |= {"norm[0]": (norm[0], D), "norm[1]": (norm[1], D)}
    for name, (tensor, size) in learned.items():
        check_shape(name, tensor, (size,))
        check_dtype(name, tensor, ANY_FLOAT)
    check_contiguous(
        text_SBH=text_SBH, features_IPF=features_IPF, weight_1=weight_1, weight_2=weight_2, at=at.patch_N,
        **{name: tensor for name, (tensor, _) in learned.items()},
    )  # fmt: skip
    serves = {"triton": lambda: triton_refusal(features_IPF), "reference": lambda: None}
    if choose("projector", implementation, serves) == "reference":
        return reference.project_into(
            text_SBH, features_IPF, at.patch_N, at.place_N, weight_1, bias_1, weight_2, bias_2, side=at.side,
            fold=at.fold, norm=norm, eps=eps,
        )  # fmt: skip
    if norm is None:
        return _Project.apply(text_SBH, features_IPF, weight_1, bias_1, weight_2, bias_2, at, True)
    rows = _Front.apply(features_IPF, *norm, at, eps)
    return _Project.apply(text_SBH, rows, weight_1, bias_1, weight_2, bias_2, at, False)
