"""A small state of sharded tensors, and a checkpoint of it, for tests that need no model."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.save import save_checkpoint

SHAPES = {"embedding.weight": (96, 32), "layer.weight": (4, 33, 7), "head.bias": (5,)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded(values: dict[str, torch.Tensor]) -> dict[str, dict[str, ShardedTensor]]:
    return {"model0": {name: ShardedTensor.from_rank_offsets(name, value) for name, value in values.items()}}


def blank() -> dict[str, dict[str, ShardedTensor]]:
    return sharded({name: torch.zeros(shape) for name, shape in SHAPES.items()})


def write(folder: Path, step: int, **facts: object) -> Path:
    return save_checkpoint(folder, step, sharded(tensors(step)), CheckpointFacts(step=step, **facts))  # type: ignore[arg-type]
