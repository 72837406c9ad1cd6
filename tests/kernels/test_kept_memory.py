"""What the fused kernels keep for the backward pass, in the model, is what plans and dry runs count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from medgpt_kernels.dispatch import triton_refusal

pytest.importorskip("megatron.core")  # a GPU machine may have only what the kernels need

from medgpt_kernels.cross_entropy import op as cross_entropy

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import (
    BlendConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    ProjectorConfig,
    StageConfig,
)
from megatron_medgpt.model.merge import ImageRun
from megatron_medgpt.model.projector import Projector
from megatron_medgpt.parallel import activations, memory
from megatron_medgpt.parallel import groups as world
from megatron_medgpt.parallel.activations import MicroBatch, head_bytes, layer_bytes, vision_bytes
from megatron_medgpt.parallel.plan import make_layout
from tests.kept_tensors import LENGTH, SHAPE, TARGETS, Kept, kept_by_chunk

# The model of these tests is on the CPU: its kernels need Triton's interpreter.
pytestmark = pytest.mark.skipif(triton_refusal(torch.empty(0)) is not None, reason=str(triton_refusal(torch.empty(0))))
BATCH = MicroBatch(tokens=LENGTH, targets=TARGETS, images=0)


@pytest.fixture(scope="module")
def process_group():
    started = world.start(timeout_s=60, kind="cpu")
    yield started
    world.stop()


@pytest.mark.parametrize(
    "kernels",
    [
        KernelConfig(experts="bf16", expert_schedule="triton"),
        KernelConfig(experts="fp8", expert_schedule="tma", permute="fused"),
        KernelConfig(experts="mxfp4", expert_schedule="tma-4-stages", permute="fused"),
    ],
    ids=lambda kernels: f"{kernels.experts} {kernels.expert_schedule} {kernels.permute}",
)
def test_a_layer_of_fused_experts_keeps_what_the_arithmetic_says(process_group, kernels):
    """By how much less than with the default choice. The schedule is named, so that what runs is the kernel and not its
    reference, which keeps something else."""
    shape = replace(TINY, hidden_size=64, expert_hidden_size=96, num_experts=2, num_experts_per_token=2, num_layers=1)
    measured, computed = [], []
    for chosen in (KernelConfig(), kernels):
        measured.append(kept_by_chunk(1, 2, kernels=chosen, shape=shape))
        computed.append(layer_bytes(shape, BATCH, bytes_per_value=2, tensor=1, attention="fused_cpu", kernels=chosen))
    assert computed[0] - computed[1] == pytest.approx(measured[0] - measured[1], rel=0.02)
    assert measured[1] < measured[0]


def test_the_chunked_loss_keeps_rows_with_a_target_and_no_logits(process_group):
    kernels = KernelConfig(loss="chunked")
    measured = kept_by_chunk(1, 2, "layer", kernels) - LENGTH * SHAPE.hidden_size * 2 - LENGTH * 8  # the token ids
    assert head_bytes(SHAPE, BATCH, bytes_per_value=2, tensor=1, kernels=kernels) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("projector", [ProjectorConfig(), ProjectorConfig(pixel_shuffle=2, norm=True)])
def test_the_fused_projector_keeps_what_the_arithmetic_says(projector):
    model = ModelConfig(language=TINY, vision=TINY_CLIP, projector=projector)
    module = Projector(model, torch.bfloat16, seed=1)
    features = torch.randn(4, TINY_CLIP.patches_per_side**2, TINY_CLIP.hidden_size, dtype=torch.bfloat16)
    count = model.tokens_per_image
    text = torch.randn(4 * count, 1, TINY.hidden_size, dtype=torch.bfloat16)
    kept = Kept(module)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        module.into(text, features, [ImageRun(0, i * count, i, 0, count) for i in range(4)])
    batch = MicroBatch(tokens=0, targets=0, images=4)
    computed = vision_bytes(
        model, batch, bytes_per_value=2, tensor=1, frozen=True, kernels=KernelConfig(projector="fused")
    )
    assert computed == pytest.approx(kept.num_bytes, rel=0.005)


def test_the_arithmetic_knows_the_kernels_sizes():
    from medgpt_kernels.permute.reference import payload_width
    from medgpt_kernels.route.reference import num_tiles

    from megatron_medgpt.parallel.cost import payload_share

    assert activations.LOGITS_CHUNK_BYTES == cross_entropy.CHUNK_BYTES
    for routed, experts in ((0, 4), (3, 8), (1000, 8), (32768, 32)):
        assert activations.padded_rows(routed, experts) == 128 * num_tiles(routed, experts, 128)
    for hidden in (64, 96, 2880):
        assert payload_share(replace(TINY, hidden_size=hidden)) == payload_width(hidden) / (2 * hidden)


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_plan_counts_what_a_pass_makes_of_weights_that_learn(passes):
    """Sizes of what the functions make that a pass calls, on the tiny model's experts."""
    from medgpt_kernels.grouped_mlp import routed

    language = replace(TINY, hidden_size=192, expert_hidden_size=160)
    stacks = [torch.zeros(language.num_experts, *shape, dtype=torch.bfloat16) for shape in ((192, 320), (160, 192))]
    scratch = {"fp8": memory.fp8_scratch_bytes, "mxfp4": memory.mxfp4_scratch_bytes}
    for name, make in (("fp8", routed.to_fp8), ("mxfp4", routed.to_mxfp4)):
        used = 0
        for stack in stacks:
            w = make(stack, passes=passes, implementation="reference")
            found = {t.data_ptr(): t for t in (w.forward, w.backward, w.scales) if t is not None}
            used += sum(t.numel() * t.element_size() for t in found.values())
        assert used == scratch[name](language, 1, 2)[1]


