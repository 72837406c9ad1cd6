"""The steps of one stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from megatron_medgpt.train.build import Parts
from megatron_medgpt.train.cadence import Cadence
from megatron_medgpt.train.consumed import extend
from megatron_medgpt.train.guard import StopRequest
from megatron_medgpt.train.step import train_step


@dataclass(kw_only=True)
class Progress:
    """Where a run stands. Checkpoints keep these numbers and nothing else beside the tensors."""

    step: int
    """Optimizer steps of the run, over all stages."""
    stage_step: int
    """Optimizer steps of this stage."""
    sample_chain: str
    lineage: tuple[str, ...] = ()


def fit(parts: Parts, progress: Progress, cadence: Cadence, stop: StopRequest) -> Literal["done", "stopped"]:
    """Train the stage from ``progress.stage_step`` to its end, an exit criterion, or a request to stop."""
    with parts.batches_from(progress.stage_step) as batches:
        while progress.stage_step < parts.stage.num_steps:
            started = time.perf_counter()
            result = train_step(parts, batches, step=progress.stage_step, stop_here=stop.requested)
            progress.step += 1
            progress.stage_step += 1
            progress.sample_chain = extend(progress.sample_chain, result.sum_of_ids)
            with parts.trace.span("glue"):
                reached_goal = cadence.after_step(parts, progress, result, time.perf_counter() - started)
            cadence.note_spans(parts.trace.end_step())
            if result.stop_requested:
                cadence.save(parts, progress, stage_end=False)
                return "stopped"
            if reached_goal:
                break
    return "done"
