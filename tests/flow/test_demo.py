"""The demo and the examples, as a newcomer gives them, in their short forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=580
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "megatron_medgpt.cli", "demo", "--quick", "--out", "made"]
    done = run(command, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "made", done


def test_the_demo_writes_its_summary_report_and_run(demo):
    out, _ = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["layouts"] == ["align TP1·PP1·EP2·DP2", "instruct TP2·PP1·EP2·DP1"]
    assert summary["n"] == 64
    assert set(summary["controls"]) == {"blank_image", "shuffled_image"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "phantoms" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_demo_ends_by_saying_what_was_learned_and_what_to_do_next(demo):
    _, done = demo
    tail = done.stdout.strip().splitlines()[-12:]
    text = "\n".join(tail)
    assert "held-out four-option questions right" in text
    assert "report.html" in text
    assert sum(f" {command} " in text for command in ("ingest", "train", "eval")) == 3
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_the_demo_refuses_to_replace_a_folder_it_did_not_make(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = run([sys.executable, "-m", "megatron_medgpt.cli", "demo", "--out", "mine"], tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_first_example_runs(tmp_path):
    done = run(["bash", str(ROOT / "examples" / "01_first_run" / "run.sh"), str(tmp_path / "work")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "work" / "run" / "report.html").is_file()
    assert "phantoms (chat-likelihood)" in done.stdout
