"""Seconds and bytes of one step of a layout on a kind of accelerator, by arithmetic. No torch.

Matrix products run at ``efficiency`` of the accelerator's sustained rate (calibrated, ``parallel.published``), but no
faster than the experts' weights come from memory. Exchanges between ranks are not hidden behind computation, except
gradient reduction and weight gathering of the data-parallel ranks, which overlap the last backward and the first
forward pass. Pipelines are simulated (``parallel.schedule``).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from megatron_medgpt.config.schema import KernelConfig, LanguageConfig, ModelConfig
from megatron_medgpt.parallel.flops import (
    language_flops_per_token,
    projector_flops_per_image,
    training_flops,
    vision_flops_per_image,
)
from megatron_medgpt.parallel.hardware import Accelerator
from megatron_medgpt.parallel.memory import GRADIENT_BYTES, MXFP4_BYTES, rank_parameters
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.schedule import Pass, simulate

BF16 = 2
FP8 = 1
FP8_GAIN = 1250 / 790
"""How much faster than in BF16 a product in FP8 is taken to be: 1,250 TFLOP/s, which others' kernels exceed on an H800
(DeepGEMM: 1,262 to 1,381), over the 790 that were measured in BF16. Not measured here."""
OPTIMIZER_TRAFFIC = 30
"""Bytes an AdamW step moves per parameter it owns: gradient, master weight and two moments in, the last three and the
weight out."""
SIMULATED_MICRO_BATCHES = 24
"""A longer step adds whole periods of the slowest stage; those are added without simulating them."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step computes, apart from the layout."""

    sequence_length: int
    micro_batch_rows: int
    global_batch_rows: int
    images_per_row: float = 0.0
    target_share: float = 1.0
    document_length: int | None = None
    """Attention is quadratic within a document; the row's length when not given."""
    frozen: tuple[str, ...] = ()
    recompute: str = "none"
    dispatch: str = "copies"
    """``copies``: a token goes to each of its experts (megatron-core's all-to-all, which this package runs);
    ``once``: once to each rank, or each node across nodes (DeepEP, HybridEP)."""
    routing: str = "uniform"
    """``consecutive``: a token's experts are neighbours, as a benchmark's balanced gate may choose them."""
    skew: float = 1.0
    """Rows of the busiest expert rank over the mean."""
    packed_experts: bool = False
    """The experts are held in MXFP4 and decoded wherever they are used."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """``experts`` fp8 and mxfp4, ``dispatch`` fp8 and ``loss`` chunked change the time. What the fused ways save by
    fusing is not predicted: the efficiency is calibrated on whole runs."""

    @property
    def micro_batch_tokens(self) -> int:
        return self.sequence_length * self.micro_batch_rows

    def num_micro_batches(self, layout: Layout) -> int:
        return self.global_batch_rows // (self.micro_batch_rows * layout.data)


@dataclass(frozen=True, kw_only=True)
class ChunkSeconds:
    """One micro-batch through one model chunk."""

    forward: float
    backward: float
    exchange: float
    """Part of the two spent in exchanges of the tensor and expert groups."""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """One optimizer step."""

    total: float
    compute: float
    """Of the busiest pipeline rank."""
    exchange: float
    bubble: float
    data_parallel: float
    """What gradient reduction and weight gathering add."""
    optimizer: float
    tokens_per_s_per_gpu: float
    model_flops_per_s_per_gpu: float
    images_per_s: float
    """Demand on the data path, over all ranks."""
    stages: tuple[ChunkSeconds, ...]
    """Per pipeline rank, its chunks added up."""


def distinct_places(num_places: int, num_experts: int, per_token: int) -> float:
    """Mean number of places (ranks or nodes that split the experts evenly) among a token's experts, uniform routing."""
    if num_places == 1:
        return 1.0
    elsewhere = math.comb(num_experts - num_experts // num_places, per_token) / math.comb(num_experts, per_token)
    return num_places * (1 - elsewhere)


def exchange_bytes(c: LanguageConfig, *, tokens: float, expert: int, domains: int, work: Work) -> tuple[float, float]:
    """Bytes that a rank sends in one pass of expert exchange: within its NVLink domain, and out of it.

    Args:
        tokens: of this rank (its slice of the micro-batch).
        domains: NVLink domains that the expert group spans.
    """
    per_row = c.hidden_size * BF16
    k, near_ranks = c.num_experts_per_token, expert // domains
    if work.dispatch == "copies":
        rows = tokens * k * work.skew
        return rows * (near_ranks - 1) / expert * per_row, rows * (expert - near_ranks) / expert * per_row
    if work.routing == "consecutive":
        places = 1.0 if c.num_experts // expert >= k else k / (c.num_experts // expert)
        nodes = 1.0
    else:
        places = distinct_places(expert, c.num_experts, k)
        nodes = distinct_places(domains, c.num_experts, k)
    out = tokens * work.skew * nodes * (domains - 1) / domains * per_row
    near = (
        tokens * work.skew * (places if domains == 1 else max(places, nodes)) * (near_ranks - 1) / near_ranks * per_row
    )
    return near, out


def pass_seconds(c: LanguageConfig, layout: Layout, gpu: Accelerator, work: Work) -> tuple[float, float]:
    """Exchanges of one layer and micro-batch: one of the four expert passes, and one gather or scatter of the tensor
    group."""
    tokens = work.micro_batch_tokens / layout.tensor
    domains = -(-layout.expert // gpu.gpus_per_domain)
    near, out = exchange_bytes(c, tokens=tokens, expert=layout.expert, domains=domains, work=work)
    expert = max(near / gpu.domain_bandwidth, out / gpu.network_bandwidth) if layout.expert > 1 else 0.0
    gathered = work.micro_batch_tokens * c.hidden_size * BF16 * (layout.tensor - 1) / layout.tensor
    bandwidth = gpu.domain_bandwidth if layout.tensor <= gpu.gpus_per_domain else gpu.network_bandwidth
    return expert, gathered / bandwidth


def chunk_seconds(
    model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, *, chunk: int, efficiency: float
) -> ChunkSeconds:
    """Forward and backward seconds of one micro-batch in one model chunk."""
    layers = len(layout.layers_of_chunk(chunk))
    forward, backward = (layers * s for s in _layer_compute(model.language, layout, gpu, work, efficiency))
    expert_s, tensor_s = pass_seconds(model.language, layout, gpu, work)
    there = payload_share(model.language) if work.kernels.dispatch == "fp8" else 1.0  # of the four, one is rounded
    exchange_forward, exchange_backward = (
        layers * ((there + 1) * expert_s + 2 * tensor_s),
        layers * (2 * expert_s + 3 * tensor_s),  # the input of linear_qkv is gathered again for its weights
    )
    if work.recompute == "layer":
        backward += forward
        exchange_backward += exchange_forward
    rate = gpu.sustained_flops * efficiency
    if chunk == 0:
        encoder = vision_flops_per_image(model.vision) * (1.0 if "encoder" in work.frozen else 3.0)
        images = work.images_per_row * work.micro_batch_rows / layout.tensor / rate
        forward += images * (vision_flops_per_image(model.vision) + projector_flops_per_image(model))
        backward += images * (encoder - vision_flops_per_image(model.vision) + 2 * projector_flops_per_image(model))
    if chunk == layout.pipeline * layout.virtual_pipeline - 1:
        head_s = work.micro_batch_tokens * work.target_share * _head_flops(model.language) / layout.tensor / rate
        forward += head_s
        backward += head_s * (1.0 if "language" in work.frozen else 2.0)
        if work.kernels.loss == "chunked":  # makes the logits again
            backward += head_s
    return ChunkSeconds(
        forward=forward + exchange_forward, backward=backward + exchange_backward,
        exchange=exchange_forward + exchange_backward,
    )  # fmt: skip


def untimed(kernels: KernelConfig) -> dict[str, str]:
    """The fused kernels among the choices whose gain ``step_seconds`` does not know; they are taken to last as before.

    It knows the bytes and products of experts in FP8 and MXFP4, of rows sent in FP8 and of logits made twice.
    """
    fused = {name: choice for name, choice in asdict(kernels).items() if choice == "fused"}
    if kernels.experts == "bf16":
        fused["experts"] = "bf16"
    if kernels.expert_schedule not in ("auto", "triton"):
        fused["expert_schedule"] = kernels.expert_schedule
    return fused


def payload_share(c: LanguageConfig) -> float:
    """Bytes of an FP8 row over those of a bf16 row: the codes and a byte of scale for 128, up to a multiple of 16."""
    return math.ceil((c.hidden_size + math.ceil(c.hidden_size / 128)) / 16) * 16 / (c.hidden_size * BF16)


def _head_flops(c: LanguageConfig) -> float:
    return 2.0 * c.hidden_size * c.vocab_size


def _layer_compute(
    c: LanguageConfig, layout: Layout, gpu: Accelerator, work: Work, efficiency: float
) -> tuple[float, float]:
    """Forward and backward seconds of one layer and micro-batch, without exchanges."""
    rate, tokens = gpu.sustained_flops * efficiency, work.micro_batch_tokens / layout.tensor
    experts = c.num_experts_per_token * 6.0 * c.hidden_size * c.expert_hidden_size
    whole = language_flops_per_token(c, work.document_length or work.sequence_length) - _head_flops(c)
    dense_s = tokens * (whole / c.num_layers - experts) / rate
    plain_s = tokens * experts * work.skew / rate
    weights = c.num_experts // layout.expert * 3 * c.hidden_size * c.expert_hidden_size
    gain = FP8_GAIN if work.kernels.experts == "fp8" else 1.0
    read, made = _weight_traffic(work)
    expert_s = max(plain_s / gain, weights * read / gpu.memory_bandwidth) + weights * made / gpu.memory_bandwidth
    backward = dense_s * (1.0 if "language" in work.frozen else 2.0) + expert_s
    if "experts" not in work.frozen:  # the product for the weights, in BF16, or adding its result to the fp32 buffer
        backward += max(plain_s, weights * 2 * GRADIENT_BYTES / gpu.memory_bandwidth)
    return dense_s + expert_s, backward


def _weight_traffic(work: Work) -> tuple[float, float]:
    """Bytes a weight that the product of a pass reads, and those that move when a pass first makes what it reads."""
    experts, packed = work.kernels.experts, work.packed_experts
    if experts == "fp8":  # from blocks or from the weights
        return FP8, (MXFP4_BYTES if packed else BF16) + FP8
    if experts == "mxfp4" and not packed:  # transposed, then rounded
        return MXFP4_BYTES, BF16 + BF16 + BF16 + MXFP4_BYTES
    if packed and experts in ("bf16", "mxfp4"):  # the product decodes
        return MXFP4_BYTES, 0.0
    return BF16, MXFP4_BYTES + BF16 if packed else 0.0


def step_seconds(model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, *, efficiency: float) -> StepSeconds:
    """One optimizer step: the simulated pipeline, the data-parallel exchange that does not overlap, the optimizer.

    Raises:
        UsageError: the interleaved schedule cannot take this number of micro-batches.
    """
    num_micro_batches = work.num_micro_batches(layout)
    num_chunks = layout.pipeline * layout.virtual_pipeline
    chunks = [
        chunk_seconds(model, layout, gpu, work, chunk=chunk, efficiency=efficiency) for chunk in range(num_chunks)
    ]
    stages = tuple(_sum([chunks[c] for c in layout.chunks_of(rank)]) for rank in range(layout.pipeline))
    busiest = max(stages, key=lambda stage: stage.forward + stage.backward)
    pipeline_s = _pipeline_seconds(model, layout, gpu, work, chunks, busiest, num_micro_batches)
    reduce_s, gather_s = data_parallel_seconds(model, layout, gpu, work)
    first = stages[0]
    data_parallel = max(0.0, reduce_s - first.backward) + max(0.0, gather_s - first.forward)
    optimizer_s = max(
        OPTIMIZER_TRAFFIC * _owned(model, layout, work, rank) / gpu.memory_bandwidth for rank in range(layout.pipeline)
    )
    total = pipeline_s + data_parallel + optimizer_s
    rows = work.global_batch_rows
    flops = training_flops(
        model, num_tokens=rows * work.sequence_length, num_images=rows * work.images_per_row,
        document_length=work.document_length or work.sequence_length, frozen=work.frozen,
        target_share=work.target_share,
    )  # fmt: skip
    busy = num_micro_batches * (busiest.forward + busiest.backward)
    return StepSeconds(
        total=total, compute=busy - num_micro_batches * busiest.exchange,
        exchange=num_micro_batches * busiest.exchange, bubble=max(0.0, pipeline_s - busy), data_parallel=data_parallel,
        optimizer=optimizer_s, tokens_per_s_per_gpu=rows * work.sequence_length / total / layout.world_size,
        model_flops_per_s_per_gpu=flops / total / layout.world_size, images_per_s=rows * work.images_per_row / total,
        stages=stages,
    )  # fmt: skip


def least_step_seconds(model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, *, efficiency: float) -> float:
    """A step without bubble, data-parallel exchange or optimizer: no layout is faster, and it costs next to nothing."""
    stages = [
        _sum([
            chunk_seconds(model, layout, gpu, work, chunk=chunk, efficiency=efficiency)
            for chunk in layout.chunks_of(rank)
        ])
        for rank in range(layout.pipeline)
    ]  # fmt: skip
    return work.num_micro_batches(layout) * max(stage.forward + stage.backward for stage in stages)


def _sum(chunks: list[ChunkSeconds]) -> ChunkSeconds:
    return ChunkSeconds(
        forward=sum(c.forward for c in chunks), backward=sum(c.backward for c in chunks),
        exchange=sum(c.exchange for c in chunks),
    )  # fmt: skip


def send_seconds(model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work) -> float:
    """Hidden states of one micro-batch to the neighbouring pipeline stage."""
    if layout.pipeline == 1:
        return 0.0
    num_bytes = work.micro_batch_tokens / layout.tensor * model.language.hidden_size * BF16
    same_domain = layout.world_size <= gpu.gpus_per_domain
    return num_bytes / (gpu.domain_bandwidth if same_domain else gpu.network_bandwidth)


def _pipeline_seconds(
    model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work, chunks: list[ChunkSeconds],
    busiest: ChunkSeconds, num_micro_batches: int,
) -> float:  # fmt: skip
    if layout.pipeline == 1:
        return num_micro_batches * (busiest.forward + busiest.backward)

    def duration(current: Pass) -> float:
        chunk = chunks[current.chunk]
        return chunk.forward if current.forward else chunk.backward

    period = layout.pipeline if layout.virtual_pipeline > 1 else 1
    simulated = min(num_micro_batches, max(SIMULATED_MICRO_BATCHES, 3 * layout.pipeline) // period * period)
    simulated = max(simulated, min(num_micro_batches, period))
    timeline = simulate(
        duration, pipeline=layout.pipeline, virtual=layout.virtual_pipeline, num_micro_batches=simulated,
        send_s=send_seconds(model, layout, gpu, work),
    )  # fmt: skip
    return float(timeline.end) + (num_micro_batches - simulated) * (busiest.forward + busiest.backward)


def _owned(model: ModelConfig, layout: Layout, work: Work, pipeline_rank: int) -> float:
    """Parameters whose optimizer state a rank holds."""
    trained = rank_parameters(model, layout, pipeline_rank=pipeline_rank).trained(work.frozen)
    return (trained.total - trained.experts) / layout.data + trained.experts / layout.expert_data


def data_parallel_seconds(model: ModelConfig, layout: Layout, gpu: Accelerator, work: Work) -> tuple[float, float]:
    """Seconds to reduce the gradients (fp32) and to gather the weights (bf16) of the largest stage.

    Both collectives work within a domain first, so that a network adapter carries its share of the domain only.
    """
    reduce_s = gather_s = 0.0
    for rank in range(layout.pipeline):
        trained = rank_parameters(model, layout, pipeline_rank=rank).trained(work.frozen)
        parts = (
            # the data group of a rank has every tensor-degree-th rank of the stage, that of the experts every E-th
            (trained.total - trained.experts, layout.data, max(1, gpu.gpus_per_domain // layout.tensor)),
            (trained.experts, layout.expert_data, max(1, gpu.gpus_per_domain // layout.expert)),
        )
        seconds = sum(_collective_seconds(count, size, near, gpu) for count, size, near in parts)
        reduce_s, gather_s = max(reduce_s, seconds * GRADIENT_BYTES), max(gather_s, seconds * BF16)
    return reduce_s, gather_s


def _collective_seconds(count: float, size: int, near: int, gpu: Accelerator) -> float:
    """Seconds per byte of element of a reduce-scatter or all-gather of ``count`` elements over ``size`` ranks, ``near``
    of which share a domain."""
    if size == 1:
        return 0.0
    near = min(near, size)
    domains = math.ceil(size / near)
    inside = count * (near - 1) / near / gpu.domain_bandwidth
    outside = count / near * (domains - 1) / domains / gpu.network_bandwidth
    return inside + outside
