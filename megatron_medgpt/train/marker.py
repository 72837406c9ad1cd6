"""``state.json`` of a run folder: whether the run goes on, for whoever started it.

Exit codes cannot tell: torchrun returns 1 whether its ranks have saved and stopped or have failed. Launchers requeue a
run that is ``stopped`` or ``crashed`` (an error that nobody expected, such as a lost peer), or ``running`` though its
processes are gone; one that is ``done`` or ``failed`` they leave.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

NAME = "state.json"
Status = Literal["running", "stopped", "done", "failed", "crashed"]


def write_marker(out: Path, status: Status, *, step: int | None = None, reason: str | None = None) -> None:
    """Replace the marker of a run folder in one move."""
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".{NAME}.{os.getpid()}"
    fields = {"status": status, "step": step, "reason": reason}
    aside.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}) + "\n", encoding="utf-8")
    os.replace(aside, out / NAME)


def read_status(out: Path) -> str | None:
    """What the marker says; None where there is none."""
    try:
        return json.loads((out / NAME).read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return None
