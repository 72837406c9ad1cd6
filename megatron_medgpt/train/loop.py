"""The steps of one stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_medgpt.train.build import Parts
from megatron_medgpt.train.cadence import Cadence
from megatron_medgpt.train.consumed import extend
from megatron_medgpt.train.guard import StopRequest
from megatron_medgpt.train.step import train_step
from megatron_medgpt.train.watch import Watch


@dataclass(kw_only=True)
class Progress:
    """Where a run stands. Checkpoints keep these numbers and nothing else beside the tensors."""

    step: int
    """Optimizer steps of the run, over all stages."""
    stage_step: int
    """Optimizer steps of this stage."""
    sample_chain: str
    watch: Watch
    lineage: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FitEnd:
    done: bool
    """The stage is over: its steps are taken, or its exit criterion is reached."""
    stop: bool
    """A signal has asked the run to stop."""
    checkpoint: Path


def fit(parts: Parts, progress: Progress, cadence: Cadence, stop: StopRequest) -> FitEnd:
    """Train the stage from ``progress.stage_step`` to its end, an exit criterion, or a request to stop, and save
    there."""
    with parts.batches_from(progress.stage_step) as batches:
        while True:
            started = time.perf_counter()
            result = train_step(parts, batches, step=progress.stage_step, stop_here=stop.requested)
            progress.step += 1
            progress.stage_step += 1
            progress.sample_chain = extend(progress.sample_chain, result.sum_of_ids)
            with parts.trace.span("glue"):
                reached_goal, is_best = cadence.after_step(parts, progress, result, time.perf_counter() - started)
            done = reached_goal or progress.stage_step == parts.stage.num_steps
            due = progress.stage_step % parts.config.checkpoint.interval == 0
            if done or due or is_best or result.stop_requested:
                with parts.trace.span("checkpoint"):
                    checkpoint = cadence.save(parts, progress, stage_end=done, is_best=is_best)
            cadence.note_spans(parts.trace.end_step())
            if done or result.stop_requested:
                return FitEnd(done=done, stop=result.stop_requested, checkpoint=checkpoint)
