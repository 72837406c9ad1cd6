"""The arithmetic of kept activations against the tensors that autograd really keeps (CPU, counted by storage)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_medgpt.config.presets import TINY, TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig, ProjectorConfig
from megatron_medgpt.parallel import groups as world
from megatron_medgpt.parallel.activations import (
    MicroBatch,
    head_bytes,
    layer_bytes,
    layer_input_bytes,
    vision_bytes,
)
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import IGNORE_INDEX, MedBatch

LENGTH, TARGETS = 256, 64
SHAPE = replace(TINY, hidden_size=96, expert_hidden_size=160)
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Kept:
    """Adds up the storages that autograd saves, parameters left out."""

    def __init__(self, *modules: torch.nn.Module):
        self._parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@pytest.fixture(scope="module")
def process_group():
    started = world.start(timeout_s=60, kind="cpu")
    yield started
    world.stop()


def kept_by_chunk(num_layers: int, bytes_per_value: int, recompute: str) -> int:
    from megatron_medgpt.model.build import build_model

    model = ModelConfig(language=replace(SHAPE, num_layers=num_layers), vision=TINY_CLIP)
    layout = make_layout(ParallelConfig(), model, 1)
    world.destroy_groups()
    chunk = build_model(
        model, layout=layout, groups=world.build_groups(layout), dtype=DTYPES[bytes_per_value], recompute=recompute
    )[0].train()
    labels = torch.full((1, LENGTH), IGNORE_INDEX)
    labels[0, :TARGETS] = 5
    batch = MedBatch(
        token_ids_BS=torch.randint(0, SHAPE.vocab_size, (1, LENGTH)), label_ids_BS=labels,
        position_ids_BS=torch.arange(LENGTH)[None], document_ids_BS=torch.zeros(1, LENGTH, dtype=torch.int32),
        modality_ids_BS=torch.zeros(1, LENGTH, dtype=torch.int8), num_targets=TARGETS, num_tokens=LENGTH,
    )  # fmt: skip
    kept = Kept(chunk)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        chunk(batch)
    return kept.num_bytes


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
