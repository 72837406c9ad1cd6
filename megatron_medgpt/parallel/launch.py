"""Start the ranks of a run on this machine, one process each, and bring them down together.

``torchrun`` and ``srun`` start ranks too; this is what ``medgpt train --nproc N`` uses. It differs from torchrun in
what a person at a terminal sees: no agent, no second traceback, and the exit code of the rank that failed first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from megatron_medgpt.config.errors import UsageError

GRACE_S = 20.0
"""Seconds that the other ranks get to end by themselves when one has failed."""
STOPPED_GRACE_S = 5.0
"""The same when the first was told to stop and has: the others may wait for it where Python hears no signal."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LISTENER = "MEDGPT_LISTENER"
"""Environment variable of rank 0: its open socket on MASTER_PORT. A port that is only looked for may be gone when rank
0 has imported everything and opens it."""


def launched() -> bool:
    """True in a rank that torchrun, srun or ``run_ranks`` has started. Describes the world of an srun task."""
    if "RANK" not in os.environ and _is_srun_task(os.environ):
        os.environ.update(world_of_srun(os.environ))
    return "RANK" in os.environ


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _num_tasks(environment) > 1


def _num_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))


def world_of_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task that srun has started: one task per rank, no torchrun.

    MASTER_ADDR and MASTER_PORT are taken from the environment where they are set (tools/slurm sets both), else they are
    the first host of the step and a port made of the job's number.

    Raises:
        UsageError: Slurm cannot say who the first host is.
    """
    world = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_num_tasks(environment)),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        # "2(x3),1": two tasks on each of three nodes, one on the last
        "LOCAL_WORLD_SIZE": environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    return {**world, "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(nodes)}


def _first_host(nodes: str) -> str:
    try:
        return _hosts(nodes)[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"srun: the first of the nodes {nodes} is not known ({error}); set MASTER_ADDR") from None


def _hosts(nodes: str) -> list[str]:
    """Names in Slurm's short form, ``n[1-2],n7``."""
    if "[" not in nodes:
        return nodes.split(",")
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()


def node_of_rank(rank: int, environment: Mapping[str, str]) -> str:
    """``node n2`` where Slurm can say it, else ``node 1`` counted from 0; nodes have equally many ranks."""
    number = rank // int(environment.get("LOCAL_WORLD_SIZE", "1"))
    try:
        hosts = _hosts(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")))
    except (OSError, subprocess.CalledProcessError):
        hosts = []
    return f"node {hosts[number]}" if number < len(hosts) and hosts[number] else f"node {number}"


def run_ranks(arguments: Sequence[str], num_ranks: int) -> int:
    """Run ``python -m megatron_medgpt ARGUMENTS`` as ``num_ranks`` ranks and wait for all.

    SIGINT, SIGTERM and SIGUSR1 are passed on once to every rank, which then save and stop at the same step. When a
    rank fails, the others get ``GRACE_S`` seconds (``STOPPED_GRACE_S`` where it was told to stop), then their process
    groups are killed.

    Returns:
        0, or the exit code of the rank that failed first (128 + signal when a signal ended it).
    """
    ranks: list[subprocess.Popen[bytes]] = []
    told: list[int] = []

    def tell(number: int, _frame: object) -> None:
        told.append(number)
        _signal_all(ranks, number)

    previous = {number: signal.signal(number, tell) for number in STOP_SIGNALS}
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(num_ranks):
                ranks.append(_start_rank(arguments, rank, num_ranks, listener))
        if told:  # before the last was there
            _signal_all(ranks, told[0])
        return _wait(ranks, told)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks:
            _kill_group(process)


def meeting_of(rank: int, listener: socket.socket) -> tuple[dict[str, str], tuple[int, ...]]:
    """What a rank on this machine needs to meet the others: variables, and descriptors to pass on to it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    return (place, ()) if rank else ({**place, LISTENER: str(listener.fileno())}, (listener.fileno(),))


def _start_rank(
    arguments: Sequence[str], rank: int, num_ranks: int, listener: socket.socket
) -> subprocess.Popen[bytes]:
    meeting, descriptors = meeting_of(rank, listener)
    environment = {
        # A rank that waits for one that has ended prints thirty frames of C++; why it ended stands above in one line.
        **({} if os.environ.get("MEDGPT_DEBUG") else {"TORCH_CPP_LOG_LEVEL": "ERROR"}),
        **os.environ,
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        **meeting,
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_medgpt", *arguments]
    # Python's own start would end in a traceback at Ctrl-C: the rank hears it when it can say so (``__main__``).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # A session of its own: a signal from the terminal reaches a rank once, through us, and killpg its children.
        return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=descriptors)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(ranks: list[subprocess.Popen[bytes]], told: Sequence[int]) -> int:
    first_failed, deadline = None, None
    while None in [process.poll() for process in ranks]:  # of all: one that has failed behind one that waits is seen
        if deadline is None and (first_failed := _failed(ranks)) is not None:
            has_stopped = ranks[first_failed].returncode in {code for n in told for code in (128 + n, -n)}
            deadline = time.monotonic() + (STOPPED_GRACE_S if has_stopped else GRACE_S)
        if deadline is not None and time.monotonic() > deadline:
            for process in ranks:
                _kill_group(process)
        time.sleep(0.05)
    if told and ranks[0].returncode == -signal.SIGKILL:  # before it could say so
        print(f"medgpt: stopped by {signal.Signals(told[0]).name}", file=sys.stderr, flush=True)
    first_failed = _failed(ranks) if first_failed is None else first_failed
    if first_failed is None:
        return 0
    code = ranks[first_failed].returncode
    if code >= 0:
        return code
    print(f"medgpt: rank {first_failed} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    return 128 - code


def _failed(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that has ended with another code than 0."""
    return next((rank for rank, process in enumerate(ranks) if process.returncode not in (None, 0)), None)


def _signal_all(ranks: list[subprocess.Popen[bytes]], signum: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signum)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Also after the rank has ended: its checkpoint writers may have outlived it.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
