"""The order in which a pipeline rank computes, and when: 1F1B and its interleaved form, event by event. No torch.

The order is that of megatron-core's schedules (``pipeline_parallel/schedules.py``): a rank runs a number of forward
passes ahead, then one forward and one backward pass in turn, then the backward passes that are left. Times may be
arrays of replicas: every replica follows the same order at its own speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_medgpt.config.errors import UsageError

Times = Any
"""Seconds: a float, or an array with one number per replica."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward or backward pass of one micro-batch through one model chunk."""

    forward: bool
    chunk: int
    """Of the whole model: chunk ``c`` lives on pipeline rank ``c % pipeline``."""
    micro_batch: int


def order_of(rank: int, pipeline: int, virtual: int, num_micro_batches: int) -> list[Pass]:
    """All passes of one pipeline rank in the order it runs them.

    Raises:
        UsageError: the interleaved schedule needs micro-batches in multiples of the pipeline degree.
    """
    if virtual > 1 and num_micro_batches % pipeline:
        raise UsageError(
            f"{num_micro_batches} micro-batches are not a multiple of parallel.pipeline={pipeline}, which "
            f"parallel.virtual_pipeline={virtual} needs; change global_batch_rows"
        )
    total = num_micro_batches * virtual
    ahead = pipeline - rank - 1 if virtual == 1 else (pipeline - rank - 1) * 2 + (virtual - 1) * pipeline
    ahead = min(ahead, total)

    def make(number: int, forward: bool) -> Pass:
        if virtual == 1:
            return Pass(forward=forward, chunk=rank, micro_batch=number)
        group, place = divmod(number, pipeline * virtual)
        turn = place // pipeline
        chunk = turn if forward else virtual - 1 - turn
        return Pass(forward=forward, chunk=chunk * pipeline + rank, micro_batch=group * pipeline + place % pipeline)

    order = [make(i, True) for i in range(ahead)]
    for i in range(ahead, total):
        order += [make(i, True), make(i - ahead, False)]
    return order + [make(i, False) for i in range(total - ahead, total)]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a simulated step took, in seconds; arrays where the times were arrays."""

    end: Times
    busy: tuple[Times, ...]
    """Per pipeline rank: time spent computing."""

    @property
    def idle_share(self) -> float:
        """Mean share of the step that a rank waits: the bubble, uneven stages included."""
        waits = [1 - np.mean(busy / self.end) for busy in self.busy]
        return float(np.mean(waits))


def simulate(
    duration: Callable[[Pass], Times], *, pipeline: int, virtual: int = 1, num_micro_batches: int, send_s: float = 0.0
) -> Timeline:
    """Run one step's passes as soon as their inputs are there and their rank is free.

    Args:
        duration: seconds of a pass.
        send_s: seconds between the end of a pass and the start of its neighbour on another rank.

    Raises:
        UsageError: see ``order_of``.
    """
    orders = [order_of(rank, pipeline, virtual, num_micro_batches) for rank in range(pipeline)]
    last_chunk = pipeline * virtual - 1
    done: dict[Pass, Times] = {}
    free: list[Times] = [0.0] * pipeline
    busy: list[Times] = [0.0] * pipeline
    at = [0] * pipeline
    while any(at[rank] < len(orders[rank]) for rank in range(pipeline)):
        moved = False
        for rank in range(pipeline):
            while at[rank] < len(orders[rank]):
                current = orders[rank][at[rank]]
                needed = _input_of(current, last_chunk)
                if needed is not None and needed not in done:
                    break
                start = free[rank]
                if needed is not None:
                    travelled = send_s if needed.chunk != current.chunk and pipeline > 1 else 0.0
                    start = np.maximum(start, done[needed] + travelled)
                seconds = duration(current)
                free[rank] = done[current] = start + seconds
                busy[rank] = busy[rank] + seconds
                at[rank] += 1
                moved = True
        if not moved:
            raise AssertionError("the schedule waits for itself")
    end = free[0]
    for other in free[1:]:
        end = np.maximum(end, other)
    return Timeline(end=end, busy=tuple(busy))


def _input_of(current: Pass, last_chunk: int) -> Pass | None:
    """The pass whose result a pass needs; a backward pass at the last chunk needs its own forward pass."""
    if current.forward:
        if current.chunk == 0:
            return None
        return Pass(forward=True, chunk=current.chunk - 1, micro_batch=current.micro_batch)
    if current.chunk == last_chunk:
        return Pass(forward=True, chunk=current.chunk, micro_batch=current.micro_batch)
    return Pass(forward=False, chunk=current.chunk + 1, micro_batch=current.micro_batch)
