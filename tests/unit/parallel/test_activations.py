"""The arithmetic of kept activations against the tensors that autograd really keeps (CPU, counted by storage)."""

from __future__ import annotations

import pytest
import torch

from megatron_medgpt.config.presets import TINY, TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.config.schema import ModelConfig, ProjectorConfig
from megatron_medgpt.parallel import groups as world
from megatron_medgpt.parallel.activations import (
    MicroBatch,
    head_bytes,
    layer_bytes,
    layer_input_bytes,
    vision_bytes,
)
from tests.kept_tensors import LENGTH, SHAPE, TARGETS, Kept, kept_by_chunk


@pytest.fixture(scope="module")
def process_group():
    started = world.start(timeout_s=60, kind="cpu")
    yield started
    world.stop()


@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_a_layer_keeps_what_the_arithmetic_says(process_group, bytes_per_value):
    """Two and four layers, so that only layers differ (the masks of the two windows are shared by all layers)."""
    measured = (kept_by_chunk(4, bytes_per_value, "none") - kept_by_chunk(2, bytes_per_value, "none")) / 2
    batch = MicroBatch(tokens=LENGTH, targets=TARGETS, images=0)
    computed = layer_bytes(SHAPE, batch, bytes_per_value=bytes_per_value, tensor=1, attention="fused_cpu")
    assert computed == pytest.approx(measured, rel=0.02)


def test_a_layer_that_recomputes_keeps_its_input_only(process_group):
    measured = (kept_by_chunk(4, 2, "layer") - kept_by_chunk(2, 2, "layer")) / 2
    batch = MicroBatch(tokens=LENGTH, targets=TARGETS, images=0)
    assert layer_input_bytes(SHAPE, batch, bytes_per_value=2, tensor=1) == measured


def test_head_and_loss_keep_rows_with_a_target_only(process_group):
    measured = kept_by_chunk(2, 2, "layer") - 2 * LENGTH * SHAPE.hidden_size * 2 - LENGTH * 8  # the token ids
    batch = MicroBatch(tokens=LENGTH, targets=TARGETS, images=0)
    assert head_bytes(SHAPE, batch, bytes_per_value=2, tensor=1) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("vision", [TINY_CLIP, TINY_SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("projector", [ProjectorConfig(), ProjectorConfig(pixel_shuffle=2, norm=True)])
def test_encoder_and_projector_keep_what_the_arithmetic_says(vision, frozen, projector):
    from megatron_medgpt.model.projector import Projector
    from megatron_medgpt.model.vision import build_vision

    model = ModelConfig(language=TINY, vision=vision, projector=projector)
    encoder, module = build_vision(vision, torch.bfloat16, seed=0), Projector(model, torch.bfloat16, seed=1)
    encoder.requires_grad_(not frozen)
    kept = Kept(encoder, module)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        module(encoder(torch.randn(4, 3, vision.image_size_px, vision.image_size_px)))
    batch = MicroBatch(tokens=0, targets=0, images=4)
    assert vision_bytes(model, batch, bytes_per_value=2, tensor=1, frozen=frozen) == pytest.approx(
        kept.num_bytes, rel=0.005
    )


def test_the_dense_formula_misses_most_of_a_mixture_of_experts():
    """Megatron-LM's estimator counts (18 + 4 F / H) S B H bytes a layer, whatever the experts: for GPT-oss 20B that is
    less than half of what a layer keeps."""
    from megatron_medgpt.config.presets import GPT_OSS_20B as c

    batch = MicroBatch(tokens=8192, targets=0, images=0)
    dense = (18 + 4 * c.expert_hidden_size / c.hidden_size) * batch.tokens * c.hidden_size
    assert dense < 0.5 * layer_bytes(c, batch, bytes_per_value=2, tensor=1)
