"""Everything that one stage of a run needs, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.config.schema import BlendConfig, RunConfig, StageConfig
from megatron_medgpt.data.exclude import read_excluded
from megatron_medgpt.data.loader import StageData, open_stage
from megatron_medgpt.data.prefetch import Prefetcher
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.model.build import build_model
from megatron_medgpt.model.medgpt import MedGPT
from megatron_medgpt.observe.trace import Trace
from megatron_medgpt.parallel.groups import World, build_groups
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.platform import Platform, prepare_engine
from megatron_medgpt.train.layouts import check_stage
from megatron_medgpt.train.optimizer import build_optimizer, build_schedule
from megatron_medgpt.types import ImageSpec, MedBatch

prepare_engine()

from megatron.core.distributed import (  # noqa: E402  (after the engine was prepared)
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PREFETCHED_MICRO_BATCHES = 4


@dataclass(kw_only=True)
class Place:
    """Where a rank stands in the layout of a stage."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    first_stage: bool
    last_stage: bool


@dataclass(kw_only=True)
class Parts:
    """One stage, ready to run."""

    config: RunConfig
    stage: StageConfig
    stage_index: int
    layout: Layout
    groups: ProcessGroupCollection
    place: Place
    platform: Platform
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    data: StageData = None  # type: ignore[assignment]  # ``build_stage`` fills it; benchmarks bring their own batches
    validation: StageData | None = None
    tokenizer: Tokenizer = None  # type: ignore[assignment]
    trace: Trace = field(default_factory=Trace)
    questions: Any = None
    """Validation questions and the engine that answers them, made at the first validation."""
    forward_backward: Callable = field(default_factory=get_forward_backward_func)

    @property
    def device(self) -> torch.device:
        return self.platform.device

    @property
    def models(self) -> list[MedGPT]:
        """The model chunks without their wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def learning_rate(self) -> float:
        """Rate of the parameters without one of their own."""
        groups = self.optimizer.param_groups
        return float(next((g["lr"] for g in groups if g.get("default_config")), groups[0]["lr"]))

    @property
    def num_microbatches(self) -> int:
        return self.stage.global_batch_rows // (self.stage.micro_batch_rows * self.layout.data)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def own_positions(self) -> tuple[int, int] | None:
        """Positions of the sequence that this tensor rank owns, or None when it owns all."""
        if self.layout.tensor == 1:
            return None
        width = self.stage.sequence_length // self.layout.tensor
        return self.place.tensor_rank * width, (self.place.tensor_rank + 1) * width

    def own_first_row(self, first_row: int, micro_batch: int) -> int:
        """Global number of the first row of this rank's ``micro_batch`` of the step that starts at ``first_row``."""
        rows = self.stage.micro_batch_rows
        return first_row + (micro_batch * self.layout.data + self.place.data_rank) * rows

    def read(self, data: StageData, first_row: int, micro_batch: int) -> MedBatch:
        return data.take(
            self.own_first_row(first_row, micro_batch),
            self.stage.micro_batch_rows,
            keep=self.own_positions(),
            with_pixels=self.place.first_stage,
        )

    def batches_from(self, step: int) -> Prefetcher[MedBatch]:
        """This rank's micro-batches from optimizer step ``step`` of the stage on, read ahead by a thread."""
        rows = self.stage.global_batch_rows
        total = (self.stage.num_steps - step) * self.num_microbatches
        requests = (
            (step * rows + (i // self.num_microbatches) * rows, i % self.num_microbatches) for i in range(total)
        )
        return Prefetcher(lambda request: self.read(self.data, *request), requests, depth=PREFETCHED_MICRO_BATCHES)

    def dismantle(self) -> None:
        """Free the model, its gradients and the optimizer's state; nothing of the stage may be used afterwards.

        They would outlive their last name: the engine's wrapper hangs hooks that hold it on the leaves of the graph,
        and its token dispatcher keeps the last step's probabilities with their graph, a ring through C++ that Python's
        collector does not see (0.16.1 and 0.19.2 distributed/distributed_data_parallel.py, moe/token_dispatcher.py).
        """
        for chunk in self.chunks:
            vars(chunk).clear()


def image_spec(config: RunConfig) -> ImageSpec:
    vision = config.model.vision
    return ImageSpec(
        size_px=vision.image_size_px, mean=vision.mean, std=vision.std, num_tokens=config.model.tokens_per_image
    )


def open_data(
    config: RunConfig,
    stage: StageConfig,
    blend: tuple[BlendConfig, ...],
    tokenizer: Tokenizer,
    *,
    learns: bool,
    device: torch.device | None = None,
) -> StageData:
    """Training data (``learns``) or validation data of a stage, which is read as it is and in one order."""
    return open_stage(
        blend,
        tokenizer_fingerprint=tokenizer.fingerprint,
        image=image_spec(config),
        sequence_length=stage.sequence_length,
        seed=config.seed,
        reader=config.image_reader,
        rows_per_step=stage.global_batch_rows if learns else 1,
        excluded=read_excluded(stage.exclude, field=f"stages.{stage.name}.exclude=") if learns else frozenset(),
        augment=stage.augment if learns else None,
        plans_folder=Path(config.out) / "plans",
        device=device,
    )


def build_stage(config: RunConfig, index: int, world: World) -> Parts:
    """Build groups, model, optimizer and data of one stage. Collective: every rank calls it."""
    stage = config.stages[index]
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    parts = assemble(config, index, world)
    parts.tokenizer = tokenizer
    parts.data = open_data(config, stage, stage.data, tokenizer, learns=True, device=world.device)
    if stage.validation_data:
        parts.validation = open_data(config, stage, stage.validation_data, tokenizer, learns=False, device=world.device)
    return parts


def assemble(config: RunConfig, index: int, world: World) -> Parts:
    """What computes in a stage: groups, model, optimizer, schedule; no data. Collective."""
    stage, dtype = config.stages[index], DTYPES[config.precision]
    layout = check_stage(config, stage, world.size)
    groups = build_groups(layout)
    models = build_model(
        config.model, layout=layout, groups=groups, dtype=dtype, kernels=config.kernels, recompute=config.recompute,
        router_balance_coefficient=stage.router_balance_coefficient, router_z_coefficient=stage.router_z_coefficient,
        frozen=stage.frozen, packed_experts=stage.experts == "packed", seed=config.seed,
    )  # fmt: skip
    chunks = _wrap(models, config, groups)
    optimizer = build_optimizer(chunks, stage, dtype=dtype)
    engine = chunks[0].module.config
    engine.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    engine.grad_scale_func = optimizer.scale_loss
    no_sync = [chunk.no_sync for chunk in chunks]
    engine.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return Parts(
        config=config, stage=stage, stage_index=index, layout=layout, groups=groups,
        place=_place(world, layout, groups), platform=world.platform, chunks=chunks, optimizer=optimizer,
        schedule=build_schedule(optimizer, stage),
    )  # fmt: skip


def _place(world: World, layout: Layout, groups: ProcessGroupCollection) -> Place:
    pipeline_rank = groups.pp.rank()
    return Place(
        rank=world.rank,
        tensor_rank=groups.tp.rank(),
        pipeline_rank=pipeline_rank,
        data_rank=groups.dp.rank(),
        first_stage=pipeline_rank == 0,
        last_stage=pipeline_rank == layout.pipeline - 1,
    )


def _wrap(models: list[MedGPT], config: RunConfig, groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    on_cuda = torch.cuda.is_available()
    wrapper = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.precision == "bf16",
        overlap_grad_reduce=on_cuda,  # gloo runs on the cores that compute: nothing to hide behind
    )
    return [
        DistributedDataParallel(
            config=model.config, ddp_config=wrapper, module=model, disable_bucketing=index > 0, pg_collection=groups
        )
        for index, model in enumerate(models)
    ]
