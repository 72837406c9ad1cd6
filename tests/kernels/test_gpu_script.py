"""The script for a GPU machine runs from its first line to its last, where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from medgpt_kernels.dispatch import triton_refusal

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu" / "verify.sh"
needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


def verify(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "STATE": str(tmp_path / "state"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["CASES"] = "products,conversions,projector"  # a whole rehearsal takes a minute of one core
    command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), "--minutes", "60", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


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
    shutil.rmtree(tmp_path / "state")
    continued = verify(tmp_path, "--rehearse", "--only", "tests,bench", "--continue", str(tmp_path / "out"))
    assert continued.returncode == 0 and continued.stdout.count("done before") == 2


@needs_triton
def test_what_was_measured_is_kept_and_what_no_longer_fits_is_left_to_the_next_call(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import bench

    def measure(kinds: str, seconds: str) -> tuple[int, list[str]]:
        options = ["--tiny", "--out", str(tmp_path), "--only", kinds, "--seconds", seconds, "--commit", "this"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *options])
        code = bench.main()
        return code, [r["key"] for r in json.loads((tmp_path / "bench.json").read_text())["results"]]

    assert measure("conversions", "1000") == (0, ["conversions tiny"])
    assert measure("conversions,projector", "0") == (bench.LEFT_OUT, ["conversions tiny"])


def test_a_benchmark_that_is_stopped_while_it_writes_leaves_what_it_had_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import bench

    bench.write(tmp_path, [{"key": "a", "case": "a"}], {}, 0, "this")

    def half(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        bench.write(tmp_path, [{"key": "a", "case": "a"}, {"key": "b", "case": "b"}], {}, 0, "this")
    assert [result["key"] for result in bench.measured_before(tmp_path, "this")] == ["a"]


def test_no_goal_is_judged_by_kernels_whose_tests_have_not_passed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    import goals

    times = {"ours bf16": {"median_ms": 1.0}, "torch grouped_mm, eager": {"median_ms": 2.0}}
    result = {"case": goals.WHOLE, "forward": times}
    first = goals.judge([result], {})[0]
    assert (first["value"], first["met"]) == (2.0, True)
    unproven = goals.judge([{**result, "tests": "not passed"}], {})
    assert all(line["value"] is None and line["met"] is None for line in unproven)


def test_every_peer_that_a_cpu_can_run_gives_the_right_answer(monkeypatch):
    """At toy size, with the benchmark's own check: what a GPU run would otherwise find out in its paid minutes."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    from bench_moe import LIGER, check_variants, moe_variants
    from medgpt_kernels.grouped_mlp import cases
    from medgpt_kernels.route import cases as route_cases

    given = cases.inputs(48, 40, 24, 3, 2, dtype=torch.bfloat16, seed=0, spread=1.0)
    experts = route_cases.zipf_experts(48, 3, 2, seed=0)
    peers = {n: c for n, c in moe_variants(given, experts, 3, 16).items() if not n.startswith(("ours", "liger"))}
    assert len(peers) == 5 and LIGER in moe_variants(given, experts, 3, 16)
    right, wrong = check_variants(peers, given, experts, torch.randn_like(given["x_TH"]))
    assert set(right) == set(peers), wrong


def test_wrong_usage_is_one_line_and_exit_2(tmp_path):
    for arguments, said in (
        (("--rehearse", "--wheels", str(tmp_path)), "holds no .whl files"),
        (("--only", "speed"), "steps are machine, build"),
        (("--fast",), "unknown argument --fast"),
        (("--rehearse", "--continue", str(tmp_path)), "holds no logs.tar.gz of an earlier call"),
    ):
        done = verify(tmp_path, *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
