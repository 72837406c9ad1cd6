"""The script for a GPU machine runs from its first line to its last, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from medgpt_kernels.dispatch import triton_refusal

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu" / "verify.sh"
needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


def verify(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "STATE": str(tmp_path / "state"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["CASES"] = "products,conversions,projector"  # a whole rehearsal takes a minute of one core
    command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@needs_triton
def test_a_rehearsal_measures_its_cases_and_a_second_call_repeats_nothing(tmp_path):
    done = verify(tmp_path, "--rehearse", "--only", "machine,build,tests,bench,sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    steps = {step["step"]: step for step in found["steps"]}
    assert {name: steps[name]["status"] for name in ("machine", "tests", "bench")} == dict.fromkeys(
        ("machine", "tests", "bench"), "passed"
    )
    assert steps["sanitize"]["status"] == "not run" and "compute-sanitizer" in steps["sanitize"]["why"]
    kinds = {result["case"].split()[0] for result in found["bench"]["results"]}
    assert kinds == {"products", "projector", "conversions"}
    ours = [
        (result["case"], part, name, row.get("not_run"))
        for result in found["bench"]["results"]
        for part in ("forward", "forward_backward")
        for name, row in result.get(part, {}).items()
        if name.startswith(("ours", "mxfp4", "fp8", "bf16")) and "median_ms" not in row
    ]
    assert not ours, "a kernel of ours was not timed"
    assert found["bench"]["goals"] and all(goal["met"] is None for goal in found["bench"]["goals"])
    again = verify(tmp_path, "--rehearse", "--only", "machine,tests,bench")
    assert again.returncode == 0 and again.stdout.count("done before") == 3


def test_wrong_usage_is_one_line_and_exit_2(tmp_path):
    for arguments, said in (
        (("--rehearse", "--wheels", str(tmp_path)), "holds no .whl files"),
        (("--only", "speed"), "steps are machine, build"),
        (("--fast",), "unknown argument --fast"),
    ):
        done = verify(tmp_path, *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
