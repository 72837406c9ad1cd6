"""One optimizer step on many GPUs, event by event: stragglers, uneven routing, and the batch that runs out. No torch.

Ranks that exchange experts (or slices of tensors) in every layer move in step, so they form one island, as slow as its
slowest GPU and its busiest expert rank. An island's pipeline is simulated pass by pass; islands meet once per step, at
the reduction of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel.cost import (
    ChunkSeconds,
    Work,
    chunk_seconds,
    data_parallel_seconds,
    send_seconds,
    step_seconds,
)
from megatron_medgpt.parallel.hardware import Accelerator
from megatron_medgpt.parallel.plan import Layout, make_layout
from megatron_medgpt.parallel.schedule import Pass, simulate


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What makes GPUs and micro-batches unequal. The numbers are assumptions to be replaced by a cluster's own."""

    speed_spread: float = 0.01
    """Standard deviation of the logarithm of GPUs' speeds (clocks, temperature)."""
    slow_share: float = 1 / 2000
    """GPUs that run hot or have a degraded link."""
    slow_factor: float = 1.25
    jitter: float = 0.02
    """Of one pass: the host, the network, other images in the micro-batch."""
    expert_spread: float = 0.3
    """Standard deviation of the logarithm of experts' popularity; 0 is forced balance."""


CALM = Disturbance(speed_spread=0, slow_share=0, jitter=0, expert_spread=0)


@dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """Mean over simulated steps at one number of GPUs."""

    num_gpus: int
    layout: Layout
    num_micro_batches: int
    tokens_per_s_per_gpu: float
    shares: dict[str, float]
    """Parts of the step, adding up to 1: compute, routing (busiest expert rank), bubble, stragglers (waiting for the
    slowest island), data parallel."""


def busiest_over_mean(num_experts: int, expert: int, spread: float, rng: np.random.Generator, layers: int) -> float:
    """Rows of the busiest of ``expert`` ranks over the mean, averaged over layers, for experts of uneven popularity."""
    if spread == 0 or expert == 1:
        return 1.0
    popularity = rng.lognormal(0, spread, (layers, expert, num_experts // expert)).mean(axis=2)
    return float((popularity.max(axis=1) / popularity.mean(axis=1)).mean())


def simulate_step(
    model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, *, efficiency: float, disturbance: Disturbance,
    seed: int = 0, num_steps: int = 16,
) -> ScalePoint:  # fmt: skip
    """Simulate steps of a layout with disturbances drawn from ``seed``.

    Raises:
        UsageError: the schedule cannot take the number of micro-batches.
    """
    rng = np.random.default_rng(seed)
    skew = busiest_over_mean(
        model.language.num_experts, layout.expert, disturbance.expert_spread, rng, model.language.num_layers
    )
    calm = step_seconds(model, layout, gpu, work, efficiency=efficiency)
    skewed_work = replace(work, skew=work.skew * skew)
    chunks = [
        chunk_seconds(model, layout, gpu, skewed_work, chunk=c, efficiency=efficiency)
        for c in range(layout.pipeline * layout.virtual_pipeline)
    ]
    reduce_s, gather_s = data_parallel_seconds(model, layout, gpu, work)
    exposed = max(0.0, reduce_s - chunks[0].backward) + max(0.0, gather_s - chunks[0].forward)
    totals: dict[str, float] = dict.fromkeys(("step", "fastest", "busy"), 0.0)
    for _ in range(num_steps):
        ends, busy = _island_ends(model, layout, gpu, work, chunks, disturbance, rng)
        totals["step"] += float(np.max(ends)) + exposed + calm.optimizer
        totals["fastest"] += float(np.median(ends))
        totals["busy"] += busy
    step, typical, busy = (totals[name] / num_steps for name in ("step", "fastest", "busy"))
    compute = calm.compute + calm.exchange
    parts = {
        "compute": compute,
        "routing": max(0.0, busy - compute),
        "bubble": max(0.0, typical - busy),
        "stragglers": max(0.0, step - exposed - calm.optimizer - typical),
        "data parallel": exposed + calm.optimizer,
    }
    tokens = work.global_batch_rows * work.sequence_length
    return ScalePoint(
        num_gpus=layout.world_size, layout=layout, num_micro_batches=work.num_micro_batches(layout),
        tokens_per_s_per_gpu=tokens / step / layout.world_size,
        shares={name: seconds / sum(parts.values()) for name, seconds in parts.items()},
    )  # fmt: skip


def _island_ends(
    model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, chunks: list[ChunkSeconds],
    disturbance: Disturbance, rng: np.random.Generator,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """End of every island's pipeline, and what its busiest stage computes undisturbed by others."""
    width = max(layout.expert, layout.tensor)
    islands = max(1, layout.world_size // (layout.pipeline * width))
    factor = rng.lognormal(0, disturbance.speed_spread, (layout.pipeline, islands, width))
    factor[rng.random(factor.shape) < disturbance.slow_share] *= disturbance.slow_factor
    slowest = factor.max(axis=2)
    slowest = slowest / np.exp(disturbance.speed_spread**2 / 2)

    def duration(current: Pass) -> np.ndarray:
        chunk = chunks[current.chunk]
        seconds = chunk.forward if current.forward else chunk.backward
        jitter = np.exp(np.abs(rng.normal(0, disturbance.jitter, islands))) if disturbance.jitter else 1.0
        return seconds * slowest[current.chunk % layout.pipeline] * jitter

    timeline = simulate(
        duration, pipeline=layout.pipeline, virtual=layout.virtual_pipeline,
        num_micro_batches=work.num_micro_batches(layout), send_s=send_seconds(model, layout, gpu, work),
    )  # fmt: skip
    busy = max(float(np.median(seconds)) for seconds in timeline.busy)
    return np.broadcast_to(np.asarray(timeline.end), (islands,)), busy


def scaling(
    model: ModelConfig, parallel: ParallelConfig, gpu: Accelerator, work: Work, *, gpus: tuple[int, ...],
    efficiency: float, disturbance: Disturbance | None = None, rows_per_gpu: float | None = None,
) -> list[ScalePoint]:  # fmt: skip
    """Simulated steps at several numbers of GPUs.

    Args:
        work: with the global batch that stays the same, unless
        rows_per_gpu: is given; then the global batch grows with the GPUs.

    Numbers of GPUs whose data-parallel ranks outnumber the rows of the batch are left out: they cannot be used.
    """
    points = []
    for num_gpus in gpus:
        layout = make_layout(parallel, model, num_gpus)
        rows = work.global_batch_rows if rows_per_gpu is None else int(rows_per_gpu * num_gpus)
        here = replace(work, global_batch_rows=rows)
        if rows % (work.micro_batch_rows * layout.data) == 0:
            points.append(
                simulate_step(model, layout, gpu, here, efficiency=efficiency, disturbance=disturbance or Disturbance())
            )
    return points
