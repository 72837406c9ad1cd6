"""The vision encoder on its own: shapes, empty batches, freezing, recompute, initialisation, marks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_medgpt.config.presets import TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.model.vision import build_vision, num_layers_to_feature

BOTH = pytest.mark.parametrize("config", [TINY_CLIP, TINY_SIGLIP], ids=["clip", "siglip"])


def _pixels(num_images: int, size: int = 56) -> torch.Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_features_have_one_row_per_patch_and_the_dtype_of_the_weights(config, dtype):
    features = build_vision(config, dtype)(_pixels(3))
    assert features.shape == (3, 16, 48)
    assert features.dtype == dtype


@pytest.mark.parametrize(("feature_layer", "built", "unused"), [(-1, 3, 0), (-2, 2, 1), (-4, 0, 3)])
def test_layers_behind_the_feature_layer_are_not_built(feature_layer, built, unused):
    config = replace(TINY_CLIP, feature_layer=feature_layer)
    encoder = build_vision(config)
    assert num_layers_to_feature(config) == len(encoder.layers) == built
    assert encoder.num_layers_unused == unused
    encoder(_pixels(1)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@BOTH
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero(config):
    config = replace(config, image_size_px=70)  # with interpolation
    encoder = build_vision(config)
    features = encoder(_pixels(0, 70))
    assert features.shape == (0, 25, 48)
    features.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


@BOTH
def test_images_do_not_see_each_other(config):
    encoder = build_vision(config, torch.float64)
    pixels = _pixels(3)
    torch.testing.assert_close(encoder(pixels)[1:2], encoder(pixels[1:2]), rtol=1e-12, atol=1e-12)


@BOTH
def test_a_frozen_encoder_records_no_graph(config):
    encoder = build_vision(config).requires_grad_(False)
    assert encoder(_pixels(2)).grad_fn is None


@BOTH
def test_recompute_gives_the_same_features_and_gradients(config):
    plain, recomputed = build_vision(config), build_vision(config, recompute=True)
    pixels = _pixels(2)
    outputs = [encoder(pixels) for encoder in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_initial_weights_depend_on_the_seed_and_not_on_the_global_random_state():
    torch.manual_seed(1)
    first = build_vision(TINY_CLIP, seed=4)
    torch.manual_seed(2)
    second, other = build_vision(TINY_CLIP, seed=4), build_vision(TINY_CLIP, seed=5)
    for (name, p), q, r in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        if p.ndim > 1:
            assert not torch.equal(p, r), name


@BOTH
def test_every_parameter_is_initialised(config):
    """Parameters start without storage: one that is left out would hold whatever the memory held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t, **kw: torch.full_like(t, float("nan"), **kw))
        encoder = build_vision(config)
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_drawing_the_weights_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    build_vision(TINY_SIGLIP)
    assert torch.equal(before, torch.get_rng_state())


@BOTH
def test_parameters_are_marked_for_the_sum_over_the_tensor_group(config):
    assert all(parameter.sequence_parallel for parameter in build_vision(config).parameters())


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 70, 70\).*\(3, 56, 56\)"):
        build_vision(TINY_CLIP)(_pixels(1, 70))


def test_a_sharded_state_without_its_tensor_group_is_refused():
    with pytest.raises(ValueError, match="tp_group"):
        build_vision(TINY_CLIP).sharded_state_dict("vision.", (), {"dp_cp_group": object()})