def test_formats_and_packing_change_the_planned_memory_as_the_modules_allocate():
    """At the 20B preset's width, one row of 4096, one rank: bf16 keeps the weights alone; a pass in FP8 or MXFP4 holds
    one layer's weights beside them; packed experts are 17/32 of a byte instead of two."""
    from megatron_medgpt.config.presets import GPT_OSS_20B

    model = ModelConfig(language=GPT_OSS_20B)
    layout = make_layout(ParallelConfig(), model, 1)
    stage = StageConfig(name="s", data=(BlendConfig(path="d"),), num_steps=1, sequence_length=4096,
                        frozen=("language", "experts"))  # fmt: skip
    given = {"precision": "bf16", "recompute": "layer", "pipeline_rank": 0, "target_share": 0.01}

    def planned(experts: str, how: str = "plain"):
        kernels = KernelConfig(experts=experts, loss="chunked")
        return memory.rank_memory(model, layout, replace(stage, experts=how), kernels=kernels, **given)

    bf16, fp8, mxfp4, packed = planned("bf16"), planned("fp8"), planned("mxfp4"), planned("bf16", "packed")
    matrices = 32 * 3 * 2880 * 2880
    assert bf16.weights == fp8.weights == mxfp4.weights
    scales = 32 * 23 * (45 + 23) * 4
    rows = activations.padded_rows(4096 * 4, 32)
    gradients = rows * 2 * 2880  # of the pre-activation, as E4M3
    assert fp8.workspace - bf16.workspace == matrices + scales + gradients
    layer = rows * (2880 + 3 * 2880) * 2  # gradients of a layer's rows
    making = 2 * matrices // 3 * (2 + 17 / 32)  # gate and up, transposed, beside their blocks
    assert mxfp4.workspace - bf16.workspace == making - layer > matrices * 17 // 32
    assert bf16.weights - packed.weights == 24 * (2 * matrices - matrices * 17 // 32)
    assert packed.workspace == bf16.workspace  # decoded inside the product
