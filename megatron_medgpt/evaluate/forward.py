"""Token losses of a model that is split over ranks: megatron-core's schedule, forward only, in the own layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medgpt.parallel.platform import prepare_engine
from megatron_medgpt.types import IGNORE_INDEX, MedBatch

prepare_engine()

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402  (after the engine was prepared)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


class LayoutForward:
    """Runs batches through model chunks that may be split by any of tensor, pipeline, expert and data parallelism.

    Every rank of the world calls it the same number of times with batches of one shape: experts are exchanged between
    data-parallel ranks, so a rank without work of its own passes a batch of padding.

    Args:
        chunks: this rank's model chunks, bare or wrapped for data parallelism.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, device: torch.device) -> None:
        self._chunks, self._groups, self._device = list(chunks), groups, device
        self._schedule: Callable = get_forward_backward_func()

    @property
    def tensor_rank(self) -> int:
        return self._groups.tp.rank()

    @property
    def tensor_size(self) -> int:
        return self._groups.tp.size()

    @property
    def data_rank(self) -> int:
        return self._groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self._groups.dp.size()

    @property
    def first_stage(self) -> bool:
        """True where pixels are needed."""
        return self._groups.pp.rank() == 0

    def own_positions(self, sequence_length: int) -> tuple[int, int] | None:
        """Positions of a row that this tensor rank owns (``keep`` of the data room); None when it owns all."""
        if self.tensor_size == 1:
            return None
        width = sequence_length // self.tensor_size
        return self.tensor_rank * width, (self.tensor_rank + 1) * width

    def token_losses(self, batches: Sequence[MedBatch]) -> list[Tensor]:
        """Loss of every token, float32 (B, S) per batch, 0 where there is no target; on every rank of the pipeline."""
        batches = [batch.to(self._device) for batch in batches]
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            losses = self._run(batches)
        for chunk, was_training in zip(self._chunks, training):
            chunk.train(was_training)
        pipeline = self._groups.pp
        if pipeline.size() > 1:
            stacked = torch.stack(losses) if losses else torch.empty(self._stacked_shape(batches), device=self._device)
            last = dist.get_process_group_ranks(pipeline)[-1]
            dist.broadcast(stacked, src=last, group=pipeline)
            losses = list(stacked.unbind())
        return losses

    def gather_data(self, own: Any) -> list[Any]:
        """What each data-parallel rank gives, in their order, on all of them."""
        return _gathered(own, self._groups.dp)

    def gather_model(self, own: Any) -> list[Any]:
        """What each rank that holds a part of this model replica gives (tensor and pipeline ranks), on all of them."""
        return _gathered(own, self._groups.mp)

    def _run(self, batches: Sequence[MedBatch]) -> list[Tensor]:
        def step(stream: Iterator[MedBatch], model: torch.nn.Module, *_):
            batch = next(stream)
            return model(batch), _keep_token_losses

        num_wanted = len(batches)
        if len(self._chunks) > 1:  # the interleaved schedule takes multiples of the pipeline's size
            batches = [*batches, *[batches[-1]] * (-num_wanted % self._groups.pp.size())]
        streams = [iter(batches) for _ in self._chunks]
        reports = self._schedule(
            forward_step_func=step,
            data_iterator=streams if len(streams) > 1 else streams[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].token_ids_BS.shape[1],
            micro_batch_size=batches[0].token_ids_BS.shape[0],
            forward_only=True,
        )
        return [report["token_loss_BS"] for report in reports[:num_wanted]]

    def _stacked_shape(self, batches: Sequence[MedBatch]) -> tuple[int, int, int]:
        return (len(batches), *batches[0].token_ids_BS.shape)

    def mean_loss(self, batches: Sequence[MedBatch]) -> float:
        """Sum of losses over targets / their count, over the batches of all data-parallel ranks."""
        losses = self.token_losses(batches)
        loss_sum = torch.stack([loss.double().sum() for loss in losses]).sum()
        count = sum((batch.label_ids_BS != IGNORE_INDEX).sum().item() for batch in batches)
        total = torch.stack([loss_sum, torch.tensor(float(count), dtype=torch.float64, device=self._device)])
        dist.all_reduce(total, group=self._groups.dp)
        return float(total[0] / total[1].clamp(min=1))


def _gathered(own: Any, group: dist.ProcessGroup) -> list[Any]:
    if group.size() == 1:
        return [own]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def _keep_token_losses(token_loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    kept = token_loss_BS.detach().float()
    count = torch.ones((), dtype=torch.int, device=token_loss_BS.device)
    return token_loss_BS.sum(), count, {"token_loss_BS": kept}
