"""One optimizer step: forward and backward over this rank's micro-batches, the guard, the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medgpt.train.build import Parts
from megatron_medgpt.train.consumed import sum_of_ids
from megatron_medgpt.train.guard import refuse_non_finite
from megatron_medgpt.types import IGNORE_INDEX, MedBatch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, equal on every rank."""

    loss: float
    """Sum over targets / global count of targets."""
    num_targets: int
    num_tokens: int
    """Positions that hold text or image, over all data-parallel ranks."""
    num_samples: int
    num_images: int
    grad_norm: float
    stop_requested: bool
    sum_of_ids: int
    """Of the samples of all ranks (see ``train.consumed``)."""
    sample_ids: tuple[str, ...]
    """Of this data-parallel rank only, in order."""


def sum_of_losses(batch: MedBatch, token_loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron-core's loss function: (sum, number of targets, what to report).

    The sum is what is differentiated; the engine divides the gradients once, by the count over all ranks and
    micro-batches.
    """
    loss_sum = token_loss_BS.sum()
    num_targets = (batch.label_ids_BS != IGNORE_INDEX).sum().to(torch.int)
    return loss_sum, num_targets, {"loss_sum": loss_sum.detach()}


def forward_step(batches: Iterator[MedBatch], model: torch.nn.Module, *_):
    """megatron-core's forward step."""
    batch = next(batches)
    return model(batch), partial(sum_of_losses, batch)


def train_step(parts: Parts, batches: Iterator[MedBatch], *, step: int, stop_here: bool) -> StepResult:
    """Run one optimizer step.

    Args:
        step: number of the step within the stage, from 0.
        stop_here: a signal has asked this rank to stop; every rank learns of it in the result.

    Raises:
        WorkError: a loss or gradient is not finite; parameters are as before.
    """
    with parts.trace.span("data"):
        micro_batches = [next(batches).to(parts.device) for _ in range(parts.num_microbatches)]
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    with parts.trace.span("model"):
        reports = run_schedule(parts, micro_batches, forward_step, forward_only=False)
    with parts.trace.span("glue"):
        result, bad_here, num_bad = _gather(parts, micro_batches, reports, stop_here)
        refuse_non_finite(
            loss_sum=result.loss, num_bad_ranks=num_bad, bad_here=bad_here, rank=parts.place.rank, step=step,
            sample_ids=list(result.sample_ids), out=parts.out,
        )  # fmt: skip
    with parts.trace.span("optimizer"):
        _, grad_norm, _ = parts.optimizer.step()
        parts.schedule.step(increment=1)
    return StepResult(**{**result.__dict__, "grad_norm": float(grad_norm or 0.0)})


def run_schedule(parts: Parts, micro_batches: list[MedBatch], step_function, *, forward_only: bool) -> list:
    """megatron-core's pipeline schedule over ``micro_batches``; returns the reports of the last stage."""
    chunks = parts.chunks
    streams = [iter(micro_batches) for _ in chunks]
    return parts.forward_backward(
        forward_step_func=step_function,
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=parts.stage.sequence_length,
        micro_batch_size=micro_batches[0].token_ids_BS.shape[0],
        forward_only=forward_only,
    )


def _gather(
    parts: Parts, micro_batches: list[MedBatch], reports: list[dict[str, Tensor]], stop_here: bool
) -> tuple[StepResult, bool, int]:
    """Add up over all ranks what the step reports, in one collective."""
    loss_sum = torch.stack([r["loss_sum"].double() for r in reports]).sum().item() if reports else 0.0
    bad_here = not _finite(parts) or loss_sum != loss_sum
    # Tensor ranks hold the same rows: one of them counts. The loss lives on the last stage, the rest on the first.
    counts_loss = parts.place.last_stage and parts.place.tensor_rank == 0
    counts_data = parts.place.first_stage and parts.place.tensor_rank == 0
    facts = torch.tensor(
        [
            loss_sum if counts_loss else 0.0,
            counts_data * sum(b.num_targets for b in micro_batches),
            counts_data * sum(b.num_tokens for b in micro_batches),
            counts_data * sum(b.num_documents for b in micro_batches),
            counts_data * sum(b.num_images for b in micro_batches),
            float(bad_here),
            float(stop_here),
        ],
        dtype=torch.float64,
        device=parts.device,
    )
    sample_ids = tuple(sample for b in micro_batches for sample in b.sample_ids)
    ids = torch.tensor([sum_of_ids(sample_ids) if counts_data else 0], dtype=torch.int64, device=parts.device)
    dist.all_reduce(facts)
    dist.all_reduce(ids)
    loss_sum, num_targets, num_tokens, num_samples, num_images, num_bad, num_stop = facts.tolist()
    result = StepResult(
        loss=loss_sum / max(num_targets, 1.0),
        num_targets=int(num_targets),
        num_tokens=int(num_tokens),
        num_samples=int(num_samples),
        num_images=int(num_images),
        grad_norm=0.0,
        stop_requested=num_stop > 0,
        sum_of_ids=int(ids.item()),
        sample_ids=sample_ids,
    )
    return result, bad_here, int(num_bad)


def _finite(parts: Parts) -> bool:
    """True when every gradient of this rank is finite: the sum of a buffer is NaN or infinite when one element is."""
    sums = [
        buffer.grad_data.sum() for chunk in parts.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    return not sums or bool(torch.isfinite(torch.stack([s.double() for s in sums])).all())
