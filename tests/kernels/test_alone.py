"""The kernels without the rest of the software."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
AFTER = """
import sys
assert out.shape == x.shape and out.isfinite().all()
for name in ("x", "router_weight", "router_bias", "gate_up", "gate_up_bias", "down", "down_bias"):
    grad = globals()[name].grad
    assert grad is not None and grad.isfinite().all() and grad.count_nonzero(), name
others = [name for name in sys.modules if name.split(".")[0] in ("megatron_medgpt", "megatron", "transformers")]
assert not others, others
"""


def test_the_readmes_example_runs_with_pytorch_alone():
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-c", example + AFTER], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
