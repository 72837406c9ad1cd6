"""Sections ``parallel`` and ``kernels``: how a model lies on its ranks, and what computes it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_medgpt.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh. Data parallelism is what is left of the world; tensor > 1 brings sequence parallelism."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved 1F1B when > 1)."""
    expert: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    """Decoder layers of each pipeline stage in model order (``pipeline * virtual_pipeline`` numbers), for uneven
    splits; even when not given. The encoder and the embedding stand on the first, the head on the last."""

    def __post_init__(self) -> None:
        positive(
            "parallel", tensor=self.tensor, pipeline=self.pipeline, virtual_pipeline=self.virtual_pipeline,
            expert=self.expert,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation serves each slot. ``auto`` is the fastest that serves this machine; nothing falls back
    silently: a named implementation that cannot serve a call is an error."""

    attention: Literal["auto", "reference", "flex"] = "auto"
    experts: Literal["auto", "reference", "grouped", "bf16", "fp8", "mxfp4"] = "auto"
    """``bf16``: fused, in the run's precision. ``fp8``: products of experts in E4M3. ``mxfp4``: expert weights rounded
    to MXFP4 at every use, with a straight-through gradient. On a CPU these three are plain PyTorch. ``auto`` is
    ``grouped``, PyTorch's products, until the fused ones have been measured on a GPU."""
    expert_schedule: Literal["auto", "triton", "tma", "tma-4-stages", "tma-wide", "tma-persistent"] = "auto"
    """How the fused experts' products are launched (``kernels/README.md``): the sums are the same. ``auto`` is
    ``triton`` until another has been measured to be faster on a GPU. The others need ``experts`` bf16, fp8 or mxfp4 and
    Hopper."""
    expert_gradients: Literal["auto", "autograd", "direct"] = "auto"
    """``direct`` (``auto``) writes gradients of expert weights into the optimizer's buffer expert by expert;
    ``autograd`` makes them for all experts of a layer and then adds them. On a CPU the bits are the same."""
    router: Literal["auto", "reference", "fused"] = "auto"
    """``fused``: logits, choice and weights in one pass, logits in float32 (plain PyTorch on a CPU). ``auto`` is
    ``reference``, PyTorch's operations in the run's precision, until the fused one has been measured on a GPU."""
    permute: Literal["auto", "engine", "fused"] = "auto"
    """``fused`` sends rows in the order of their experts and lets the experts gather what they multiply; needs
    ``experts`` bf16, fp8 or mxfp4. ``auto`` is ``engine``, megatron-core's sorting before and after the experts."""
    dispatch: Literal["bf16", "fp8"] = "bf16"
    """Numbers of the rows that expert-parallel ranks send each other: ``bf16`` is the run's precision."""
    projector: Literal["auto", "reference", "fused"] = "auto"
    """``fused`` writes the projected rows into the sequence; it needs Triton."""
    loss: Literal["auto", "whole", "chunked"] = "auto"
    """``chunked`` never holds the logits of all tokens; it makes them twice. ``auto`` is ``whole``."""

    def __post_init__(self) -> None:
        choices = {
            "attention": ("auto", "reference", "flex"),
            "experts": ("auto", "reference", "grouped", "bf16", "fp8", "mxfp4"),
            "expert_schedule": ("auto", "triton", "tma", "tma-4-stages", "tma-wide", "tma-persistent"),
            "expert_gradients": ("auto", "autograd", "direct"),
            "router": ("auto", "reference", "fused"),
            "permute": ("auto", "engine", "fused"),
            "dispatch": ("bf16", "fp8"),
            "projector": ("auto", "reference", "fused"),
            "loss": ("auto", "whole", "chunked"),
        }
        for name, allowed in choices.items():
            require(
                getattr(self, name) in allowed,
                f"kernels.{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}",
            )
        require(
            self.expert_schedule == "auto" or self.experts in ("bf16", "fp8", "mxfp4"),
            f"kernels.expert_schedule={self.expert_schedule} launches the fused experts, which "
            f"kernels.experts={self.experts} does not use; set kernels.experts to bf16, fp8 or mxfp4",
        )
        require(
            self.permute != "fused" or self.experts in ("bf16", "fp8", "mxfp4"),
            f"kernels.permute=fused gives the experts rows in any order, which kernels.experts={self.experts} does not "
            "take; set kernels.experts to bf16, fp8 or mxfp4",
        )
