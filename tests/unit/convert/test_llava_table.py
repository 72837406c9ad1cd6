"""The tables of the published model: both ways return the input bit for bit, and nothing is left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.presets import TINY, TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.config.schema import ModelConfig, ProjectorConfig
from megatron_medgpt.convert.layout import grouped_by_query_group
from megatron_medgpt.convert.llava import canonical_name, llava_table, published_config

LANGUAGE = replace(TINY, num_layers=2)
MODELS = {
    "clip": ModelConfig(language=LANGUAGE, vision=TINY_CLIP),
    "siglip": ModelConfig(language=LANGUAGE, vision=TINY_SIGLIP),
    "clip-last-layer": ModelConfig(language=LANGUAGE, vision=replace(TINY_CLIP, feature_layer=-1)),
}


def _published(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(published_config(config, 500))
    return {canonical_name(name): torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_there_and_back_returns_the_published_tensors_bit_for_bit(config):
    published = _published(config)
    ours, unused = llava_table(config).to_ours(published)
    back = llava_table(config).to_published(ours)
    assert set(back) | set(unused) == set(published)
    assert not set(back) & set(unused)
    for name, tensor in back.items():
        assert torch.equal(tensor, published[name]), name


def test_only_what_lies_behind_the_feature_layer_is_unused():
    config = MODELS["clip"]
    _, unused = llava_table(config).to_ours(_published(config))
    vision = "vision_tower.vision_model."
    assert unused
    assert all(name.startswith((f"{vision}encoder.layers.2.", f"{vision}post_layernorm.")) for name in unused)
    assert sum(name.startswith(f"{vision}encoder.layers.2.") for name in unused) == 16


def test_query_heads_of_a_group_stand_before_its_key_and_value():
    config = replace(TINY, num_attention_heads=4, num_query_groups=2, head_dim=2)
    query = torch.tensor([[0.0], [0.1], [1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
    key, value = query[:4] + 10, query[:4] + 20
    fused = grouped_by_query_group(config).to_ours([query, key, value])[:, 0].tolist()
    expected = [0.0, 0.1, 1.0, 1.1, 10.0, 10.1, 20.0, 20.1, 2.0, 2.1, 3.0, 3.1, 11.0, 11.1, 21.0, 21.1]
    assert fused == pytest.approx(expected)


def test_a_tensor_that_no_row_names_is_refused_both_ways():
    config = MODELS["clip"]
    published = _published(config)
    table = llava_table(config)
    ours, _ = table.to_ours(published)
    with pytest.raises(WorkError, match=r"holds 1 tensors.*vision_tower\.vision_model\.encoder\.layers\.9\.extra"):
        table.to_ours({**published, "vision_tower.vision_model.encoder.layers.9.extra": torch.zeros(1)})
    with pytest.raises(WorkError, match=r"holds 1 tensors.*projector\.linear_3\.weight"):
        table.to_published({**ours, "projector.linear_3.weight": torch.zeros(1)})


def test_a_missing_tensor_is_refused_both_ways():
    config = MODELS["siglip"]
    published = _published(config)
    table = llava_table(config)
    ours, _ = table.to_ours(published)
    sinks = "language_model.model.layers.1.self_attn.sinks"
    with pytest.raises(WorkError, match="lacks 1 of"):
        table.to_ours({name: tensor for name, tensor in published.items() if name != sinks})
    del ours["projector.linear_1.bias"]
    with pytest.raises(WorkError, match=r"lacks 1 of.*projector\.linear_1\.bias"):
        table.to_published(ours)


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("model.language_model.layers.0.mlp.router.bias", "language_model.model.layers.0.mlp.router.bias"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
    ],
)
def test_every_spelling_becomes_the_canonical_name(spelling, canonical):
    assert canonical_name(spelling) == canonical


@pytest.mark.parametrize(
    "projector", [ProjectorConfig(pixel_shuffle=2), ProjectorConfig(norm=True), ProjectorConfig(hidden_size=96)]
)
def test_a_projector_that_llava_does_not_have_is_refused(projector):
    config = ModelConfig(language=LANGUAGE, vision=TINY_CLIP, projector=projector)
    with pytest.raises(UsageError, match=r"model\.projector"):
        published_config(config, 500)
