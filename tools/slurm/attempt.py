"""Decides by a run's marker whether a job that has ended is requeued. Standard library only: it runs on a bare node.

    attempt.py begin --out RUN --max-restarts K      before the ranks start; exit 0: start them, 1: give up
    attempt.py decide --out RUN --max-restarts K     after they have ended; exit 0: done, 10: requeue, 1: give up

A run is requeued when it was stopped (a signal ahead of the time limit or a preemption), when it crashed (an error that
nobody expected, such as a lost peer), or when its ranks are gone without a word (a killed process, a lost node). It is
given up when it says that it failed, when it never began, or after K restarts in a row that brought no new checkpoint.
It is not begun while another job trains in its folder.
When a node is lost Slurm may end this job's script too and requeue it by itself; such a restart is counted when the
next attempt begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

DONE, GIVE_UP, REQUEUE = 0, 1, 10
STARTING = "starting"


def marker(out: Path) -> dict:
    """``state.json`` of a run folder; empty where there is none."""
    try:
        found = json.loads((out / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def newest_step(out: Path) -> int:
    """Step of the newest published checkpoint, -1 without one."""
    folders = (out / "checkpoints").glob("step-*")
    return max((int(f.name[5:]) for f in folders if f.name[5:].isdigit()), default=-1)


def begin(out: Path, max_restarts: int, job: str = "") -> tuple[int, str]:
    """Note where the run stands, and that this attempt has not trained yet.

    Args:
        job: Slurm's number of the job, the same in every attempt of it.

    Returns:
        Whether to start, and why not.
    """
    out.mkdir(parents=True, exist_ok=True)
    history, step = _history(out), newest_step(out)
    if history.get("job") != job:  # somebody has sent it anew
        if history.get("undecided") and _is_running(history["job"]):
            return GIVE_UP, f"given up: job {history['job']} trains in {out}; scancel it first, or set another out"
        history = {"job": job, "step": step, "restarts_without_progress": 0}
    elif history.get("undecided"):
        _count(history, step)
    _write(out / "attempts.json", {**history, "undecided": True})
    restarts = history["restarts_without_progress"]
    if restarts and restarts >= max_restarts:
        return GIVE_UP, f"given up: {restarts} restarts in a row without a checkpoint after step {step}"
    _write(out / "state.json", {"status": STARTING})
    return DONE, ""


def decide(out: Path, max_restarts: int) -> tuple[int, str]:
    """What to do with a job whose ranks have ended, and why in one line."""
    state, history, step = marker(out), _history(out), newest_step(out)
    status = state.get("status")
    if status == "done":
        return DONE, f"done after step {state.get('step')}"
    if status == "failed":
        return GIVE_UP, f"not requeued: the run failed: {state.get('reason', 'no reason given')}"
    if status == STARTING or status is None:
        return GIVE_UP, "not requeued: training never began; the lines above say why"
    _count(history, step)
    _write(out / "attempts.json", {**history, "undecided": False})
    restarts = history["restarts_without_progress"]
    if restarts >= max_restarts:
        return GIVE_UP, f"not requeued: {restarts} restarts in a row without a checkpoint after step {step}"
    what = {"stopped": "stopped", "crashed": f"crashed ({state.get('reason')})"}.get(status, "ended without a word")
    return REQUEUE, f"requeued: {what}; checkpoint of step {step}, {restarts} restart(s) without a new one"


def _is_running(job: str) -> bool:
    """Whether Slurm has this job on its nodes; no where it cannot say."""
    try:
        states = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return states.stdout.strip() in ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


def _count(history: dict, step: int) -> None:
    """One more restart, with or without a checkpoint since the last."""
    progress = step > history.get("step", -1)
    history["restarts_without_progress"] = 0 if progress else history.get("restarts_without_progress", 0) + 1
    history["step"] = step


def _history(out: Path) -> dict:
    try:
        return json.loads((out / "attempts.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write(path: Path, content: dict) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(aside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("begin", "decide"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-restarts", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.action == "begin":
        code, reason = begin(arguments.out, arguments.max_restarts, os.environ.get("SLURM_JOB_ID", ""))
    else:
        code, reason = decide(arguments.out, arguments.max_restarts)
    if reason:
        print(reason)
    return code


if __name__ == "__main__":
    sys.exit(main())
