"""Experts that stay in MXFP4 are the experts that they unpack to, in a quarter of the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from medgpt_kernels.grouped_mlp import routed

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import GPT_OSS_20B, TINY, TINY_CLIP
from megatron_medgpt.config.schema import (
    BlendConfig,
    KernelConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
)
from megatron_medgpt.model.build import build_model
from megatron_medgpt.model.experts import packed_shapes
from megatron_medgpt.model.language import engine_config
from megatron_medgpt.model.packed_experts import PackedExperts
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.memory import fp8_scratch_bytes, rank_memory
from megatron_medgpt.parallel.plan import make_layout

MODEL = ModelConfig(language=replace(TINY, num_layers=2), vision=TINY_CLIP)
STAGE = StageConfig(
    name="align", data=(BlendConfig(path="data"),), num_steps=1, sequence_length=64,
    frozen=("encoder", "language", "experts", "router"), experts="packed",
)  # fmt: skip


@pytest.fixture(scope="module")
def one_process():
    groups.start(timeout_s=60)
    yield groups.build_groups(make_layout(ParallelConfig(), MODEL, 1))
    groups.stop()


PEAK = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The most memory that this process held since the last call."""
    status = Path("/proc/self/status").read_text()
    PEAK.write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def build(one_process, *, packed: bool, experts: str = "auto", dtype=torch.float32):
    (model,) = build_model(
        MODEL, layout=make_layout(ParallelConfig(), MODEL, 1), groups=one_process, dtype=dtype,
        kernels=KernelConfig(experts=experts), frozen=STAGE.frozen, packed_experts=packed,
    )  # fmt: skip
    return model


def experts_of(model):
    return model.language.decoder.layers[0].mlp.experts


def outcome(experts, dtype):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1, 0, 0, 7, 2])
    rows = torch.randn(18, TINY.hidden_size, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(18, generator=generator).to(dtype).requires_grad_()
    out, _ = experts(rows, counts, weights)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
    return out.detach(), rows.grad, weights.grad


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("grouped", torch.bfloat16),
        ("reference", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp8", torch.float32),
        ("mxfp4", torch.float32),
    ],
)
def test_packed_experts_give_to_the_bit_what_the_unpacked_ones_give(one_process, name, dtype):
    packed = build(one_process, packed=True, experts=name, dtype=dtype)
    plain = build(one_process, packed=False, experts="grouped" if name == "reference" else name, dtype=dtype)
    for module in (packed, plain):
        for bias in (experts_of(module).gate_up_bias, experts_of(module).down_bias):
            bias.data.copy_(torch.linspace(-1, 1, bias.numel()).view_as(bias))
    state = {k: v for k, v in experts_of(packed).state_dict().items() if v is not None}
    experts_of(plain).load_state_dict(state)
    assert len(experts_of(plain).gate_up.unique()) > 15
    for a, b in zip(outcome(experts_of(packed), dtype), outcome(experts_of(plain), dtype)):
        assert torch.equal(a, b)


