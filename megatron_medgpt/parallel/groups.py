"""The world of ranks: starting it, and the process groups of one layout. The environment is read here only."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.parallel.launch import LISTENER, node_of_rank
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.platform import Platform, platform, prepare_engine

prepare_engine()

from megatron.core import parallel_state  # noqa: E402  (after the engine was prepared)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEET_S = 600.0
"""Seconds for all ranks to come, unless MEDGPT_MEET_SECONDS says otherwise: hundreds of nodes that read Python from one
file system take minutes."""


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
        WorkError: a rank has not come in time, or the port is taken; names the rank and its node, or the port.
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
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, size, float(os.environ.get("MEDGPT_MEET_SECONDS", MEET_S)))
        store.set_timeout(timeout)
        dist.init_process_group(chosen.backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(
        rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, platform=chosen, timeout_s=timeout_s
    )


def meet(rank: int, size: int, deadline_s: float) -> dist.Store:
    """The store of the first rank, when all ranks have come to it. PyTorch's own meeting says at its timeout how many
    are missing, not which.

    Raises:
        WorkError: not all came within the deadline, or the first rank cannot open its port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    at, end = f"{address}:{port}", time.monotonic() + deadline_s
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store
    serves = rank == 0 and not agent_serves
    listener = os.environ.pop(LISTENER, None) if serves else None
    try:
        served = dist.TCPStore(
            address, port, size, is_master=serves, timeout=datetime.timedelta(seconds=deadline_s),
            wait_for_workers=False, multi_tenant=True, master_listen_fd=None if listener is None else int(listener),
        )  # fmt: skip
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if serves:
            cause = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise WorkError(f"cannot serve the other ranks at {at}: {cause}; set another MASTER_PORT") from None
        raise WorkError(f"rank 0 did not answer at {at} within {deadline_s:.0f} s") from None
    store = dist.PrefixStore(f"medgpt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", served)
    try:
        store.set(f"here-{rank}", "")
        if rank > 0:
            came = _wait_for(store, "all", end)
        elif came := all(_wait_for(store, f"here-{other}", end) for other in range(size)):
            store.set("all", "")
        missing = "" if came else _missing(store, size)
    except (dist.DistNetworkError, dist.DistStoreError):
        came, missing = False, "rank 0 has gone"
    if not came:
        raise WorkError(f"not all of the {size} ranks came to {at} within {deadline_s:.0f} s: {missing}")
    return store


def _wait_for(store: dist.Store, key: str, end: float) -> bool:
    """Asks again and again, for ``store.wait`` prints PyTorch's own warnings when it times out."""
    pause_s = 0.02
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(pause_s)
        pause_s = min(1.0, 1.5 * pause_s)
    return True


def _missing(store: dist.Store, size: int) -> str:
    ranks = [rank for rank in range(size) if not store.check([f"here-{rank}"])]
    shown = ", ".join(f"rank {rank} ({node_of_rank(rank, os.environ)})" for rank in ranks[:8])
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


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
    """Forget the groups of the current layout, so that the next stage can use another in the same processes.

    megatron-core drops its references, but torch keeps the groups, and every gloo group has two threads: 780 were left
    after 20 layouts. So gloo's are really ended.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    listed = parallel_state._global_process_group_list or ()
    own = [group for group in listed if group not in (None, dist.GroupMember.NON_GROUP_MEMBER)]
    of_gloo = [group for group in own if dist.get_backend(group) == "gloo"]
    parallel_state.destroy_model_parallel()
    for group in of_gloo:
        with contextlib.suppress(ValueError):  # some of them the engine has ended itself
            dist.destroy_process_group(group)


def stop() -> None:
    """Leave the world."""
    destroy_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
