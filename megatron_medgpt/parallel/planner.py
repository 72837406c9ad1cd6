"""Every layout of a model on a number of GPUs: which fit, how fast they are, why the others are refused. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import BlendConfig, KernelConfig, ModelConfig, ParallelConfig, StageConfig
from megatron_medgpt.parallel.cost import StepSeconds, Work, chunk_seconds, least_step_seconds, step_seconds
from megatron_medgpt.parallel.hardware import RESERVED, Accelerator
from megatron_medgpt.parallel.memory import RankMemory, rank_memory, rank_parameters
from megatron_medgpt.parallel.plan import Layout, make_layout

VIRTUAL = (1, 2, 3)
ROWS = (1, 2, 4, 8)
RECOMPUTE = ("none", "layer")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    model: ModelConfig
    num_gpus: int
    gpu: Accelerator
    sequence_length: int = 4096
    global_batch_rows: int = 256
    images_per_row: float = 0.0
    target_share: float = 1.0
    frozen: tuple[str, ...] = ()
    skew: float = 1.0
    mxfp4_frozen: bool = False
    efficiency: float = 0.37
    precision: str = "bf16"
    kernels: KernelConfig = field(default_factory=KernelConfig)

    @property
    def packed(self) -> bool:
        """Whether the experts are held in MXFP4."""
        return self.mxfp4_frozen and "experts" in self.frozen

    def stage(self, micro_batch_rows: int) -> StageConfig:
        """A training stage of this shape; its data are named by whoever writes the run."""
        return StageConfig(
            name="plan", data=(BlendConfig(path="data"),), num_steps=1, sequence_length=self.sequence_length,
            micro_batch_rows=micro_batch_rows, global_batch_rows=self.global_batch_rows, frozen=self.frozen,
        )  # fmt: skip

    def work(self, micro_batch_rows: int, recompute: str) -> Work:
        return Work(
            sequence_length=self.sequence_length, micro_batch_rows=micro_batch_rows,
            global_batch_rows=self.global_batch_rows, images_per_row=self.images_per_row,
            target_share=self.target_share, frozen=self.frozen, recompute=recompute, skew=self.skew,
            packed_experts=self.packed, kernels=self.kernels,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, with everything that was computed of it."""

    parallel: ParallelConfig
    layout: Layout
    micro_batch_rows: int
    recompute: str
    memory: tuple[RankMemory, ...]
    """Per pipeline stage."""
    step: StepSeconds

    @property
    def peak_bytes(self) -> int:
        return max(stage.total for stage in self.memory)

    def describe(self) -> str:
        split = "-".join(str(n) for n in self.layout.layers_per_chunk) if self.layout.pipeline > 1 else ""
        return f"{self.layout.describe()}{f' ({split})' if split else ''}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The outcome of a search."""

    request: Request
    best: tuple[Candidate, ...]
    """Fastest first."""
    num_fitting: int
    refused: dict[str, int]
    """Reasons, and how many combinations each refused."""
    nearest: str
    """The layout that needed the least memory of those that did not fit, for when none does."""


def make_plan(request: Request, *, keep: int = 5) -> Plan:
    """Search all tensor, pipeline, virtual pipeline, expert and micro-batch degrees, with and without recomputation.

    Raises:
        UsageError: no layout of this many GPUs can be built at all.
    """
    refused: dict[str, int] = {}
    fitting: list[tuple[float, ParallelConfig, Layout, int, str, tuple[RankMemory, ...]]] = []
    nearest: tuple[int, str] | None = None
    limit = request.gpu.memory_bytes * (1 - RESERVED)
    for parallel, layout in _layouts(request, refused):
        for rows, recompute in itertools.product(ROWS, RECOMPUTE):
            reason = _batch_fault(request, layout, rows)
            if reason is None:
                memory = _memory(request, layout, rows, recompute)
                peak = max(stage.total for stage in memory)
                if peak > limit:
                    reason = f"needs more than the {limit / 2**30:.0f} GiB of a GPU"
                    label = f"{layout.describe()}, {rows} row(s), recompute {recompute}: {peak / 2**30:.1f} GiB"
                    nearest = min(nearest or (peak, label), (peak, label))
            if reason is not None:
                refused[reason] = refused.get(reason, 0) + 1
                continue
            least = least_step_seconds(
                request.model, layout, request.gpu, request.work(rows, recompute), efficiency=request.efficiency
            )
            fitting.append((least, parallel, layout, rows, recompute, memory))
    if not fitting and nearest is None:
        reasons = "; ".join(sorted(refused)[:3])
        raise UsageError(f"no layout of {request.num_gpus} GPU(s) can be built: {reasons}")
    return Plan(
        request=request,
        best=tuple(_best_of_each(_fastest(request, fitting, keep), keep)),
        num_fitting=len(fitting),
        refused=refused,
        nearest=nearest[1] if nearest else "",
    )


def _fastest(request: Request, fitting: list, keep: int) -> list[Candidate]:
    """Whole predictions, fastest first, of those that can be among the best ``keep`` layouts: from the smallest lower
    bound up, until the bound exceeds what is found already."""
    chosen: list[Candidate] = []
    best_of: dict[str, float] = {}
    for least, parallel, layout, rows, recompute, memory in sorted(fitting, key=lambda entry: entry[0]):
        if len(best_of) >= keep and least > 1.07 * sorted(best_of.values())[keep - 1]:
            break
        step = step_seconds(
            request.model, layout, request.gpu, request.work(rows, recompute), efficiency=request.efficiency
        )
        chosen.append(
            Candidate(
                parallel=parallel, layout=layout, micro_batch_rows=rows, recompute=recompute, memory=memory, step=step
            )
        )
        name = layout.describe()
        best_of[name] = min(best_of.get(name, step.total), step.total)
    return sorted(chosen, key=_preference)


