"""``--dry-run``: what a run would be, and one real step and validation of each stage. Nothing is written."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from megatron_medgpt.config.schema import RunConfig, StageConfig
from megatron_medgpt.parallel.groups import World, destroy_groups
from megatron_medgpt.parallel.memory import model_parameters, rank_memory
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.train.build import build_stage
from megatron_medgpt.train.layouts import check_stage
from megatron_medgpt.train.step import train_step
from megatron_medgpt.train.validate import validate


def run_dry(config: RunConfig, world: World) -> None:
    """Print model, memory, data and speed of every stage. Collective: every rank runs the steps, rank 0 prints."""
    console = Console(stderr=False, highlight=False) if world.is_first else None
    if console:
        _print_model(console, config)
    for index, stage in enumerate(config.stages):
        layout = check_stage(config, stage, world.size)
        if console:
            _print_memory(console, config, stage, layout)
        seconds, tokens, validation_s, data = _one_step(config, index, world)
        if console:
            console.print(_data_table(config, stage, data, seconds, tokens, validation_s))


def _one_step(config: RunConfig, index: int, world: World) -> tuple[float, int, float, dict]:
    """Seconds and tokens of the second of two steps of a stage (the first pays for allocations), seconds of the second
    of two validations (0 where there are none), facts of the data."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = build_stage(replace(config, out=scratch), index, world)
        seconds, tokens = 0.0, 0
        num_steps = min(2, parts.stage.num_steps)
        with parts.batches_from(0) as batches:
            for step in range(num_steps):
                started = time.perf_counter()
                tokens = train_step(parts, batches, step=step, stop_here=False).num_tokens
                seconds = time.perf_counter() - started
        validation_s = 0.0
        for _ in range(2 if parts.stage.validation_interval else 0):
            started = time.perf_counter()
            validate(parts)
            validation_s = time.perf_counter() - started
        facts = parts.data.describe()
    parts.dismantle()
    destroy_groups()
    return seconds, tokens, validation_s, facts


def _print_model(console: Console, config: RunConfig) -> None:
    count = model_parameters(config.model)
    console.print(f"{config.name}: {count.total / 1e6:,.1f} M parameters, {config.precision}", soft_wrap=True)
    table = Table()
    table.add_column("module")
    table.add_column("parameters", justify="right")
    for module, number in vars(count).items():
        table.add_row(module, f"{number:,}")
    console.print(table)


def _print_memory(console: Console, config: RunConfig, stage: StageConfig, layout: Layout) -> None:
    title = f"\nstage {stage.name}: {layout.describe()}, memory per rank in GB (activations are estimated)"
    console.print(title, soft_wrap=True)
    table = Table()
    for name in ("pipeline rank", "layers", "weights", "gradients", "optimizer", "activations", "total"):
        table.add_column(name, justify="right", overflow="fold")  # whole words in a narrow terminal
    for pipeline_rank in range(layout.pipeline):
        memory = rank_memory(
            config.model, layout, stage, precision=config.precision, recompute=config.recompute,
            pipeline_rank=pipeline_rank, kernels=config.kernels,
        )  # fmt: skip
        layers = sum(len(layout.layers_of_chunk(c)) for c in layout.chunks_of(pipeline_rank))
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        table.add_row(str(pipeline_rank), str(layers), *(f"{part / 1e9:.3f}" for part in parts))
    console.print(table)


def _data_table(
    config: RunConfig, stage: StageConfig, data: dict, seconds: float, tokens: int, validation_s: float
) -> Table:  # fmt: skip
    table = Table(show_header=False, box=None)
    rows = stage.global_batch_rows
    positions = rows * stage.sequence_length
    per_epoch = data["rows_per_epoch"]
    mix = ", ".join(f"{name} x{blend.weight:g}" for name, blend in zip(data["datasets"], stage.data))
    frozen = ", ".join(stage.frozen) or "nothing"
    left_out = f"; {stage.exclude} leaves out {data['excluded']:,}" if stage.exclude else ""
    for name, value in (
        ("data", f"{mix}: {data['samples_per_epoch']:,} samples in {per_epoch:,} rows an epoch, "
                 f"{data['packing_efficiency']:.1%} of the positions filled" + left_out),
        ("step", f"{rows} rows x {stage.sequence_length:,} = {positions:,} positions, {tokens:,} used"),
        ("stage", f"{stage.num_steps:,} steps, {stage.num_steps * rows / per_epoch:.2f} epochs; frozen: {frozen}"),
        ("one step here", f"{seconds:.2f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s; "
                          f"the stage about {stage.num_steps * seconds / 60:,.1f} min"),
        *_validation_row(stage, seconds, validation_s),
    ):  # fmt: skip
        table.add_row(f"  {name}", value)
    return table


def _validation_row(stage: StageConfig, step_s: float, validation_s: float) -> list[tuple[str, str]]:
    if not validation_s:
        return []
    interval = min(stage.validation_interval, stage.num_steps)
    share = validation_s / (validation_s + interval * step_s)
    said = f"{validation_s:.2f} s, every {stage.validation_interval:,} steps: {share:.1%} of the stage's time"
    if stage.validation_max_share and share > stage.validation_max_share:
        said += f", but put off to take {stage.validation_max_share:.1%}"
    return [("one validation here", said)]
