"""The world of ranks: starting it, and the process groups of one layout. The environment is read here only."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.platform import Platform, platform, prepare_engine

prepare_engine()

from megatron.core import parallel_state  # noqa: E402  (after the engine was prepared)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    local_rank: int
    """Place among the ranks of the same node."""
    platform: Platform
    timeout_s: float

    @property
    def device(self) -> torch.device:
        return self.platform.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_s: float = 600.0, kind: str = "auto") -> World:
    """Join the world that torchrun or srun has described in the environment; alone where nothing describes one.

    Args:
        timeout_s: seconds after which a collective whose peers are missing fails instead of waiting.
        kind: ``auto``, ``cuda`` or ``cpu`` (see ``platform``).

    Raises:
        UsageError: when the environment describes a world in part only, or the platform cannot be had.
    """
    described = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    alone = "RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone and len(described) < len(LAUNCHER_VARIABLES):
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        raise UsageError(
            f"the environment describes a world only in part: {', '.join(missing)} not set; start with torchrun or "
            f"--nproc, or unset {', '.join(described)}"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = platform(local_rank, kind)
    if chosen.is_cuda:
        torch.cuda.set_device(chosen.device)
    timeout = datetime.timedelta(seconds=timeout_s)
    if alone:
        dist.init_process_group(chosen.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(chosen.backend, timeout=timeout)
    return World(
        rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, platform=chosen, timeout_s=timeout_s
    )


def build_groups(layout: Layout, timeout_s: float = 600.0) -> ProcessGroupCollection:
    """Process groups of a layout. Every rank of the world calls it, with the same layout.

    megatron-core keeps the groups in ``parallel_state`` as well (parts of it still look there), so one layout lives at
    a time: ``destroy_groups`` before the next.

    Raises:
        UsageError: when the layout was made for another world size.
    """
    if layout.world_size != dist.get_world_size():
        raise UsageError(
            f"the layout {layout.describe()} is for {layout.world_size} processes, {dist.get_world_size()} are running"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_groups() -> None:
    """Forget the groups of the current layout, so that the next stage can use another in the same processes."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave the world."""
    destroy_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
