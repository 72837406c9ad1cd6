"""Our side of the benchmark: the training room's own step on megatron-core, one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import plain
import torch
from workload import Workload

from megatron_medgpt.config.schema import (
    BlendConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)  # fmt: skip
from megatron_medgpt.convert.llava import llava_table
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import World, build_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.train import build as train_build
from megatron_medgpt.train.optimizer import build_optimizer, build_schedule
from megatron_medgpt.train.step import train_step
from megatron_medgpt.types import MedBatch


class OurSide:
    """The step of ``medgpt train`` without its data: DistributedDataParallel, schedule, distributed AdamW."""

    def __init__(self, workload: Workload, world: World, weights: dict[str, torch.Tensor], num_steps: int):
        stage = StageConfig(
            name="benchmark", data=(BlendConfig(path="unused"),), num_steps=num_steps,
            sequence_length=workload.length, micro_batch_rows=workload.rows,
            global_batch_rows=workload.rows * workload.micro_batches,
            optimizer=OptimizerConfig(
                learning_rate=plain.LEARNING_RATE, beta1=plain.BETAS[0], beta2=plain.BETAS[1],
                clip_grad_norm=plain.CLIP_GRAD_NORM, schedule=ScheduleConfig(kind="constant"),
            ),
        )  # fmt: skip
        config = RunConfig(
            name="benchmark", out="unused", tokenizer="unused", stages=(stage,), model=workload.model, precision="fp32"
        )
        layout = make_layout(ParallelConfig(), workload.model, world.size)
        groups = build_groups(layout)
        models = build_model(
            workload.model, layout=layout, groups=groups, dtype=torch.float32, kernels=config.kernels,
        )  # fmt: skip
        _load(models[0], workload, weights)
        chunks = train_build._wrap(models, config, groups)
        optimizer = build_optimizer(chunks, stage, dtype=torch.float32)
        engine = chunks[0].module.config
        engine.finalize_model_grads_func = partial(train_build.finalize_model_grads, pg_collection=groups)
        engine.grad_scale_func = optimizer.scale_loss
        engine.no_sync_func = chunks[0].no_sync
        self.parts = train_build.Parts(
            config=config, stage=stage, stage_index=0, layout=layout, groups=groups,
            place=train_build._place(world, layout, groups), platform=world.platform, chunks=chunks, optimizer=optimizer,
            schedule=build_schedule(optimizer, stage), data=None, validation=None, tokenizer=None,
        )  # fmt: skip
        self.steps_done = 0

    def step(self, batches: Sequence[MedBatch]) -> float:
        """One optimizer step; returns the mean loss of the targets."""
        result = train_step(self.parts, iter(batches), step=self.steps_done, stop_here=False)
        self.steps_done += 1
        return result.loss


def _load(model: torch.nn.Module, workload: Workload, weights: dict[str, torch.Tensor]) -> None:
    ours, _ = llava_table(workload.model).to_ours(weights)
    model.load_state_dict(ours, strict=True)
