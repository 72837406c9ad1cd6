"""All-reduce bandwidth of a job's nodes, in pairs of neighbours and over all, so that a slow link has a name.

Started by torchrun on every node (tools/slurm/preflight.sh). Bus bandwidth as nccl-tests counts it: 2 (n - 1) / n times
bytes over seconds. Exit code 3 when it is below what is expected.
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

EXPECTED_GB_S = {"h100": (300, 150), "h200": (300, 150), "b200": (550, 150), "b300": (550, 300),
                 "gb200": (550, 550), "gb300": (550, 550), "cpu": (0, 0)}  # fmt: skip
"""Half to two thirds of what healthy systems reach: within a node, across nodes (8 adapters of 400 or 800 Gb/s)."""


def bus_bandwidth(values: torch.Tensor, group: dist.ProcessGroup | None, repeats: int) -> float:
    """GB/s."""
    size = dist.get_world_size(group)
    dist.all_reduce(values, group=group)
    _wait(values)
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(values, group=group)
    _wait(values)
    seconds = (time.perf_counter() - started) / repeats
    return 2 * (size - 1) / size * values.numel() * values.element_size() / seconds / 1e9


def _wait(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", choices=sorted(EXPECTED_GB_S), default="cpu")
    parser.add_argument("--min-gb-s", type=float, default=0, help="across nodes; 0: known by the kind of GPU")
    options = parser.parse_args()
    on_gpu = options.gpu != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=3))
    rank, size, here = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    values = torch.ones((256 if on_gpu else 4) * 2**20 // 4, device="cuda" if on_gpu else "cpu")
    names: list = [None] * size
    dist.all_gather_object(names, os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    within, across = EXPECTED_GB_S[options.gpu]
    across = options.min_gb_s or across
    faults = []
    for first in range(0, size, here):  # each node alone
        group = dist.new_group(list(range(first, first + here)))
        if here > 1 and first <= rank < first + here:
            reached = bus_bandwidth(values, group, 10)
            if rank == first and reached < within:
                faults.append(f"node {names[rank]}: {reached:.0f} GB/s within the node, {within} expected")
        dist.barrier()
    for first in range(0, size - here, here):  # each node with its neighbour
        group = dist.new_group(list(range(first, first + 2 * here)))
        if first <= rank < first + 2 * here:
            reached = bus_bandwidth(values, group, 10)
            if rank == first and reached < across:
                pair = " and ".join(sorted((names[first], names[first + here])))  # torchrun ranks nodes as they come
                faults.append(f"nodes {pair}: {reached:.2f} GB/s between them, {across:g} expected")
        dist.barrier()
    all_faults: list = [None] * size
    dist.all_gather_object(all_faults, faults)
    found = sorted({fault for of_rank in all_faults for fault in of_rank})
    if rank == 0:
        for fault in found:
            print(f"preflight: {fault}", file=sys.stderr)
        if not found:
            print(f"preflight: all-reduce {bus_bandwidth_text(values)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 3 if found else 0


def bus_bandwidth_text(values: torch.Tensor) -> str:
    return f"of {values.numel() * values.element_size() / 2**20:.0f} MiB is as fast as expected on every link"


if __name__ == "__main__":
    sys.exit(main())
