"""``state.json`` of a run folder: whether the run goes on, for whoever started it and whoever looks.

Exit codes cannot tell: torchrun returns 1 whether its ranks have saved and stopped or have failed. Launchers requeue a
run that is ``stopped`` or ``crashed`` (an error that nobody expected, such as a lost peer), or ``running`` though its
processes are gone; one that is ``done`` or ``failed`` they leave.

A process that is killed, or whose machine loses power, writes nothing any more. So ``running`` names its process, and
``read_state`` looks whether it is still there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_medgpt.observe.metrics import METRICS_FILE
from megatron_medgpt.observe.progress import duration
from megatron_medgpt.observe.whole import write_whole

NAME = "state.json"
Status = Literal["running", "stopped", "done", "failed", "crashed"]
TAIL_BYTES = 1 << 16
"""More than a line of metrics.jsonl takes."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What became of a run, as far as it can be told from here."""

    status: str
    """What the marker says."""
    step: int | None
    """After which it ended; of one that is marked as running the last step in metrics.jsonl."""
    reason: str | None
    process: str
    """``process 71 on n2`` of a run marked as running."""
    alive: bool | None
    """Whether that process is still there; None where it is on another machine, or nothing runs."""
    silent_s: float
    """Seconds since the run last wrote its metrics or its marker."""

    @property
    def cut_off(self) -> bool:
        """Marked as running, and its process is gone."""
        return self.status == "running" and self.alive is False

    def describe(self) -> str:
        """One line for people."""
        after = "" if self.step is None else f" after step {self.step:,}"
        if self.cut_off:
            return f"ended without a word{after} (killed, or the machine went down); the same command continues"
        if self.status == "running":
            marked = "running" if self.alive else "marked as running"
            step = "before its first step" if self.step is None else f"step {self.step:,}"
            return f"{marked}: {self.process}, {step}, last sign {duration(self.silent_s)} ago"
        why = f": {self.reason}" if self.reason else ""
        goes_on = "; the same command continues" if self.status in ("stopped", "crashed") else ""
        return f"{self.status}{after}{why}{goes_on}"


def write_marker(out: Path, status: Status, *, step: int | None = None, reason: str | None = None) -> None:
    """Replace the marker of a run folder in one move. ``running`` names this process."""
    out.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {"status": status, "step": step, "reason": reason}
    if status == "running":
        pid = os.getpid()
        fields |= {"host": socket.gethostname(), "process": pid, "began": _began(pid), "system": _system()}
    write_whole(out / NAME, json.dumps({k: v for k, v in fields.items() if v is not None}) + "\n")


def marker_text(out: Path) -> str | None:
    """The marker as it stands, for ``put_back``; None where there is none."""
    try:
        return (out / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def put_back(out: Path, before: str | None) -> bool:
    """After a command that was refused: say again what an attempt before it has left; whether there was one.

    Not where a launcher only noted that it starts (``starting``): it wants to know how this attempt ended.
    """
    if before is None or _parsed(before).get("status") not in ("running", "stopped", "done", "failed", "crashed"):
        return False
    write_whole(out / NAME, before)
    return True


def read_status(out: Path) -> str | None:
    """What the marker says; None where there is none."""
    return _read(out).get("status")


def read_state(out: Path) -> RunState | None:
    """What became of the run of this folder; None where no marker says anything."""
    marker = _read(out)
    status = marker.get("status")
    if not isinstance(status, str):
        return None
    step, reason = marker.get("step"), marker.get("reason")
    signs = [file.stat().st_mtime for file in (out / NAME, out / METRICS_FILE) if file.is_file()]
    return RunState(
        status=status,
        step=_last_step(out / METRICS_FILE) if status == "running" else step,
        reason=" ".join(reason.split()) if isinstance(reason, str) else None,
        process=f"process {marker.get('process', '?')} on {marker.get('host', 'an unknown machine')}",
        alive=_is_alive(marker) if status == "running" else None,
        silent_s=max(0.0, time.time() - max(signs, default=time.time())),
    )


def _read(out: Path) -> dict[str, Any]:
    return _parsed(marker_text(out) or "")


def _parsed(text: str) -> dict[str, Any]:
    try:
        marker = json.loads(text)
    except ValueError:
        return {}
    return marker if isinstance(marker, dict) else {}


def _is_alive(marker: dict[str, Any]) -> bool | None:
    """Whether the process that wrote the marker is there; None where this machine cannot know."""
    here, there = _system(), marker.get("system")
    if not here or not isinstance(there, str) or not isinstance(marker.get("process"), int):
        return None
    if there == here:
        return _began(marker["process"]) == marker.get("began")
    if marker.get("host") == socket.gethostname() and there.split()[0] != here.split()[0]:
        return False  # this machine was started anew since
    return None


def _system() -> str | None:
    """Within which numbers of processes mean the same: one start of one machine, and a container of it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did (proc(5), field 22 of stat): a number that is used
    again by another process has another time. None where it is gone, or only its parent has not noticed yet."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _last_step(metrics: Path) -> int | None:
    """Step of the last whole line of metrics.jsonl."""
    try:
        with open(metrics, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
