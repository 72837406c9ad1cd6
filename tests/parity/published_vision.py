"""Published encoders with random weights, and their tensors under our names."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionModel

from megatron_medgpt.config.schema import VisionConfig
from megatron_medgpt.convert.llava import published_vision_config
from megatron_medgpt.convert.vision import vision_table


def as_our_vision(published: dict[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """Our names to tensors, of a vision encoder's weights or gradients under their published names."""
    return vision_table(config).to_ours(published)[0]


def published_encoder(config: VisionConfig, dtype: torch.dtype, seed: int) -> CLIPVisionModel | SiglipVisionModel:
    """The published encoder with random weights that are not near zero anywhere, biases and norms included."""
    kind = CLIPVisionModel if config.kind == "clip" else SiglipVisionModel
    model = kind(published_vision_config(config)).to(dtype)
    scatter_weights(model, seed)
    return model


def scatter_weights(model: torch.nn.Module, seed: int) -> None:
    """Random biases and norms too: freshly initialised ones are 0 and 1, and would hide a tensor that went astray."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim == 1:
                scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(scale + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
