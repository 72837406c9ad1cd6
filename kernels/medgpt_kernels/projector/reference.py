"""The projector and its scatter in plain torch; gradients by autograd.

Pixel shuffle as transformers' InternVL (``models/internvl/modeling_internvl.py``): an image token holds the channels of
its ``fold`` x ``fold`` patches, row by row. GELU by erf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def first_patches(num_images: int, side: int, fold: int) -> Tensor:
    """(I * tokens,) int32: the top left patch of every image token, counted over all images."""
    step = torch.arange(0, side, fold)
    grid = (step[:, None] * side + step[None, :]).flatten()
    return (torch.arange(num_images)[:, None] * side * side + grid).flatten().to(torch.int32)


def shuffled_rows(features_IPF: Tensor, patch_N: Tensor, side: int, fold: int) -> Tensor:
    """(N, fold * fold * F): the image tokens whose top left patches are given."""
    offsets = (torch.arange(fold)[:, None] * side + torch.arange(fold)[None, :]).flatten().to(patch_N.device)
    rows = features_IPF.flatten(0, 1)[(patch_N.long()[:, None] + offsets).flatten()]
    return rows.view(patch_N.numel(), fold * fold * features_IPF.shape[-1])


def project_into(
    text_SBH: Tensor, features_IPF: Tensor, patch_N: Tensor, place_N: Tensor, weight_1: Tensor, bias_1: Tensor,
    weight_2: Tensor, bias_2: Tensor, *, side: int, fold: int = 1, norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``text_SBH`` with projected image token n at position ``place_N[n]`` of its first two axes flattened."""
    rows = shuffled_rows(features_IPF, patch_N, side, fold)
    if norm is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], *norm, eps)
    rows_NH = F.linear(F.gelu(F.linear(rows, weight_1, bias_1)), weight_2, bias_2)
    flat = text_SBH.flatten(0, 1)
    keep = torch.ones(flat.shape[0], 1, dtype=torch.bool, device=flat.device)
    keep[place_N.long()] = False
    return torch.where(keep, flat, torch.zeros_like(flat)).index_add(0, place_N.long(), rows_NH).view_as(text_SBH)
