"""Kills saves and looks at what is left: ``checkpoint_crashes.py <folder> <num_random> <seed>``.

The libraries are loaded once; the ranks of every case are forked from here, because loading takes longer than the rest.
Prints one JSON object per case.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_medgpt.checkpoint.find import find_latest, verify
from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.manifest import CheckpointFacts, step_folders
from megatron_medgpt.checkpoint.save import save_checkpoint

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor

POINTS = {
    "staging folder made": 1, "tensors written": 1, "files hashed": 1, "manifest written": 1, "renamed": 2,
    "latest written aside": 2, "old checkpoint renamed": 2,
}  # fmt: skip
"""Where a save says it stands -> the newest whole checkpoint when a process dies there while saving step 2."""
EVERY_RANK = ("staging folder made", "tensors written", "files hashed")
DEADLINE_S = 300.0
"""Of what takes a second: it ends a hang. A busy machine takes its time."""


class AtPoint(logging.Handler):
    """Sends this process a signal when the save says that it has come to a point."""

    def __init__(self, point: str, signum: int) -> None:
        super().__init__(logging.DEBUG)
        self.message, self.signum = f"save: {point}", signum

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == self.message:
            os.kill(os.getpid(), self.signum)


def state(step: int, num_ranks: int, rank: int, num_rows: int = 64) -> dict[str, dict[str, ShardedTensor]]:
    rows = torch.full((num_rows, 256), float(step)) + torch.arange(num_rows * 256).view(num_rows, 256) * 1e-6
    own = ShardedTensor.from_rank_offsets("weight", rows + rank, (0, rank, num_ranks))
    return {"model0": {"weight": own}}


def join(folder: Path, rank: int, num_ranks: int) -> None:
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))


def save(folder: Path, step: int, rank: int, num_ranks: int, **options: object) -> None:
    save_checkpoint(folder / "run", step, state(step, num_ranks, rank), CheckpointFacts(step=step), **options)


def fork(work: Callable[[], object], log: Path) -> int:
    """Start ``work`` in a process group of its own; its exit status is 0, or 1 with a traceback in ``log``."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 0
    try:
        work()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def wait(pids: list[int], *, stopped: int | None = None) -> list[int | None]:
    """Exit codes (negative: the signal that ended it), None for what had to be ended: at the deadline, or the process
    ``stopped`` when all the others have ended."""
    end, codes = time.monotonic() + DEADLINE_S, {}
    while codes.keys() | {stopped} < {*pids, stopped} and time.monotonic() < end:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in pids:
        if pid not in codes:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def examine(folder: Path) -> dict[str, object]:
    """What a new process finds: the newest checkpoint, whether all published ones are whole, and that it can go on."""

    def look() -> None:
        (folder / "store").unlink(missing_ok=True)
        join(folder, 0, 1)
        newest = find_latest(folder / "run")
        whole = [path.name for path in step_folders(folder / "run") if verify(path)]
        pointer = (folder / "run" / "latest").read_text().strip()
        values = state(0, 1, 0, num_rows=128)
        loaded, facts = load_checkpoint(newest, values)
        expected = torch.cat([state(facts.step, 2, rank)["model0"]["weight"].data for rank in (0, 1)])
        litter = list((folder / "run").glob(".*"))
        following = facts.step + 100
        save(folder, following, 0, 1)
        left = list((folder / "run").glob(".*"))
        found = {
            "newest": facts.step, "published": len(whole), "latest is whole": pointer in whole, "litter": len(litter),
            "right values": torch.equal(loaded["model0"]["weight"], expected), "litter after next save": len(left),
        }  # fmt: skip
        (folder / "found.json").write_text(json.dumps(found))

    codes = wait([fork(look, folder / "look.log")])
    if codes != [0]:
        return {"error": (folder / "look.log").read_text()}
    return json.loads((folder / "found.json").read_text())


def at_point(folder: Path, point: str, victim: int, signum: int, timeout_s: float) -> dict[str, object]:
    folder.mkdir(parents=True)

    def rank_work(rank: int) -> None:
        join(folder, rank, 2)
        save(folder, 1, rank, 2)
        if rank == victim:
            logger = logging.getLogger("megatron_medgpt.checkpoint.save")
            logger.setLevel(logging.DEBUG)
            logger.addHandler(AtPoint(point, signum))
        save(folder, 2, rank, 2, keep=1, timeout_s=timeout_s)

    pids = [fork(lambda rank=rank: rank_work(rank), folder / f"rank{rank}.log") for rank in (0, 1)]
    return {"exits": wait(pids, stopped=pids[victim] if signum == signal.SIGSTOP else None), **examine(folder)}


def at_random(folder: Path, draw: random.Random) -> dict[str, object]:
    """Save without pause and kill one rank at a random moment."""
    folder.mkdir(parents=True)

    def rank_work(rank: int) -> None:
        join(folder, rank, 2)
        for step in range(1, 10_000):
            save(folder, step, rank, 2, keep=3)

    pids = [fork(lambda rank=rank: rank_work(rank), folder / f"rank{rank}.log") for rank in (0, 1)]
    end = time.monotonic() + DEADLINE_S
    while not (folder / "run" / "latest").exists() and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(draw.random() * 0.3)
    os.kill(pids[draw.randrange(2)], signal.SIGKILL)
    in_save = any(path.name.startswith(".tmp") for path in (folder / "run").iterdir())
    return {"exits": wait(pids), "in save": in_save, **examine(folder)}


if __name__ == "__main__":
    root, num_random, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    for point in POINTS:
        for victim in (0, 1) if point in EVERY_RANK else (0,):
            found = at_point(root / f"{point}-{victim}", point, victim, signal.SIGKILL, 240)
            print(json.dumps({"case": "killed", "point": point, "victim": victim, **found}), flush=True)
    found = at_point(root / "stopped", "tensors written", 1, signal.SIGSTOP, 8)
    print(json.dumps({"case": "stopped", **found}), flush=True)
    for number in range(num_random):
        print(
            json.dumps({"case": "random", "number": number, **at_random(root / f"random-{number}", draw)}), flush=True
        )
