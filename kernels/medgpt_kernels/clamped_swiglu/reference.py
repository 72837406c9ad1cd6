"""GPT-oss's clamped SwiGLU, every step written out (openai/gpt-oss ``gpt_oss/torch/model.py``, ``swiglu``)."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 1.702


def clamped_swiglu(gate_up_MG: Tensor, limit: float) -> Tensor:
    """(M, 2F) with columns g0 u0 g1 u1 ... to (M, F): ``(up + 1) * gate * sigmoid(1.702 gate)``.

    The gate is clamped from above only, up to both sides. Gradients by autograd.
    """
    gate_MF = gate_up_MG[:, 0::2].clamp(max=limit)
    up_MF = gate_up_MG[:, 1::2].clamp(-limit, limit)
    return (up_MF + 1) * gate_MF * torch.sigmoid(ALPHA * gate_MF)
