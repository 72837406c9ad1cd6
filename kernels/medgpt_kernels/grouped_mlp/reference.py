"""Experts one after the other, gradients by autograd; weights in GPT-oss's layout.

Source: transformers ``models/gpt_oss/modeling_gpt_oss.py`` (``GptOssExperts``): ``gate_up_proj`` (E, H, 2F) with
interleaved columns, ``gate_up_proj_bias`` (E, 2F), ``down_proj`` (E, F, H), ``down_proj_bias`` (E, H).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medgpt_kernels.clamped_swiglu.reference import clamped_swiglu


def grouped_mlp(
    rows_MH: Tensor, counts: Sequence[int], gate_up_EHG: Tensor, gate_up_bias_EG: Tensor, down_EFH: Tensor,
    down_bias_EH: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    """Rows sorted by expert, ``counts[e]`` of them for expert e, to (M, H)."""
    outputs = []
    for expert, rows in enumerate(rows_MH.split(list(counts))):
        inner = clamped_swiglu(rows @ gate_up_EHG[expert] + gate_up_bias_EG[expert], limit)
        outputs.append(inner @ down_EFH[expert] + down_bias_EH[expert])
    return torch.cat(outputs)