def test_the_20b_preset_keeps_423_mb_a_layer_and_nothing_of_the_experts_beside_it(one_process, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ModelConfig(language=GPT_OSS_20B, vision=TINY_CLIP)
    layout = make_layout(ParallelConfig(), model, 1)
    config = engine_config(
        GPT_OSS_20B, layout=layout, dtype=torch.bfloat16, kernels=KernelConfig(), packed_experts=True
    )
    with FakeTensorMode():
        layer = PackedExperts(GPT_OSS_20B.num_experts, config, pg_collection=one_process)
    blocks = sum(b.numel() * b.element_size() for b in layer.buffers())
    biases = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert blocks == 32 * 3 * 2880 * 2880 * 17 // 32
    assert blocks / 1e9 == pytest.approx(0.42, abs=0.005)
    assert 24 * blocks / 1e9 == pytest.approx(10.15, abs=0.01)
    assert biases == 32 * 3 * 2880 * 2
    stage = replace(STAGE, sequence_length=4096)
    made = {"precision": "bf16", "recompute": "layer", "pipeline_rank": 0}
    packed, plain = (rank_memory(model, layout, replace(stage, experts=e), **made) for e in ("packed", "plain"))
    matrices = 24 * 32 * 3 * 2880 * 2880
    assert plain.weights - packed.weights == matrices * 2 - matrices * 17 // 32
    assert packed.workspace - plain.workspace <= 2 * (2 * 2880 * 2880 * 2)


@pytest.mark.skipif(not PEAK.exists(), reason="needs Linux's account of a process's memory")
def test_a_layer_of_the_20b_is_never_unpacked_as_a_whole_in_either_pass(one_process):
    """By the process's own peak. Every expert that has rows is decoded, one matrix after the other: 33 MB in bf16 and
    what decoding takes, where the layer as a whole would take 1.59 GB."""
    layout = make_layout(ParallelConfig(), ModelConfig(language=GPT_OSS_20B, vision=TINY_CLIP), 1)
    config = engine_config(
        GPT_OSS_20B, layout=layout, dtype=torch.bfloat16, kernels=KernelConfig(), packed_experts=True
    )
    layer = PackedExperts(GPT_OSS_20B.num_experts, config, pg_collection=one_process)
    for name, buffer in layer.named_buffers():
        buffer.fill_(117 if name.endswith("scales") else 0x31)
    for parameter in layer.parameters():
        parameter.data.zero_()
        parameter.requires_grad_(False)
    counts = [1 if expert < 4 else 0 for expert in range(GPT_OSS_20B.num_experts)]
    rows = torch.ones(4, 2880, dtype=torch.bfloat16, requires_grad=True)
    grown = {}
    before = peak_bytes()
    out, _ = layer(rows, counts, torch.ones(4, dtype=torch.bfloat16))
    grown["forward"] = peak_bytes() - before
    before = peak_bytes()
    out.sum().backward()
    grown["backward"] = peak_bytes() - before
    assert rows.grad.isfinite().all() and rows.grad.count_nonzero()
    whole, matrix = 32 * 3 * 2880 * 2880 * 2, 2 * 2880 * 2880 * 2
    assert max(grown.values()) < whole / 4, grown
    assert max(grown.values()) > matrix, grown


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_the_planner_counts_what_a_pass_in_fp8_makes_of_packed_experts(passes):
    """A pass makes one orientation of both projections, and for a moment the other of one of them."""
    language = replace(TINY, hidden_size=192, expert_hidden_size=160)
    scratch = dict.fromkeys((passes, "both"), 0)
    for name in ("gate_up", "down"):
        shapes = packed_shapes(language.num_experts, 192, 160)
        blocks, scales = (torch.zeros(shapes[f"{name}_{leaf}"], dtype=torch.uint8) for leaf in ("blocks", "scales"))
        for asked in scratch:
            w = routed.packed_to_fp8(blocks, scales, passes=asked, implementation="reference")
            found = [t for t in (w.forward, w.backward, w.scales) if t is not None]
            scratch[asked] += sum(t.numel() * t.element_size() for t in found)
    made, used = fp8_scratch_bytes(language, 1)
    assert scratch[passes] == used
    assert scratch["both"] - used == 3 * (made - used)
    model = ModelConfig(language=language, vision=TINY_CLIP)
    stage = replace(STAGE, experts="packed", sequence_length=64)
    layout = make_layout(ParallelConfig(), model, 1)
    plain, fp8 = (
        rank_memory(model, layout, stage, precision="bf16", recompute="none", pipeline_rank=0, kernels=chosen)
        for chosen in (KernelConfig(experts="bf16"), KernelConfig(experts="fp8"))
    )
    assert fp8.workspace >= used and fp8.weights == plain.weights


def test_packed_experts_that_should_learn_are_refused(one_process):
    with pytest.raises(UsageError, match=r"stages.align.experts=packed: packed experts do not learn; add experts to"):
        replace(STAGE, frozen=("encoder",))
    with pytest.raises(UsageError, match=r"packed experts do not learn; freeze them"):
        build_model(MODEL, layout=make_layout(ParallelConfig(), MODEL, 1), groups=one_process, packed_experts=True)


@pytest.mark.parametrize("into", ["packed", "plain"])
def test_a_scale_that_means_nan_is_refused_before_anything_is_computed(one_process, into):
    packed = build(one_process, packed=True)
    experts_of(packed).down_scales[3, 1, 0] = 255
    state = {k: v for k, v in experts_of(packed).state_dict().items() if v is not None}
    with pytest.raises(UsageError, match=r"down: scales holds 1 NaN scales \(E8M0 255\)"):
        if into == "packed":
            outcome(experts_of(packed), torch.float32)
        else:
            experts_of(build(one_process, packed=False)).load_state_dict(state)


def test_fp8_refuses_packed_tiles_that_e4m3_cannot_hold(one_process):
    packed = build(one_process, packed=True, experts="fp8")
    scales = experts_of(packed).gate_up_scales
    scales[2] = 100
    scales[2, 0] = 120
    with pytest.raises(UsageError, match=r"gate_up: blocks: 1 of 8 tiles have exponents that spread over more than 14"):
        outcome(experts_of(packed), torch.float32)


def test_widths_that_are_not_whole_blocks_are_refused_by_name():
    from megatron_medgpt.config.schema import RunConfig

    language = LanguageConfig(**{**vars(TINY), "hidden_size": 72})
    with pytest.raises(UsageError, match=r"model.language.hidden_size=72 does not divide by 32"):
        RunConfig(
            name="x", out="x", tokenizer="x", stages=(STAGE,), model=ModelConfig(language=language, vision=TINY_CLIP)
        )
