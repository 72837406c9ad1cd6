"""The whole configuration of a run: frozen dataclasses, each checked when it is built.

A config is never changed after it is built; numbers that follow from it are computed where they are needed
(``parallel.plan`` for the layout). Checks that need only one section live in its ``__post_init__``; checks across
sections live in ``RunConfig.__post_init__``. No torch is imported here.

The sections stand in files of their own (``model``, ``layout``, ``stage``, ``run``) and are imported from here.
"""

from __future__ import annotations

from megatron_medgpt.config.layout import KernelConfig, ParallelConfig
from megatron_medgpt.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_medgpt.config.run import IMAGE_READERS, CheckpointConfig, LogConfig, RunConfig
from megatron_medgpt.config.stage import (
    MODULES,
    VALIDATION_METRICS,
    AugmentConfig,
    BlendConfig,
    ExitConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    lower_is_better,
)

__all__ = [
    "IMAGE_READERS",
    "MODULES",
    "VALIDATION_METRICS",
    "AugmentConfig",
    "BlendConfig",
    "CheckpointConfig",
    "ExitConfig",
    "KernelConfig",
    "LanguageConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProjectorConfig",
    "RunConfig",
    "ScheduleConfig",
    "StageConfig",
    "VisionConfig",
    "lower_is_better",
]
