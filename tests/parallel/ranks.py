"""Runs a program on several ranks, each in a process group of its own, under one deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_medgpt.parallel.launch import meeting_of


def run_ranks(program: Path, arguments: Sequence[str], *, num_ranks: int, deadline_s: float, folder: Path) -> None:
    """Run ``program`` once per rank and wait.

    Raises:
        AssertionError: a rank failed or the deadline passed; with the end of its output.
    """
    environment = {
        **os.environ, "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    processes, logs = [], []
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(num_ranks):
                logs.append(folder / f"rank-{num_ranks}-{rank}.log")
                meeting, descriptors = meeting_of(rank, listener)
                with logs[-1].open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, str(program), *arguments], stdout=log, stderr=subprocess.STDOUT,
                            env={**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                            start_new_session=True, pass_fds=descriptors,
                        )
                    )  # fmt: skip
        end = time.monotonic() + deadline_s
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > end:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        tails = "\n".join(f"--- rank {rank}: {codes[rank]}\n{_tail(log)}" for rank, log in enumerate(logs))
        assert codes == [0] * num_ranks, f"ranks ended with {codes} (None: still running after {deadline_s} s)\n{tails}"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])
