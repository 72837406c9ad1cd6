"""CLIP and SigLIP against transformers' models with the same weights.

Tolerance: the issue asks for 1e-4 in fp32. Both sides are also run in fp64, where what is left is rounding of that
type, so a real difference between the two functions (a GELU by erf for one by tanh is 5e-4) cannot hide in fp32 noise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_vision import as_our_vision, published_encoder
from torch.nn import functional

from megatron_medgpt.config.presets import CLIP_L_14_336, MEDSIGLIP_448, TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.config.schema import VisionConfig
from megatron_medgpt.model.vision import VisionEncoder, build_vision

FP64_RELATIVE = 1e-12
"""Some thousand additions in sequence at 1.1e-16 each, with margin for cancellation: measured 2e-15 to 2e-14."""


def _pair(config: VisionConfig, dtype: torch.dtype) -> tuple[torch.nn.Module, VisionEncoder]:
    published = published_encoder(config, dtype, seed=3)
    ours = build_vision(config, dtype)
    ours.load_state_dict(as_our_vision(published.state_dict(), config))
    return published, ours


def _published_features(published: torch.nn.Module, config: VisionConfig, pixels: torch.Tensor) -> torch.Tensor:
    out = published(
        pixel_values=pixels,
        output_hidden_states=True,
        interpolate_pos_encoding=config.image_size_px != config.pretrained_size_px,
    )
    features = out.hidden_states[config.feature_layer]
    return features[:, 1:] if config.kind == "clip" else features


def _pixels(config: VisionConfig, num_images: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    size = config.image_size_px
    return torch.randn(num_images, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def _scale_beside(gradients: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Size of the gradient of the weight beside a bias: what rounding in the bias's gradient is measured by."""
    return gradients[name.replace("bias", "weight")].norm()


SMALL = {
    "clip": TINY_CLIP,
    "clip-last-layer": replace(TINY_CLIP, feature_layer=-1),
    "clip-first-layer": replace(TINY_CLIP, feature_layer=-4),
    "clip-larger": replace(TINY_CLIP, image_size_px=98),
    "clip-smaller-uneven": replace(TINY_CLIP, image_size_px=45),
    "siglip": TINY_SIGLIP,
    "siglip-layer-2": replace(TINY_SIGLIP, feature_layer=-2),
    "siglip-larger": replace(TINY_SIGLIP, image_size_px=84),
}
WIDE = {
    "clip-vit-l-3-layers": replace(CLIP_L_14_336, num_layers=3),
    "siglip-so400m-2-layers-at-224": replace(MEDSIGLIP_448, num_layers=2, image_size_px=224),
}


@pytest.mark.parametrize("config", [*SMALL.values(), *WIDE.values()], ids=[*SMALL, *WIDE])
def test_features_equal_the_published_models_in_fp32(config):
    published, ours = _pair(config, torch.float32)
    pixels = _pixels(config, 2, torch.float32)
    with torch.no_grad():
        expected, features = _published_features(published, config, pixels), ours(pixels)
    assert features.shape == (2, config.patches_per_side**2, config.hidden_size)
    assert (features - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_features_and_every_gradient_equal_the_published_models_in_fp64(config):
    published, ours = _pair(config, torch.float64)
    pixels = _pixels(config, 3, torch.float64)
    expected, features = _published_features(published, config, pixels), ours(pixels)
    assert (features - expected).norm() <= FP64_RELATIVE * expected.norm()
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (expected * probe).sum().backward()
    (features * probe).sum().backward()
    # Layers behind the feature layer, the post-norm and the pooling head have no gradient on either side.
    published_gradients = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
    expected_gradients = as_our_vision(published_gradients, config)
    assert set(expected_gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected_gradient = expected_gradients[name]
        error = (parameter.grad - expected_gradient).norm()
        if name.endswith("qkv.bias"):
            # A constant added to every key changes no softmax: the key bias's true gradient is 0, and both sides
            # hold rounding there. The third of the queries and that of the values carry the norm.
            assert error <= FP64_RELATIVE * _scale_beside(expected_gradients, name)
        else:
            assert error <= FP64_RELATIVE * expected_gradient.norm(), name


def test_a_causal_encoder_is_caught():
    config = TINY_CLIP
    published, ours = _pair(config, torch.float32)
    pixels = _pixels(config, 2, torch.float32)
    with torch.no_grad():
        expected = _published_features(published, config, pixels)
        plain = functional.scaled_dot_product_attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: plain(q, k, v, is_causal=True)
            )
            causal = ours(pixels)
    assert (causal - expected).abs().max() > 0.1


def test_bf16_features_are_as_near_to_fp64_as_the_published_model_in_bf16():
    for config in (TINY_CLIP, TINY_SIGLIP):
        published, ours = _pair(config, torch.float64)
        pixels = _pixels(config, 4, torch.float64)
        with torch.no_grad():
            exact = _published_features(published, config, pixels)
            theirs = _published_features(published.bfloat16(), config, pixels.bfloat16()).double()
            mine = ours.bfloat16()(pixels.float()).double()
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm()
