"""Shapes shared by tests and benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.route.cases import zipf_experts

SMALL = ((37, 192, 160, 5, 2),)
"""(T, H, F, E, K): no size is a multiple of a block, and every axis spans more than one."""
BENCH = {"20b": (2880, 2880, 32, 4), "120b": (2880, 2880, 128, 4), "120b-ep8": (2880, 2880, 16, 4)}
"""(H, F, E, K) of one rank."""
BENCH_TOKENS = (8192, 16384)


def inputs(
    T: int, H: int, F: int, E: int, K: int, *, dtype: torch.dtype, seed: int, spread: float = 4.0, device="cpu"
) -> dict[str, Tensor]:
    """Tokens, router weights and experts.

    Args:
        spread: standard deviation of the pre-activation, less its bias. At 4 a limit of 7 clamps values of each kind;
            at 1 none, which comparisons in low precision need: the gradient jumps at the clamp, and a value within
            rounding of it may fall on either side.
    """
    # On the device: a CPU takes seconds for the 796 million weights of a 20B layer, half a minute for a 120B's.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    weights = torch.softmax(torch.randn(T, K, generator=generator, device=device), -1)
    return {
        "x_TH": normal(T, H, scale=1.0),
        "weights_TK": weights.double() if dtype == torch.float64 else weights,
        "gate_up_EHG": normal(E, H, 2 * F, scale=spread * H**-0.5),
        "gate_up_bias_EG": normal(E, 2 * F, scale=1.0),
        "down_EFH": normal(E, F, H, scale=F**-0.5),
        "down_bias_EH": normal(E, H, scale=1.0),
    }


def choices(name: str, T: int, E: int, K: int) -> Tensor:
    """(T, K) int32."""
    if name == "zipf":
        return zipf_experts(T, E, K, seed=0)
    if name == "some experts empty":
        return zipf_experts(T, max(K, E // 2), K, seed=1)
    if name == "one takes everything":
        return torch.full((T, 1), E - 2, dtype=torch.int32)
    raise ValueError(f"choices {name!r}")
