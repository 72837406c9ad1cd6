"""Shapes shared by tests and benchmark, and values that reach every rounding decision."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = ((1, 128), (7, 320), (33, 64), (5, 2880))
"""(M, K): one group, a half tail, a single short group, GPT-oss's width."""
TILES = ((1, 128, 128), (2, 130, 192), (3, 40, 320))
"""(E, R, C)."""
PACKED = ((1, 1, 32), (2, 5, 96), (2, 130, 192))
"""(E, N, K)."""
BENCH_ROWS = ((8192, 2880), (16384, 2880))
BENCH_PACKED = ((32, 5760, 2880), (32, 2880, 2880))
"""One layer of GPT-oss 20B."""


def awkward(shape: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values over many magnitudes, with zeros, signed zeros, subnormals, ties and exact powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    flat = x.flatten()
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 6.0, -6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 448.0, 464.0])
    places = torch.randperm(flat.numel(), generator=generator)[: special.numel()]
    flat[places] = special[: places.numel()]
    return flat.view(shape).to(dtype)
