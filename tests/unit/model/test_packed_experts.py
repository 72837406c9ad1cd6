"""Experts that stay in MXFP4 are the experts that they unpack to, in a quarter of the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_medgpt.config.presets import GPT_OSS_20B, TINY, TINY_CLIP
from megatron_medgpt.config.schema import (
    BlendConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
)
from megatron_medgpt.model.build import build_model
from megatron_medgpt.model.language import engine_config
from megatron_medgpt.model.packed_experts import PackedExperts
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.memory import rank_memory
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
# In a process of its own: memory that other tests have given back would be used again without being seen.
ONE_LAYER = """
import json
from dataclasses import replace
from pathlib import Path
import torch
from megatron_medgpt.config.presets import GPT_OSS_20B, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ParallelConfig
from megatron_medgpt.model.language import engine_config
from megatron_medgpt.model.packed_experts import PackedExperts
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout

def peak_bytes():
    \"\"\"The most memory that this process held since the last call; then counting starts anew.\"\"\"
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def held_bytes():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

layout = make_layout(ParallelConfig(), ModelConfig(language=GPT_OSS_20B, vision=TINY_CLIP), 1)
groups.start(timeout_s=60)
config = engine_config(
    GPT_OSS_20B, layout=layout, dtype=torch.bfloat16, kernels=KernelConfig(), packed_experts=True
)
layer = PackedExperts(GPT_OSS_20B.num_experts, config, pg_collection=groups.build_groups(layout))
for name, buffer in layer.named_buffers():
    buffer.fill_(117 if name.endswith("scales") else 0x31)
for parameter in layer.parameters():
    parameter.data.zero_()
    parameter.requires_grad_(False)
counts = [1 if expert < 4 else 0 for expert in range(GPT_OSS_20B.num_experts)]
rows = torch.ones(4, 2880, dtype=torch.bfloat16, requires_grad=True)
grown = {}
peak_bytes()
before = held_bytes()
out, _ = layer(rows, counts, torch.ones(4, dtype=torch.bfloat16))
grown["forward"] = peak_bytes() - before
before = held_bytes()
out.sum().backward()
grown["backward"] = peak_bytes() - before
assert rows.grad.isfinite().all() and rows.grad.count_nonzero()
print(json.dumps(grown))
groups.stop()
"""


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
def test_a_layer_of_the_20b_is_never_unpacked_as_a_whole_in_either_pass():
    """By a process's own peak. Every expert that has rows is decoded, one matrix after the other: 33 MB in bf16 and
    what decoding takes, where the layer as a whole would take 1.59 GB."""
    run = subprocess.run([sys.executable, "-c", ONE_LAYER], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    grown = json.loads(run.stdout.splitlines()[-1])
    whole, matrix = 32 * 3 * 2880 * 2880 * 2, 2 * 2880 * 2880 * 2
    assert max(grown.values()) < whole / 4, grown
    assert max(grown.values()) > matrix, grown