def _preference(candidate: Candidate) -> tuple[int, int, float]:
    """Fastest first; among layouts within 3 % (half the error of the prediction), the simplest."""
    layout = candidate.layout
    splits = layout.tensor * layout.pipeline * layout.virtual_pipeline
    return round(math.log(candidate.step.total) / 0.03), splits, candidate.step.total


def _best_of_each(fitting: list[Candidate], keep: int) -> list[Candidate]:
    """The fastest candidate of every layout, fastest layouts first."""
    chosen: dict[str, Candidate] = {}
    for candidate in fitting:
        chosen.setdefault(candidate.layout.describe(), candidate)
    return list(chosen.values())[:keep]


def _layouts(request: Request, refused: dict[str, int]) -> Iterator[tuple[ParallelConfig, Layout]]:
    """Every layout that can be built, pipelines split so that their slowest stage is as fast as it can be."""
    language, world = request.model.language, request.num_gpus
    tensors = [d for d in _divisors(language.num_query_groups) if d <= request.gpu.gpus_per_domain and world % d == 0]
    for tensor in tensors:
        for pipeline in _divisors(world // tensor):
            if pipeline > language.num_layers or pipeline > 16:
                continue
            for expert in _divisors(world // pipeline):
                if language.num_experts % expert:
                    refused["parallel.expert does not divide the experts"] = (
                        refused.get("parallel.expert does not divide the experts", 0) + 1
                    )
                    continue
                for virtual in VIRTUAL if pipeline > 1 else (1,):
                    if pipeline * virtual > language.num_layers:
                        continue
                    split = balanced_split(request, tensor=tensor, pipeline=pipeline, virtual=virtual, expert=expert)
                    parallel = ParallelConfig(
                        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert,
                        layers_per_stage=split,
                    )  # fmt: skip
                    yield parallel, make_layout(parallel, request.model, world)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def balanced_split(
    request: Request, *, tensor: int, pipeline: int, virtual: int, expert: int
) -> tuple[int, ...] | None:
    """Layers of every chunk such that the slowest pipeline rank is as fast as it can be; None for one rank.

    The encoder loads the first chunk and the head the last (4.3 layers of GPT-oss 20B where every token is a target),
    so they get fewer layers. Layers are handed out one by one to the rank that is then the least loaded.
    """
    num_chunks = pipeline * virtual
    if num_chunks == 1:
        return None
    layout = Layout(
        world_size=request.num_gpus, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert,
        data=request.num_gpus // (tensor * pipeline), expert_data=request.num_gpus // (pipeline * expert),
        layers_per_chunk=(1,) * num_chunks,
    )  # fmt: skip
    work = request.work(1, "none")
    empty = replace(layout, layers_per_chunk=(0,) * num_chunks)
    one_layer, extra = (
        [_seconds(request, where, work, chunk) for chunk in range(num_chunks)] for where in (layout, empty)
    )
    one_layer = [with_layer - without for with_layer, without in zip(one_layer, extra)]
    counts = [1] * num_chunks
    for _ in range(request.model.language.num_layers - num_chunks):
        loads = [counts[c] * one_layer[c] + extra[c] for c in range(num_chunks)]
        rank = min(range(pipeline), key=lambda r: (sum(loads[r::pipeline]), r))
        counts[min(range(rank, num_chunks, pipeline), key=lambda c: (loads[c], c))] += 1
    return tuple(counts)


def _seconds(request: Request, layout: Layout, work: Work, chunk: int) -> float:
    both = chunk_seconds(request.model, layout, request.gpu, work, chunk=chunk, efficiency=request.efficiency)
    return both.forward + both.backward


def _batch_fault(request: Request, layout: Layout, rows: int) -> str | None:
    if request.sequence_length % layout.tensor:
        return "parallel.tensor does not divide the sequence length"
    if request.global_batch_rows % (rows * layout.data):
        return "micro-batch rows x data-parallel ranks do not divide the global batch"
    micro_batches = request.global_batch_rows // (rows * layout.data)
    if layout.virtual_pipeline > 1 and micro_batches % layout.pipeline:
        return "the interleaved schedule needs micro-batches in multiples of the pipeline degree"
    return None


def _memory(request: Request, layout: Layout, rows: int, recompute: str) -> tuple[RankMemory, ...]:
    return tuple(
        rank_memory(
            request.model, layout, request.stage(rows), precision=request.precision, recompute=recompute,
            pipeline_rank=rank, target_share=request.target_share, images_per_row=request.images_per_row,
            routed_share=request.skew, mxfp4_frozen=request.mxfp4_frozen, kernels=request.kernels,
        )
        for rank in range(layout.pipeline)
    )  # fmt: skip


def stage_parameters(candidate: Candidate, model: ModelConfig) -> list[int]:
    """Parameters that one rank of every pipeline stage holds."""
    ranks = range(candidate.layout.pipeline)
    return [rank_parameters(model, candidate.layout, pipeline_rank=rank).total for rank in ranks]
