"""Parameters and memory of one rank, by arithmetic. No torch.

Parameters are exact (a test compares them with the modules). Training state is exact for the distributed optimizer:
weights and gradients whole, fp32 master weights and two moments split over the data-parallel ranks. Activations are
what the modules keep for the backward pass (``parallel.activations``, compared with the tensors that autograd keeps),
times the micro-batches in flight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_medgpt.config.schema import KernelConfig, LanguageConfig, ModelConfig, StageConfig, VisionConfig
from megatron_medgpt.parallel.activations import (
    AS_MEASURED,
    MicroBatch,
    head_bytes,
    is_fused,
    layer_bytes,
    layer_input_bytes,
    loss_peak_bytes,
    padded_rows,
    vision_bytes,
)
from megatron_medgpt.parallel.plan import Layout

GRADIENT_BYTES = 4
"""bf16 gradients are accumulated and reduced in fp32."""
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}
"""Master weight and two moments; fp32 weights are their own master."""
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
MXFP4_BYTES = 17 / 32
"""Frozen experts kept packed: 16 bytes of codes and one of scale for 32 values."""


@dataclass(frozen=True, kw_only=True)
class ModuleParameters:
    """Parameters by the names that stages freeze (``config.schema.MODULES``)."""

    encoder: int = 0
    projector: int = 0
    language: int = 0
    experts: int = 0
    router: int = 0

    @property
    def total(self) -> int:
        return self.encoder + self.projector + self.language + self.experts + self.router

    def trained(self, frozen: tuple[str, ...]) -> ModuleParameters:
        return ModuleParameters(**{k: 0 if k in frozen else v for k, v in self.__dict__.items()})


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of every micro-batch in flight, logits included."""
    workspace: int = 0
    """Held for a moment at the peak: the gradient of the logits, or the backward pass of one layer."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def model_parameters(config: ModelConfig) -> ModuleParameters:
    """Parameters of the whole model."""
    whole = Layout(
        world_size=1, tensor=1, pipeline=1, virtual_pipeline=1, expert=1, data=1, expert_data=1,
        layers_per_chunk=(config.language.num_layers,),
    )  # fmt: skip
    return rank_parameters(config, whole, pipeline_rank=0)


def rank_parameters(config: ModelConfig, layout: Layout, *, pipeline_rank: int) -> ModuleParameters:
    """Parameters that one rank of a pipeline stage holds."""
    language, chunks = config.language, layout.chunks_of(pipeline_rank)
    num_layers = sum(len(layout.layers_of_chunk(c)) for c in chunks)
    h, tp = language.hidden_size, layout.tensor
    dense = num_layers * _attention_parameters(language, tp)
    first, last = 0 in chunks, layout.pipeline * layout.virtual_pipeline - 1 in chunks
    vocab_rows = -(-language.vocab_size // tp)
    dense += (first + last) * vocab_rows * h + last * h
    return ModuleParameters(
        encoder=_vision_parameters(config.vision) if first else 0,
        projector=_projector_parameters(config) if first else 0,
        language=dense,
        experts=num_layers * (language.num_experts // layout.expert) * _expert_parameters(language),
        router=num_layers * (h + 1) * language.num_experts,
    )


def rank_expert_matrices(config: ModelConfig, layout: Layout, *, pipeline_rank: int) -> int:
    """Weights of a rank's experts without their biases: what MXFP4 packs."""
    language = config.language
    num_layers = sum(len(layout.layers_of_chunk(c)) for c in layout.chunks_of(pipeline_rank))
    each = 3 * language.hidden_size * language.expert_hidden_size
    return num_layers * (language.num_experts // layout.expert) * each


def _attention_parameters(c: LanguageConfig, tp: int) -> int:
    qkv = (c.num_attention_heads + 2 * c.num_query_groups) * c.head_dim // tp
    out = c.num_attention_heads * c.head_dim // tp
    return (
        qkv * (c.hidden_size + 1)
        + out * c.hidden_size
        + c.hidden_size
        + c.num_attention_heads // tp
        + 2 * c.hidden_size
    )


def _expert_parameters(c: LanguageConfig) -> int:
    return 3 * c.hidden_size * c.expert_hidden_size + 2 * c.expert_hidden_size + c.hidden_size


def _vision_parameters(c: VisionConfig) -> int:
    h, m = c.hidden_size, c.mlp_hidden_size
    layer = 4 * (h * h + h) + h * m + m + m * h + h + 4 * h
    positions = (c.pretrained_size_px // c.patch_size_px) ** 2
    patches = 3 * c.patch_size_px**2 * h
    num_layers = c.num_layers + 1 + c.feature_layer
    if c.kind == "clip":  # class token and its position, pre-norm; no bias on the patches
        return num_layers * layer + patches + (positions + 1) * h + h + 2 * h
    return num_layers * layer + patches + h + positions * h


def _projector_parameters(c: ModelConfig) -> int:
    width_in, h = c.vision.hidden_size * c.projector.pixel_shuffle**2, c.language.hidden_size
    middle = c.projector.hidden_size or h
    norm = 2 * width_in if c.projector.norm else 0
    return norm + width_in * middle + middle + middle * h + h


def rank_memory(
    config: ModelConfig, layout: Layout, stage: StageConfig, *, precision: str, recompute: str, pipeline_rank: int,
    target_share: float = 1.0, images_per_row: float = 0.0, routed_share: float = 1.0, attention: str = "flex",
    mxfp4_frozen: bool = False, kernels: KernelConfig = AS_MEASURED,
) -> RankMemory:  # fmt: skip
    """Bytes that one rank of a pipeline stage needs for training.

    Args:
        target_share: positions that are targets of the loss; only they go through the head.
        images_per_row: mean over the packed rows.
        routed_share: rows that the busiest rank's experts receive, over the mean.
        mxfp4_frozen: count frozen experts as packed, as a stage with ``experts: packed`` keeps them.
        kernels: of the run. The fused experts keep less for the backward pass; ``fp8`` and ``mxfp4`` make a layer's
            weights anew in each pass.
    """
    held = rank_parameters(config, layout, pipeline_rank=pipeline_rank)
    trained = held.trained(stage.frozen)
    optimizer = OPTIMIZER_BYTES[precision] * (
        (trained.total - trained.experts) / layout.data + trained.experts / layout.expert_data
    )
    b = WEIGHT_BYTES[precision]
    packed = (mxfp4_frozen or stage.experts == "packed") and "experts" in stage.frozen
    matrices = rank_expert_matrices(config, layout, pipeline_rank=pipeline_rank) if packed else 0
    weights = (held.total - matrices) * b + matrices * MXFP4_BYTES
    tokens = stage.sequence_length * stage.micro_batch_rows
    batch = MicroBatch(
        tokens=tokens, targets=round(tokens * target_share), images=images_per_row * stage.micro_batch_rows,
        rows=stage.micro_batch_rows,
    )  # fmt: skip
    activations, workspace = _activation_bytes(
        config, layout, stage, batch, bytes_per_value=b, recompute=recompute, pipeline_rank=pipeline_rank,
        routed_share=routed_share, attention=attention, kernels=kernels, packed=packed,
    )  # fmt: skip
    if packed and not is_fused(kernels):  # one matrix of one expert at a time, as its blocks lie and transposed
        workspace += 2 * 2 * config.language.hidden_size * config.language.expert_hidden_size * b
    return RankMemory(
        weights=int(weights), gradients=trained.total * GRADIENT_BYTES, optimizer=int(optimizer),
        activations=activations, workspace=workspace,
    )  # fmt: skip


def mxfp4_scratch_bytes(c: LanguageConfig, expert_ranks: int, bytes_per_value: int) -> tuple[int, int]:
    """One layer's experts in MXFP4, as a pass rounds them anew: while they are made, when gate and up lie transposed
    beside their blocks, and while they are used."""
    weights = c.num_experts // expert_ranks * c.hidden_size * c.expert_hidden_size
    return int(2 * weights * (bytes_per_value + MXFP4_BYTES)), int(3 * weights * MXFP4_BYTES)


def fp8_scratch_bytes(c: LanguageConfig, expert_ranks: int, bytes_per_value: int = 2) -> tuple[int, int]:
    """One layer's experts in E4M3 with a scale per 128x128 tile, as a pass makes them anew: while they are made, when
    one projection lies in both orientations, and while they are used."""
    h, f, experts = c.hidden_size, c.expert_hidden_size, c.num_experts // expert_ranks
    tiles = math.ceil(h / 128) * (math.ceil(2 * f / 128) + math.ceil(f / 128))
    used = experts * (3 * h * f + 4 * tiles)
    return used + experts * h * f, used


def chunks_in_flight(layout: Layout, pipeline_rank: int, num_micro_batches: int) -> int:
    """Micro-batches (of one model chunk each) whose activations a rank holds at its peak, under 1F1B and its
    interleaved form: those it runs ahead of the first backward pass, and the one it then computes."""
    p, v, r = layout.pipeline, layout.virtual_pipeline, pipeline_rank
    ahead = p - r - 1 if v == 1 else (p - r - 1) * 2 + (v - 1) * p
    return min(ahead + 1, num_micro_batches * v)


def _activation_bytes(
    config: ModelConfig, layout: Layout, stage: StageConfig, batch: MicroBatch, *, bytes_per_value: int,
    recompute: str, pipeline_rank: int, routed_share: float, attention: str, kernels: KernelConfig, packed: bool,
) -> tuple[int, int]:  # fmt: skip
    """Bytes kept at the peak of the schedule, and bytes held for a moment on top of them."""
    c, made = config.language, {"bytes_per_value": bytes_per_value, "tensor": layout.tensor}
    whole = layer_bytes(
        c, batch, attention=attention, routed_share=routed_share, kernels=kernels, expert=layout.expert, **made
    )
    kept = layer_input_bytes(c, batch, **made) if recompute == "layer" else whole
    num_micro_batches = max(1, stage.global_batch_rows // (stage.micro_batch_rows * layout.data))
    chunks = layout.chunks_of(pipeline_rank)
    in_flight = chunks_in_flight(layout, pipeline_rank, num_micro_batches)
    layers = sum(len(layout.layers_of_chunk(chunk)) for chunk in chunks) / len(chunks)
    total = in_flight * layers * kept
    workspace = _layer_backward_bytes(c, layout, stage, batch, bytes_per_value, routed_share, kernels)
    if kernels.experts == "fp8" or (kernels.experts == "mxfp4" and not packed):
        scratch = fp8_scratch_bytes if kernels.experts == "fp8" else mxfp4_scratch_bytes
        at_making, in_use = scratch(c, layout.expert, bytes_per_value)
        workspace = max(at_making, workspace + in_use)
    if recompute == "layer":
        workspace += whole
    if 0 in chunks:
        share = 1.0 if layout.virtual_pipeline == 1 else 1 / layout.virtual_pipeline
        frozen = "encoder" in stage.frozen
        total += max(1, in_flight * share) * vision_bytes(config, batch, frozen=frozen, kernels=kernels, **made)
    if layout.pipeline * layout.virtual_pipeline - 1 in chunks:
        total += head_bytes(c, batch, kernels=kernels, **made)
        loss = loss_peak_bytes(c, batch, kernels=kernels, frozen="language" in stage.frozen, **made)
        workspace = max(workspace, loss)
    return int(total), int(workspace)


def _layer_backward_bytes(
    c: LanguageConfig, layout: Layout, stage: StageConfig, batch: MicroBatch, bytes_per_value: int, routed_share: float,
    kernels: KernelConfig,
) -> int:  # fmt: skip
    """The largest moment of a layer's backward pass: gradients of the routed rows before and after the activation, and
    the gradient of all gate and up weights before it is added to the fp32 buffer (where it is written there directly,
    what autograd is given in its place)."""
    routed = batch.tokens / layout.tensor * c.num_experts_per_token * routed_share
    rows = routed * (c.hidden_size + 4 * c.expert_hidden_size)
    if is_fused(kernels):  # of the rows, before the activation (in FP8 too), the activation times its weight
        rounded = 2 * c.expert_hidden_size / bytes_per_value if kernels.experts == "fp8" else 0
        padded = padded_rows(routed, c.num_experts // layout.expert)
        rows = padded * (c.hidden_size + 3 * c.expert_hidden_size + rounded)
    weights = c.num_experts // layout.expert * c.hidden_size * 2 * c.expert_hidden_size
    return int((rows + (0 if "experts" in stage.frozen else weights)) * bytes_per_value)
