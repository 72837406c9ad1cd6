"""The planner's weights, gradients and optimizer state against the tensors of a stage that has taken a step."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from megatron_medgpt.parallel import groups as world
from megatron_medgpt.parallel.memory import rank_memory
from tests.small_data import small_run


@pytest.fixture(scope="module")
def one_rank():
    started = world.start(timeout_s=60, kind="cpu")
    yield started
    world.stop()


def storage_bytes(tensors) -> int:
    """Of distinct storages: parameters are views into the engine's buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def optimizer_tensors(optimizer) -> list[torch.Tensor]:
    """Moments and, in bf16, master weights. The step counts are single numbers."""
    found: list[torch.Tensor] = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in one.optimizer.state.values():
            found += [t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
        for group in getattr(one, "shard_fp32_from_float16_groups", []):
            found += [t for t in group if t is not None]
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("frozen", [(), ("encoder", "experts", "router")], ids=["all learns", "partly frozen"])
def test_training_state_is_what_the_planner_counts(one_rank, tmp_path, precision, frozen):
    from megatron_medgpt.train.build import build_stage
    from megatron_medgpt.train.step import train_step

    run = small_run(tmp_path, precision=precision)
    stage = replace(run.stages[0], frozen=frozen, validation_data=(), validation_interval=0)
    run = replace(run, stages=(stage,))
    world.destroy_groups()
    parts = build_stage(run, 0, one_rank)
    with parts.batches_from(0) as batches:
        train_step(parts, batches, step=0, stop_here=False)
    planned = rank_memory(run.model, parts.layout, stage, precision=precision, recompute="none", pipeline_rank=0)
    chunk = parts.chunks[0]
    buffers = [b for group in (chunk.buffers, chunk.expert_parallel_buffers) for b in group]
    assert storage_bytes(chunk.parameters()) == pytest.approx(planned.weights, rel=0.01)
    assert storage_bytes([b.grad_data for b in buffers]) == pytest.approx(planned.gradients, rel=0.01)
    assert storage_bytes(optimizer_tensors(parts.optimizer)) == pytest.approx(planned.optimizer, rel=0.01)


def test_nothing_of_a_stage_is_left_when_the_next_one_is_built(one_rank, tmp_path, monkeypatch):
    from megatron_medgpt.train import stages

    left, build = [], stages.build_stage

    def build_and_watch(config, index, world):
        gc.collect()
        left.append(sum(parameter() is not None for parameter in watched))
        parts = build(config, index, world)
        watched.extend(weakref.ref(parameter) for model in parts.models for parameter in model.parameters())
        return parts

    watched: list[weakref.ref] = []
    run = small_run(tmp_path)
    one_step = [replace(stage, num_steps=1, validation_interval=1) for stage in run.stages]
    monkeypatch.setattr(stages, "build_stage", build_and_watch)
    world.destroy_groups()
    assert stages.run_stages(replace(run, stages=tuple(one_step)), one_rank).status == "done"
    assert left == [0, 0] and watched
