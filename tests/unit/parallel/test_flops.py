from __future__ import annotations

import pytest

from megatron_medgpt.config.presets import CLIP_L_14_336, GPT_OSS_20B, GPT_OSS_120B
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.parallel.flops import language_flops_per_token, training_flops, vision_flops_per_image


@pytest.mark.parametrize(("config", "published"), [(GPT_OSS_20B, 22.93e9), (GPT_OSS_120B, 32.71e9)])
def test_training_flops_per_token_are_those_derived_for_the_public_models(config, published):
    """Forward and backward at 4,096 tokens: 22.93 and 32.71 GFLOP per token, derived independently."""
    assert 3 * language_flops_per_token(config, 4096) == pytest.approx(published, rel=2e-3)


def test_a_clip_l_image_costs_about_twice_its_parameters_per_patch():
    assert vision_flops_per_image(CLIP_L_14_336) == pytest.approx(2 * 304e6 * 577, rel=0.12)


def test_attention_counts_every_pair_of_a_short_document_once():
    short = language_flops_per_token(GPT_OSS_20B, 4) - language_flops_per_token(GPT_OSS_20B, 1)
    pairs_per_token = (1 + 2 + 3 + 4) / 4 - 1
    assert short == pytest.approx(24 * 4 * 64 * 64 * pairs_per_token)


def test_what_is_frozen_and_what_is_no_target_costs_less():
    """Per token of the 20B: head 1.158 GFLOP a pass, experts 4.777, all 7.644."""
    model = ModelConfig(language=GPT_OSS_20B)

    def gflop(**changes) -> float:
        return training_flops(model, num_tokens=1, num_images=0, document_length=4096, **changes) / 1e9

    assert gflop() == pytest.approx(3 * 7.644, rel=2e-3)
    assert gflop() - gflop(frozen=("experts",)) == pytest.approx(4.777, rel=2e-3)
    assert gflop(frozen=("language", "experts")) == pytest.approx(2 * 7.644, rel=2e-3)
    assert gflop() - gflop(target_share=0.1) == pytest.approx(3 * 0.9 * 1.158, rel=2e-3)
