"""Starts a few ranks of a worker script for a test, under a deadline, and leaves none of them behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_medgpt.parallel.launch import meeting_of

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def run_ranks(num_ranks: int, *arguments: object, deadline_s: float = 900.0) -> tuple[bool, str]:
    """Run the worker on every rank; return whether all ended well in time, and what they printed."""
    ranks = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for rank in range(num_ranks):
            meeting, descriptors = meeting_of(rank, listener)
            world = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank), **meeting}
            command = [sys.executable, "-W", "ignore", str(WORKER), *map(str, arguments)]
            ranks.append(
                subprocess.Popen(
                    command, env=os.environ | world | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=descriptors,
                )
            )  # fmt: skip
    end = time.monotonic() + deadline_s
    outputs, late = [], False
    try:
        for process in ranks:
            try:
                outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                late = True
                os.killpg(process.pid, signal.SIGKILL)
                outputs.append(process.communicate()[0])
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    told = "\n".join(
        f"--- rank {rank}, exit {p.returncode}\n{out}" for rank, (p, out) in enumerate(zip(ranks, outputs))
    )
    if late:
        told = f"not done after {deadline_s} s\n{told}"
    return not late and all(process.returncode == 0 for process in ranks), told
