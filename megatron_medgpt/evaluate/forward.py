"""Token losses and next tokens of a model split over ranks: megatron-core's schedule, forward only, in its layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_medgpt.model.cache import KeyValueCache
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

    @property
    def pipeline_size(self) -> int:
        return self._groups.pp.size()

    def row_length(self, num_positions: int) -> int:
        """Positions of a row that can hold ``num_positions``: tensor ranks share it evenly, and on a GPU attention
        works in blocks and compiles anew for every length."""
        multiple = math.lcm(self.tensor_size, 128) if self._device.type == "cuda" else self.tensor_size
        return _rounded_up(num_positions, multiple)

    def token_losses(self, batches: Sequence[MedBatch]) -> list[Tensor]:
        """Loss of every token, float32 (B, S) per batch, 0 where there is no target; on every rank of the pipeline."""
        batches = [batch.to(self._device) for batch in batches]
        return self._on_all_stages(
            self._run(batches, lambda model, number: model(batches[number])),
            (len(batches), *batches[0].token_ids_BS.shape), torch.float32,
        )  # fmt: skip

    def make_cache(self, lengths: Sequence[int], *, capacity: int) -> KeyValueCache:
        """A cache for prompts of these lengths, for ``next_tokens``."""
        return KeyValueCache(lengths, capacity=capacity, device=self._device)

    def next_tokens(self, batches: Sequence[MedBatch], caches: Sequence[KeyValueCache]) -> list[list[int]]:
        """The likeliest next token of every sequence of each cache; on every rank that holds a part of the model.

        All batches have one shape: prompts that fill the caches, or one row of newest tokens (``newest_tokens``). Their
        number is a multiple of the pipeline's size.
        """
        batches = [batch.to(self._device) for batch in batches]
        most = max(map(len, caches))

        def step(model: torch.nn.Module, number: int) -> Tensor:
            out = model(batches[number], want="next", cache=caches[number])
            return F.pad(out, (0, most - out.shape[0])) if out.dtype == torch.int64 else out

        found = self._on_all_stages(self._run(batches, step), (len(batches), most), torch.int64)
        for cache in caches:
            cache.advance()
        return [tokens.tolist()[: len(cache)] for tokens, cache in zip(found, caches)]

    def newest_tokens(self, tokens: Sequence[int], cache: KeyValueCache, *, most: int) -> MedBatch:
        """One row with the newest token of every sequence of a cache, behind what it holds.

        Args:
            most: sequences of the largest cache of the call; all rows have one length.
        """
        length = _rounded_up(most, self.tensor_size)
        ids, positions = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        positions[0, : len(tokens)] = torch.tensor(cache.lengths)
        return MedBatch(
            token_ids_BS=ids, label_ids_BS=torch.full_like(ids, IGNORE_INDEX), position_ids_BS=positions,
            document_ids_BS=torch.arange(length, dtype=torch.int32)[None],
            modality_ids_BS=torch.full((1, length), -1, dtype=torch.int8), num_tokens=len(tokens),
        )  # fmt: skip

    def on_any_rank(self, here: bool) -> bool:
        """Whether it is so on any data-parallel rank."""
        if self.data_size == 1:
            return here
        flag = torch.tensor([float(here)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._groups.dp)
        return bool(flag.item())

    def from_first_rank(self, value: Any) -> Any:
        """What rank 0 of the world gives, on all ranks."""
        if dist.get_world_size() == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather_data(self, own: Any) -> list[Any]:
        """What each data-parallel rank gives, in their order, on all of them."""
        return _gathered(own, self._groups.dp)

    def gather_model(self, own: Any) -> list[Any]:
        """What each rank that holds a part of this model replica gives (tensor and pipeline ranks), on all of them."""
        return _gathered(own, self._groups.mp)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The chunks in evaluation mode, and afterwards as they were."""
        training = [chunk for chunk in self._chunks if chunk.training]
        for chunk in training:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in training:
                chunk.train()

    def _run(
        self, batches: Sequence[MedBatch], chunk_forward: Callable[[torch.nn.Module, int], Tensor]
    ) -> list[Tensor]:  # fmt: skip
        """What the last chunk gives of every batch; nothing on other pipeline ranks."""

        def step(stream: Iterator[int], model: torch.nn.Module, *_):
            return chunk_forward(model, next(stream)), _keep_output

        numbers = list(range(len(batches)))
        if len(self._chunks) > 1:  # the interleaved schedule takes multiples of the pipeline's size
            numbers += [numbers[-1]] * (-len(batches) % self.pipeline_size)
        streams = [iter(numbers) for _ in self._chunks]
        with self.evaluating():
            reports = self._schedule(
                forward_step_func=step,
                data_iterator=streams if len(streams) > 1 else streams[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(numbers),
                seq_length=batches[0].token_ids_BS.shape[1],
                micro_batch_size=batches[0].token_ids_BS.shape[0],
                forward_only=True,
            )
        return [report["output"] for report in reports[: len(batches)]]

    def _on_all_stages(self, outputs: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        pipeline = self._groups.pp
        if pipeline.size() == 1:
            return outputs
        stacked = torch.stack(outputs) if outputs else torch.empty(shape, dtype=dtype, device=self._device)
        dist.broadcast(stacked, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
        return list(stacked.unbind())

    def mean_loss(self, batches: Sequence[MedBatch]) -> float:
        """Sum of losses over targets / their count, over the batches of all data-parallel ranks."""
        losses = self.token_losses(batches)
        loss_sum = torch.stack([loss.double().sum() for loss in losses]).sum()
        count = sum((batch.label_ids_BS != IGNORE_INDEX).sum().item() for batch in batches)
        total = torch.stack([loss_sum, torch.tensor(float(count), dtype=torch.float64, device=self._device)])
        dist.all_reduce(total, group=self._groups.dp)
        return float(total[0] / total[1].clamp(min=1))


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _gathered(own: Any, group: dist.ProcessGroup) -> list[Any]:
    if group.size() == 1:
        return [own]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def _keep_output(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron-core's loss function, without a loss."""
    kept = output.float() if output.is_floating_point() else output
    return output.new_zeros(()), torch.ones((), dtype=torch.int, device=output.device), {"output": kept}
