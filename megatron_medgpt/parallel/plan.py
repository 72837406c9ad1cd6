"""Arithmetic of a layout: which degrees are possible, who holds which layers. No torch.

Rank order is megatron-core's default, "tp-cp-ep-dp-pp": tensor neighbours are adjacent ranks, pipeline stages are
farthest apart. Expert parallelism splits the ranks that are left after the pipeline; the tensor degree of experts is
always 1 (their biases need it), so TP * DP ranks of a stage hold ``expert`` groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A checked layout of one world: every number that the rooms derive from the degrees."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    data: int
    """Data-parallel size of everything but the experts."""
    expert_data: int
    """Data-parallel size of the experts."""
    layers_per_chunk: tuple[int, ...]
    """Decoder layers of every model chunk in model order; chunk ``c`` lives on pipeline rank ``c % pipeline``."""

    @property
    def sequence_parallel(self) -> bool:
        """Always with tensor parallelism: megatron-core's MoE refuses TP without it."""
        return self.tensor > 1

    @property
    def uneven(self) -> bool:
        return len(set(self.layers_per_chunk)) > 1

    def chunks_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """Model chunks that a pipeline rank holds, in virtual order."""
        return tuple(range(pipeline_rank, self.pipeline * self.virtual_pipeline, self.pipeline))

    def layers_of_chunk(self, chunk: int) -> range:
        """Global decoder layer numbers (from 0) of one model chunk."""
        first = sum(self.layers_per_chunk[:chunk])
        return range(first, first + self.layers_per_chunk[chunk])

    def describe(self) -> str:
        """Short name for logs and tables, e.g. ``TP2·PP2·EP2·DP1``."""
        virtual = f"·VPP{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        return f"TP{self.tensor}·PP{self.pipeline}{virtual}·EP{self.expert}·DP{self.data}"


def make_layout(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout:
    """Check the degrees against the model and the world.

    Raises:
        UsageError: naming the field, what was found, and what would do.
    """
    tp, pp, vpp, ep = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.expert
    language = model.language

    def divides(field: str, degree: int, what: str, size: int) -> None:
        if size % degree:
            allowed = [d for d in range(1, size + 1) if size % d == 0 and d <= 64]
            raise UsageError(f"{field}={degree} does not divide {what}={size}; use one of {allowed}")

    divides("parallel.tensor", tp, "model.language.num_query_groups", language.num_query_groups)
    divides("parallel.tensor", tp, "model.language.num_attention_heads", language.num_attention_heads)
    divides("parallel.expert", ep, "model.language.num_experts", language.num_experts)
    if world_size % (tp * pp):
        raise UsageError(
            f"world size {world_size} is not a multiple of parallel.tensor x parallel.pipeline = {tp} x {pp} = "
            f"{tp * pp}; start {tp * pp} processes or a multiple of it, or change the degrees"
        )
    stage_ranks = world_size // pp
    if stage_ranks % ep:
        raise UsageError(
            f"parallel.expert={ep} does not divide the {stage_ranks} ranks of a pipeline stage (world {world_size} / "
            f"pipeline {pp}); use a divisor of {stage_ranks} or start more processes"
        )
    if vpp > 1 and pp == 1:
        raise UsageError(f"parallel.virtual_pipeline={vpp} needs parallel.pipeline > 1")
    return Layout(
        world_size=world_size, tensor=tp, pipeline=pp, virtual_pipeline=vpp, expert=ep,
        data=world_size // (tp * pp), expert_data=stage_ranks // ep,
        layers_per_chunk=_split_layers(parallel, language.num_layers),
    )  # fmt: skip


def _split_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.layers_per_stage is None:
        if num_layers % num_chunks:
            raise UsageError(
                f"model.language.num_layers={num_layers} cannot be split evenly over {num_chunks} pipeline chunks; "
                f"set parallel.layers_per_stage, e.g. {_nearly_even(num_layers, num_chunks)}"
            )
        return (num_layers // num_chunks,) * num_chunks
    split = tuple(parallel.layers_per_stage)
    if len(split) != num_chunks or sum(split) != num_layers or min(split) < 1:
        raise UsageError(
            f"parallel.layers_per_stage={list(split)} must be {num_chunks} numbers of at least 1 that add up to "
            f"model.language.num_layers={num_layers}, e.g. {_nearly_even(num_layers, num_chunks)}"
        )
    return split


def _nearly_even(num_layers: int, num_chunks: int) -> list[int]:
    return [num_layers // num_chunks + (i < num_layers % num_chunks) for i in range(num_chunks)]
