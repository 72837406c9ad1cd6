"""A whole run: its stages, its model, and where everything goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_medgpt.config.checks import positive, require
from megatron_medgpt.config.layout import KernelConfig, ParallelConfig
from megatron_medgpt.config.model import ModelConfig
from megatron_medgpt.config.stage import StageConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: int = 500
    """Steps between checkpoints; one is always written at the end of a stage."""
    keep: int = 2
    """Newest verified checkpoints kept; ends of stages are always kept."""
    start_from: str | None = None
    """A checkpoint folder whose weights the first stage starts from; random initialisation when not given."""

    def __post_init__(self) -> None:
        positive("checkpoint", interval=self.interval, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = 10
    """Steps between progress lines. metrics.jsonl gets every step."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        positive("log", interval=self.interval)


IMAGE_READERS = ("auto", "dali", "pillow")
"""What decodes pictures for the encoder: DALI where it is installed when ``auto``."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: what is trained, on what, how it is split, and where everything goes."""

    name: str
    out: str
    """Run folder."""
    tokenizer: str
    """Folder with tokenizer.json (see ``data/text``)."""
    stages: tuple[StageConfig, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "layer"] = "none"
    """``layer`` keeps only each layer's input and computes the rest again in the backward pass."""
    image_reader: Literal["auto", "dali", "pillow"] = "auto"
    seed: int = 1234
    num_threads: int = 0
    """CPU threads per rank; 0 shares the machine's cores among its ranks."""

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages is empty; a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages have the same name twice: {names}")
        require(self.precision in ("bf16", "fp32"), f"precision={self.precision!r}; allowed: bf16, fp32")
        require(self.recompute in ("none", "layer"), f"recompute={self.recompute!r}; allowed: none, layer")
        require(self.num_threads >= 0, f"num_threads is {self.num_threads}; it must be 0 or more")
        for stage in self.stages:
            require(
                stage.sequence_length <= self.model.language.max_length,
                f"stages.{stage.name}.sequence_length={stage.sequence_length} exceeds "
                f"model.language.max_length={self.model.language.max_length}",
            )
            require(
                stage.sequence_length > self.model.tokens_per_image,
                f"stages.{stage.name}.sequence_length={stage.sequence_length} cannot hold one image of "
                f"{self.model.tokens_per_image} tokens",
            )
            for name in ("hidden_size", "expert_hidden_size"):
                size = getattr(self.model.language, name)
                require(
                    stage.experts == "plain" or size % 32 == 0,
                    f"stages.{stage.name}.experts=packed: MXFP4 shares a scale among 32 values, and "
                    f"model.language.{name}={size} does not divide by 32; set it to plain",
                )

    def layout_of(self, stage: StageConfig) -> ParallelConfig:
        """Degrees of the mesh of one stage."""
        return stage.parallel or self.parallel
