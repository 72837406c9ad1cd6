from __future__ import annotations

import pytest

from megatron_medgpt.config.presets import CLIP_L_14_336, GPT_OSS_20B, GPT_OSS_120B, TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig, ProjectorConfig
from megatron_medgpt.model.projector import Projector
from megatron_medgpt.parallel.memory import model_parameters, rank_parameters
from megatron_medgpt.parallel.plan import make_layout


@pytest.mark.parametrize(("language", "billions"), [(GPT_OSS_20B, 20.91), (GPT_OSS_120B, 116.83)])
def test_language_models_have_the_published_number_of_parameters(language, billions):
    """Model card of gpt-oss: 20.91B and 116.83B, embedding and head included."""
    count = model_parameters(ModelConfig(language=language))
    assert (count.language + count.experts + count.router) / 1e9 == pytest.approx(billions, abs=0.006)


def test_clip_tower_to_layer_minus_two_has_its_known_size():
    """ViT-L/14-336 has 303.5M parameters with its last layer (12.6M) and post-norm; layer -2 needs neither."""
    count = model_parameters(ModelConfig(vision=CLIP_L_14_336)).encoder
    assert count == pytest.approx(303.5e6 - 12.6e6, rel=1e-3)


def test_projector_is_counted_as_it_is_built():
    projector = ProjectorConfig(pixel_shuffle=2, norm=True, hidden_size=80)
    model = ModelConfig(language=TINY, vision=TINY_CLIP, projector=projector)
    built = sum(parameter.numel() for parameter in Projector(model).parameters())
    assert model_parameters(model).projector == built


def test_ranks_of_a_pipeline_and_expert_layout_add_up_to_the_whole_model():
    model = ModelConfig(language=TINY)
    layout = make_layout(ParallelConfig(pipeline=2, expert=2), model, 4)
    whole = model_parameters(model)
    parts = [rank_parameters(model, layout, pipeline_rank=r) for r in range(2)]
    assert sum(p.experts for p in parts) * layout.expert == whole.experts
    for module in ("encoder", "projector", "language", "router"):
        assert sum(getattr(p, module) for p in parts) == getattr(whole, module)
