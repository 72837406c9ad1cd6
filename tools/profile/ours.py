"""Our side of the benchmark: the training room's own step on megatron-core, one process."""

from __future__ import annotations

from collections.abc import Sequence

import plain
import torch
from workload import Workload

from megatron_medgpt.config.schema import (
    BlendConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)  # fmt: skip
from megatron_medgpt.convert.llava import llava_table
from megatron_medgpt.parallel.groups import World
from megatron_medgpt.train.build import assemble
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
        self.parts = assemble(config, 0, world)
        ours, _ = llava_table(workload.model).to_ours(weights)
        self.parts.models[0].load_state_dict(ours, strict=True)
        self.parts.optimizer.reload_model_params()
        self.steps_done = 0

    def step(self, batches: Sequence[MedBatch]) -> tuple[float, float]:
        """One optimizer step; returns the mean loss of the targets and the gradient's norm before clipping."""
        result = train_step(self.parts, iter(batches), step=self.steps_done, stop_here=False)
        self.steps_done += 1
        return result.loss, result.grad_norm
