"""Shapes shared by tests and benchmark, and logits with awkward rows."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTES = ((1, 96, 4, 2), (70, 160, 5, 3), (65, 64, 32, 4))
"""(T, H, E, K): one token, more than one block with nothing round, GPT-oss's choice."""
BENCH = ((8192, 2880, 32, 4), (16384, 2880, 32, 4), (8192, 2880, 128, 4), (16384, 2880, 128, 4))


def inputs(
    T: int, H: int, E: int, *, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    return {"x_TH": normal(T, H), "weight_EH": normal(E, H, scale=H**-0.5), "bias_E": normal(E, scale=0.3)}


def zipf_experts(T: int, E: int, K: int, *, seed: int, exponent: float = 1.0) -> Tensor:
    """(T, K) int32 distinct choices, expert e drawn with probability proportional to (e + 1) ** -exponent."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, E + 1, dtype=torch.float64).pow(-exponent).expand(T, E)
    return torch.multinomial(weights, K, generator=generator).to(torch.int32)


def balanced_experts(T: int, E: int, K: int) -> Tensor:
    """(T, K) int32: every expert is chosen equally often."""
    return ((torch.arange(T)[:, None] * K + torch.arange(K)) % E).to(torch.int32)
