from __future__ import annotations

import numpy as np
import pytest

from megatron_medgpt.config.presets import GPT_OSS_20B, GPT_OSS_120B
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel.cost import Work, step_seconds
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.parallel.simulate import CALM, Disturbance, busiest_over_mean, scaling, simulate_step

MODEL = ModelConfig(language=GPT_OSS_120B)
PARALLEL = ParallelConfig(pipeline=4, expert=8, layers_per_stage=(10, 10, 10, 6))
WORK = Work(sequence_length=4096, micro_batch_rows=1, global_batch_rows=512)
H100 = accelerator("h100")


def test_without_disturbance_the_simulation_is_the_arithmetic():
    layout = make_layout(PARALLEL, MODEL, 64)
    point = simulate_step(MODEL, layout, H100, WORK, efficiency=0.37, disturbance=CALM)
    expected = step_seconds(MODEL, layout, H100, WORK, efficiency=0.37)
    # The arithmetic simulates 24 micro-batches and adds periods for the rest; sends make a period a little longer.
    assert point.tokens_per_s_per_gpu == pytest.approx(expected.tokens_per_s_per_gpu, rel=5e-3)
    assert sum(point.shares.values()) == pytest.approx(1.0)


def test_disturbances_only_slow_down():
    layout = make_layout(PARALLEL, MODEL, 64)
    calm, disturbed = (
        simulate_step(MODEL, layout, H100, WORK, efficiency=0.37, disturbance=d) for d in (CALM, Disturbance())
    )
    assert disturbed.tokens_per_s_per_gpu < calm.tokens_per_s_per_gpu


def test_the_curve_bends_where_a_fixed_batch_leaves_few_micro_batches():
    points = scaling(MODEL, PARALLEL, H100, WORK, gpus=(32, 128, 512, 2048), efficiency=0.37)
    speeds = [p.tokens_per_s_per_gpu for p in points]
    assert speeds == sorted(speeds, reverse=True)
    assert points[-1].num_micro_batches == 1
    assert points[-1].shares["bubble"] > 0.3 > points[0].shares["bubble"]


def test_more_gpus_than_rows_are_left_out():
    points = scaling(MODEL, PARALLEL, H100, WORK, gpus=(32, 4096), efficiency=0.37)
    assert [p.num_gpus for p in points] == [32]


def test_fewer_experts_a_rank_make_the_busiest_busier():
    rng = np.random.default_rng(0)
    few = busiest_over_mean(GPT_OSS_20B.num_experts, 8, 0.3, rng, 200)
    many = busiest_over_mean(GPT_OSS_120B.num_experts, 8, 0.3, rng, 200)
    assert 1.0 < many < few
    assert busiest_over_mean(32, 8, 0.0, rng, 1) == 1.0
