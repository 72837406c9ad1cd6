"""The projector: which rows it computes, and the channel order of the pixel shuffle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ProjectorConfig
from megatron_medgpt.model.merge import ImageRun
from megatron_medgpt.model.projector import Projector, pixel_shuffle


def _config(fold: int = 1, hidden: int | None = None) -> ModelConfig:
    projector = ProjectorConfig(pixel_shuffle=fold, hidden_size=hidden)
    return ModelConfig(language=TINY, vision=TINY_CLIP, projector=projector)


def _features(num_images: int) -> torch.Tensor:
    return torch.randn(num_images, 16, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_token_of_the_pixel_shuffle_holds_its_four_patches_row_by_row():
    # feature value = 10 * y + x of the patch on a 4 x 4 grid
    features = (10 * torch.arange(4)[:, None] + torch.arange(4)).view(1, 16, 1).double()
    folded = pixel_shuffle(features, 2)
    assert folded.tolist() == [[[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]]


def test_pixel_shuffle_equals_that_of_internvl():
    modeling = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    features = _features(3)
    published = modeling.InternVLModel.pixel_shuffle(None, features.view(3, 4, 4, 48), scale_factor=0.5)
    assert torch.equal(pixel_shuffle(features, 2), published.reshape(3, 4, 192))


def test_projection_is_linear_gelu_by_erf_linear():
    projector = Projector(_config(hidden=80), torch.float64)
    features = _features(2)
    first = features @ projector.linear_1.weight.T + projector.linear_1.bias
    inner = first * 0.5 * (1 + torch.erf(first / 2**0.5))
    expected = inner @ projector.linear_2.weight.T + projector.linear_2.bias
    torch.testing.assert_close(projector(features), expected, rtol=1e-12, atol=1e-12)
    assert projector(features).shape == (2, 16, 64)


def test_shuffled_and_normed_projection_equals_internvls():
    modeling = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    config = ModelConfig(language=TINY, vision=TINY_CLIP, projector=ProjectorConfig(pixel_shuffle=2, norm=True))
    ours = Projector(config, torch.float64)
    torch.nn.init.normal_(ours.norm.weight)
    torch.nn.init.normal_(ours.norm.bias)
    published = modeling.InternVLMultiModalProjector(
        modeling.InternVLConfig(
            vision_config={"model_type": "clip_vision_model", "hidden_size": TINY_CLIP.hidden_size},
            text_config={"model_type": "gpt_oss", "hidden_size": TINY.hidden_size},
        )
    ).double()
    names = {"norm": "layer_norm", "linear_1": "linear_1", "linear_2": "linear_2"}
    state = {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in ours.state_dict().items()}
    published.load_state_dict(state)
    features = _features(2)
    torch.testing.assert_close(ours(features), published(pixel_shuffle(features, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold", [1, 2])
def test_selected_rows_equal_the_rows_of_the_whole_projection(fold):
    projector = Projector(_config(fold), torch.float64)
    features = _features(3)
    whole = projector(features)
    runs = (ImageRun(0, 0, 2, 1, 3), ImageRun(0, 9, 0, 0, 4), ImageRun(1, 0, 2, 0, 2))
    expected = torch.cat([whole[2, 1:4], whole[0, 0:4], whole[2, 0:2]])
    torch.testing.assert_close(projector(features, runs), expected, rtol=1e-12, atol=1e-12)


def test_only_the_selected_rows_are_computed(monkeypatch):
    projector = Projector(_config(), torch.float64)
    seen = []
    gelu = functional.gelu
    monkeypatch.setattr(functional, "gelu", lambda x: (seen.append(tuple(x.shape)), gelu(x))[1])
    projector(_features(3), (ImageRun(0, 0, 1, 4, 5),))
    assert seen == [(5, 64)]


def test_no_rows_still_gives_every_parameter_a_gradient_of_zero():
    projector = Projector(_config(2))
    rows = projector(_features(0).float(), ())
    assert rows.shape == (0, 64)
    rows.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in projector.parameters())


def test_rows_start_at_the_size_of_text_embeddings():
    config = ModelConfig(language=TINY, vision=TINY_CLIP)
    rows = Projector(config, torch.float64)(_features(64))
    assert 0.5 * TINY.init_std < rows.std() < 2 * TINY.init_std
