"""The examples' scripts, as a reader gives them, with this Python's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_example(name: str, folder: Path) -> str:
    """What ``examples/NAME/run.sh FOLDER`` says, stdout before stderr; fails where it does."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / name / "run.sh"), str(folder)], cwd=folder.parent, capture_output=True,
        text=True, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, timeout=1100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
