"""What a configuration of kernels means on this machine, and what it may not ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from medgpt_kernels.grouped_mlp import launch

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ParallelConfig
from megatron_medgpt.model.build import check_kernels, kernel_choices
from megatron_medgpt.model.language import engine_config
from megatron_medgpt.parallel.plan import make_layout

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(language=TINY, vision=TINY_CLIP)


def test_auto_is_what_was_there_before_anything_was_measured():
    assert kernel_choices(KernelConfig(), GPU) == {
        "attention": "flex", "experts": "grouped", "expert_gradients": "direct", "router": "reference",
        "permute": "engine", "dispatch": "bf16", "projector": "reference", "loss": "whole",
    }  # fmt: skip
    assert kernel_choices(KernelConfig(experts="fp8"), GPU)["expert_schedule"] == "triton"
    assert kernel_choices(KernelConfig(experts="fp8"), CPU)["expert_schedule"] == "plain PyTorch"
    assert next(iter(launch.SCHEDULES)) == "triton"


def test_the_schedule_reaches_the_engine_and_knows_every_name():
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(KernelConfig)["expert_schedule"])) == {"auto", *launch.SCHEDULES}
    kernels = KernelConfig(experts="bf16", expert_schedule="tma-4-stages")
    made = engine_config(TINY, layout=make_layout(ParallelConfig(), MODEL, 1), dtype=torch.float32, kernels=kernels)
    assert made.expert_schedule == "tma-4-stages"


def test_a_schedule_without_fused_experts_is_refused():
    with pytest.raises(UsageError, match=r"kernels.expert_schedule=tma launches the fused experts, .* to bf16, fp8 or"):
        KernelConfig(expert_schedule="tma")


def test_a_schedule_that_this_machine_cannot_run_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(launch, "triton_refusal", lambda *_: "a tensor is on cpu; Triton needs CUDA")
    kernels = KernelConfig(experts="bf16", expert_schedule="tma")
    with pytest.raises(UsageError, match=r"kernels.expert_schedule=tma: a tensor is on cpu; .*; set it to auto"):
        check_kernels(kernels, MODEL, CPU)
    odd = ModelConfig(language=replace(TINY, hidden_size=72), vision=TINY_CLIP)
    monkeypatch.setattr(launch, "triton_refusal", lambda *_: None)
    with pytest.raises(UsageError, match=r"expert_schedule=tma: rows of 72 columns take 72 bytes; .* multiples of 16"):
        check_kernels(KernelConfig(experts="fp8", expert_schedule="tma"), odd, CPU)
