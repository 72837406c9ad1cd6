"""What the router's kernels share: sizes of their blocks, and who serves a call."""

from __future__ import annotations

from torch import Tensor

from medgpt_kernels.dispatch import triton_refusal

BLOCK_T = 64
MAX_EXPERTS = 256
"""A block of tokens holds all its logits in registers."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def is_tile(tile: int) -> bool:
    return tile >= 16 and tile & (tile - 1) == 0


def block_e(num_experts: int) -> int:
    return max(16, 1 << (num_experts - 1).bit_length())


def kernels():
    from medgpt_kernels.route import triton

    return triton


def serves(*tensors: Tensor) -> dict:
    return {"triton": lambda: triton_refusal(*tensors), "reference": lambda: None}
