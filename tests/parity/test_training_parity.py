"""Several optimizer steps, ours and transformers', from the same weights on the same data: the losses stay together.

Covers what one forward and backward cannot: the division by the global count of targets over micro-batches, and AdamW.
It runs the benchmark of tools/profile, which therefore cannot rot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_losses_and_gradient_norms_of_five_steps_equal_those_of_plain_transformers(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/profile/step.py"), "--workload", "tiny"]
    command += ["--steps", "3", "--warmup", "2", "--no-memory", "--out", str(out)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    (result,) = found["results"]
    # Measured 1e-7 and 1e-6. Another beta2 is off by 4e-6 in the loss at step 2; another divisor of the gradients shows
    # in their norm at once (AdamW itself does not see their scale).
    assert result["largest_relative_difference"]["loss"] < 1e-6
    assert result["largest_relative_difference"]["grad_norm"] < 1e-5
    for side in ("ours", "transformers"):
        assert result[side]["tokens_per_s"] > 0
    assert set(found["machine"]) >= {"cpu", "cores", "threads", "torch", "megatron_core", "transformers"}
