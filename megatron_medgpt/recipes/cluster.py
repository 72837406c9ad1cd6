"""Alignment and instruction tuning of GPT-oss 20B and 120B on clusters of H100 (80 GB) and H200.

Both stages of a run have the layout that ``medgpt plan`` recommends for them (a test asks it again). Alignment learns
the projector alone, against frozen GPT-oss and encoder: 6 images to a row of 4,096 positions, a tenth of them targets.
Instruction tuning learns everything but the encoder; on one GPU the experts stay frozen too. Start from converted
public weights: ``checkpoint.start_from``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_medgpt.config.presets import GPT_OSS_20B, GPT_OSS_120B, TINY, TINY_CLIP
from megatron_medgpt.config.schema import (
    BlendConfig,
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)

LANGUAGE = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
ALIGN_FROZEN = ("encoder", "language", "experts", "router")
INSTRUCT_FROZEN = ("encoder",)
ONE_GPU_FROZEN = ("encoder", "experts", "router")
ALIGN_IMAGES_PER_ROW, ALIGN_TARGET_SHARE = 6.0, 0.1
INSTRUCT_IMAGES_PER_ROW, INSTRUCT_TARGET_SHARE = 4.0, 0.3
SKEW = 1.2
"""Rows of the busiest expert rank over the mean that memory and time are planned for."""

ONE = ParallelConfig()
SIXTEEN_CHUNKS = (2, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1)
PLANNED: dict[tuple[str, int, str], tuple[ParallelConfig, ParallelConfig, str]] = {
    ("20b", 1, "h100"): (ONE, ONE, "layer"),
    ("20b", 1, "h200"): (ONE, ONE, "none"),
    ("20b", 8, "h100"): (ONE, ParallelConfig(tensor=2, expert=8), "none"),
    ("20b", 8, "h200"): (ONE, ParallelConfig(expert=2), "none"),
    ("20b", 16, "h100"): (ONE, ParallelConfig(expert=8), "none"),
    ("20b", 16, "h200"): (ONE, ParallelConfig(expert=2), "none"),
    ("120b", 32, "h100"): (
        ParallelConfig(expert=8), ParallelConfig(tensor=4, pipeline=4, expert=8, layers_per_stage=(9, 9, 9, 9)), "none",
    ),
    ("120b", 32, "h200"): (
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=3, layers_per_stage=(6, 6, 6, 6, 6, 6)),
        ParallelConfig(pipeline=4, virtual_pipeline=2, expert=8, layers_per_stage=(4, 5, 5, 5, 5, 5, 4, 3)), "none",
    ),
    ("120b", 64, "h100"): (
        ParallelConfig(expert=8),
        ParallelConfig(tensor=2, pipeline=8, virtual_pipeline=2, expert=8, layers_per_stage=SIXTEEN_CHUNKS), "none",
    ),
    ("120b", 64, "h200"): (
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=3, layers_per_stage=(6, 6, 6, 6, 6, 6)),
        ParallelConfig(tensor=2, pipeline=8, virtual_pipeline=2, expert=4, layers_per_stage=SIXTEEN_CHUNKS), "none",
    ),
}  # fmt: skip
"""(model, GPUs, kind) -> layout of alignment, layout of instruction tuning, recomputation of the run."""


def cluster_run(size: str, num_gpus: int, gpu: str) -> RunConfig:
    """The whole run for one cluster."""
    align_layout, instruct_layout, recompute = PLANNED[size, num_gpus, gpu]
    align = StageConfig(
        name="align", data=(BlendConfig(path="data/align"),), num_steps=2000, sequence_length=4096,
        global_batch_rows=256, frozen=ALIGN_FROZEN, parallel=align_layout,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(warmup_steps=60)),
    )  # fmt: skip
    instruct = replace(
        align, name="instruct", data=(BlendConfig(path="data/instruct"),), num_steps=4000, global_batch_rows=128,
        frozen=ONE_GPU_FROZEN if num_gpus == 1 else INSTRUCT_FROZEN, parallel=instruct_layout,
        optimizer=OptimizerConfig(
            learning_rate=2e-5, module_learning_rates={"projector": 1e-4}, weight_decay=0.01,
            schedule=ScheduleConfig(warmup_steps=120),
        ),
        router_balance_coefficient=0.0 if num_gpus == 1 else 1e-3,
    )  # fmt: skip
    return RunConfig(
        name=name_of(size, num_gpus, gpu), out=f"runs/{name_of(size, num_gpus, gpu)}", tokenizer="tokenizer",
        model=ModelConfig(language=LANGUAGE[size]), stages=(align, instruct), recompute=recompute,
        checkpoint=CheckpointConfig(interval=250, start_from=f"checkpoints/gpt-oss-{size}-clip"),
        log=LogConfig(interval=10),
    )  # fmt: skip


def name_of(size: str, num_gpus: int, gpu: str) -> str:
    """Name of a recipe, e.g. ``20b-8xh100``."""
    return f"{size}-{num_gpus}x{gpu}"


def tiny_twin(run: RunConfig) -> RunConfig:
    """The same curriculum in the same kind of layout with a model that a CPU trains, on at most four ranks.

    Degrees stay where four ranks carry them. Where they do not, tensor, pipeline and expert degrees shrink to 2
    (virtual stages stay), so that every kind of parallelism of the run is still there.
    """
    stages = tuple(
        replace(
            stage, parallel=_small(stage.parallel or run.parallel), num_steps=2, sequence_length=256,
            global_batch_rows=8,
        )
        for stage in run.stages
    )  # fmt: skip
    # Twelve layers fill every chunk of an interleaved pipeline of 2 x 3 as of 2 x 2.
    model = ModelConfig(language=replace(TINY, num_layers=12), vision=TINY_CLIP)
    checkpoint = replace(run.checkpoint, start_from=None)
    return replace(
        run, name=f"{run.name}-tiny", out=f"runs/{run.name}-tiny", model=model, stages=stages, precision="fp32",
        checkpoint=checkpoint,
    )  # fmt: skip


def num_ranks_of(parallel: ParallelConfig) -> int:
    """Fewest ranks that carry a layout."""
    return parallel.pipeline * max(parallel.tensor, parallel.expert)


def _small(parallel: ParallelConfig) -> ParallelConfig:
    if num_ranks_of(parallel) > 4:
        parallel = replace(
            parallel, tensor=min(parallel.tensor, 2), pipeline=min(parallel.pipeline, 2), expert=min(parallel.expert, 2)
        )
    return replace(parallel, layers_per_stage=None)


def _maker(size: str, num_gpus: int, gpu: str) -> Callable[[], RunConfig]:
    return lambda: cluster_run(size, num_gpus, gpu)


CLUSTER_RECIPES: dict[str, Callable[[], RunConfig]] = {name_of(*key): _maker(*key) for key in PLANNED}
