"""Rotary positions with YaRN, as GPT-oss uses them: positions restart with every document of a row.

Source: Peng et al. 2023 (arXiv 2309.00071) as in transformers ``modeling_rope_utils.py`` (``_compute_yarn_parameters``
without truncation) and openai/gpt-oss ``gpt_oss/torch/model.py``. Angles are float32 whatever the model's dtype, as
there: at position 131072 the last bits of an angle matter, and they must be the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_medgpt.config.schema import LanguageConfig


def inverse_frequencies(config: LanguageConfig) -> Tensor:
    """Radians per position of every pair of dims, (D / 2,) float32."""
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32)
    wavelengths = config.rope_base ** (dims / config.head_dim)
    extrapolated, interpolated = 1.0 / wavelengths, 1.0 / (config.yarn_factor * wavelengths)

    def dim_that_turns(num_turns: float) -> float:
        """The pair of dims that makes this many turns over the original length."""
        length = config.yarn_original_length
        return config.head_dim * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low = max(dim_that_turns(config.yarn_beta_fast), 0)
    high = min(dim_that_turns(config.yarn_beta_slow), config.head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return interpolated * ramp + extrapolated * (1 - ramp)


def concentration(config: LanguageConfig) -> float:
    """YaRN's factor on cosine and sine, which sharpens the softmax for longer contexts."""
    return 1.0 if config.yarn_factor <= 1 else 0.1 * math.log(config.yarn_factor) + 1.0


def cosine_sine(position_ids_BS: Tensor, inverse_frequencies: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of every position, (2, B, S, 1, D / 2) in ``dtype``."""
    angles = position_ids_BS.to(torch.float32)[:, :, None, None] * inverse_frequencies
    return torch.stack([angles.cos() * factor, angles.sin() * factor]).to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, cos_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin)
        return _turn(heads, cos_sin[0], cos_sin[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cos_sin,) = ctx.saved_tensors
        return _turn(grad, cos_sin[0], -cos_sin[1]), None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned


def rotate(heads_BSAD: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn the pairs (d, d + D / 2) of every head by the angles of its position.

    Args:
        heads_BSAD: queries or keys, (B, S, A, D).
        cos_sin: from ``cosine_sine``.
    """
    if not torch.is_grad_enabled():
        return _turn(heads_BSAD, cos_sin[0], cos_sin[1])
    return _Rotate.apply(heads_BSAD, cos_sin)
