"""The router written out: logits, top-k, softmax over the chosen, and the index of rows, in plain torch.

Source: openai/gpt-oss ``gpt_oss/torch/model.py`` (``MLPBlock.forward``: top-k of the logits, then softmax). Equal
logits go to the lower expert. Auxiliary losses: Fedus et al. 2021 (arXiv 2101.03961) equation 4, Zoph et al. 2022
(arXiv 2202.08906) equation 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    x = x_TH.to(wide(x_TH.dtype))
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_H).to(x_TH.dtype)


def logits(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> Tensor:
    """(T, E), at least fp32."""
    dtype = wide(x_TH.dtype)
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype), bias_E.to(dtype))


def top_k(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights (T, K) that add up to 1 and experts (T, K) int32, the largest logit first."""
    values, experts = logits_TE.sort(dim=-1, descending=True, stable=True)
    return torch.softmax(values[:, :k], dim=-1), experts[:, :k].to(torch.int32)


def num_tiles(num_rows: int, num_experts: int, tile: int) -> int:
    """Tiles that hold ``num_rows`` rows however they fall on the experts, each expert's run padded to whole tiles."""
    return (num_rows + min(num_experts, num_rows) * (tile - 1)) // tile


def index(experts_TK: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, within an expert by token, each expert's run padded to a multiple of ``tile``.

    Returns:
        row_entry (R,) int32: ``token * K + slot`` of every row, -1 on padding; token_row (T, K) int32: its inverse;
        tile_expert (R / tile,) int32: the expert of each tile of rows, -1 where no rows are left; counts (E,) int32.
    """
    T, K = experts_TK.shape
    tiles = num_tiles(T * K, num_experts, tile)
    flat = experts_TK.flatten().long()
    counts = torch.bincount(flat, minlength=num_experts)
    padded = (counts + tile - 1) // tile * tile
    first_row = padded.cumsum(0) - padded
    entry = torch.argsort(flat, stable=True)  # by expert, then by token, then by slot
    expert = flat[entry]
    row = torch.arange(T * K) - (counts.cumsum(0) - counts)[expert] + first_row[expert]
    row_entry = torch.full((tiles * tile,), -1, dtype=torch.int32)
    row_entry[row] = entry.to(torch.int32)
    token_row = torch.zeros(T * K, dtype=torch.int32)
    token_row[entry] = row.to(torch.int32)
    tile_expert = torch.full((tiles,), -1, dtype=torch.int32)
    used = torch.repeat_interleave(torch.arange(num_experts, dtype=torch.int32), padded // tile)
    tile_expert[: used.numel()] = used
    return row_entry, token_row.view(T, K), tile_expert, counts.to(torch.int32)


def index_sorted(counts_E: Tensor, num_rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The index of rows that are sorted by expert already: (row_entry, token_row (M, 1), tile_expert) as above."""
    experts = torch.repeat_interleave(torch.arange(counts_E.numel()), counts_E.long().cpu())
    row_entry, token_row, tile_expert, _ = index(experts[:num_rows, None], counts_E.numel(), tile)
    return row_entry, token_row, tile_expert


def losses(logits_TE: Tensor, share_E: Tensor, kept_T: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Balance loss ``E * sum share * mean probability`` and z loss ``mean logsumexp^2`` over the kept tokens.

    Args:
        share_E: fraction of the choices that fell on each expert, over all ranks that share the tokens.
        num_tokens: kept tokens over the same ranks.
    """
    probs_E = (torch.softmax(logits_TE, dim=-1) * kept_T[:, None]).sum(0) / num_tokens
    z = (torch.logsumexp(logits_TE, dim=-1).square() * kept_T).sum() / num_tokens
    return logits_TE.shape[1] * (share_E * probs_E).sum(), z
