"""The demo and the examples, as a newcomer gives them, in their short forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=1100
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
    assert set(summary["protocols"]) == {"chat-likelihood", "official-qa", "official-prefix", "letter"}
    assert summary["export"]["n"] == 64
    assert summary["export"]["same_answers"] >= 62  # readers of pictures differ by up to two grey levels
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "phantoms" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_demo_ends_by_saying_what_was_learned_and_what_to_do_next(demo):
    _, done = demo
    tail = done.stdout.strip().splitlines()[-13:]
    text = "\n".join(tail)
    assert "held-out four-option questions right" in text
    assert "report.html" in text
    assert sum(f" {command} " in text for command in ("ingest", "train", "eval")) == 3
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_the_evaluation_example_compares_the_demo_with_another_model(demo, tmp_path):
    folder, _ = demo
    done = run(["bash", str(ROOT / "examples" / "04_evaluate" / "run.sh"), "work", str(folder)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "work" / "eval").glob("*[a-z].json")}
    assert {results[name]["n"] for name in ("ours.letter", "ours.official-prefix", "exported", "other")} == {64}
    assert set(results["ours.letter"]["controls"]) == {"blank_image", "shuffled_image", "text_only"}
    assert results["other"]["paired"]["against"] == "ours.letter.json"
    page = (tmp_path / "work" / "run" / "report.html").read_text(encoding="utf-8")
    assert "official-prefix" in page and "leakage" in page.lower()


def test_the_demo_refuses_to_replace_a_folder_it_did_not_make(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = run([sys.executable, "-m", "megatron_medgpt.cli", "demo", "--out", "mine"], tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    done = run(["bash", str(ROOT / "examples" / "01_first_run" / "run.sh"), str(folder / "work")], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "work", done


def test_the_first_example_runs(example):
    work, done = example
    assert (work / "run" / "report.html").is_file()
    assert "phantoms (chat-likelihood)" in done.stdout


def option_losses(path: Path) -> dict[str, list[float]]:
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {answer["question_id"]: answer["option_losses"] for answer in answers}


def test_transformers_gives_every_option_of_the_export_the_loss_that_the_checkpoint_gives_it(example):
    """The bound: float32 logits of the two differ by 2e-5 (tests/parity), and a loss moves at most twice as far. Pillow
    reads the pictures on both sides: DALI's differ by up to 8 of 255 grey levels (tests/unit/data)."""
    work, _ = example
    medgpt = [sys.executable, "-m", "megatron_medgpt.cli"]
    for arguments in (
        [
            "eval",
            "phantoms",
            "--data",
            "phantoms/test",
            "--checkpoint",
            "run",
            "--out",
            "ours/phantoms.json",
            "--no-controls",
            "--reader",
            "pillow",
            "--sequence-length",
            "256",
        ],
        ["convert", "megatron-to-hf", "--checkpoint", "run", "--out", "export", "--dtype", "fp32"],
        ["eval", "phantoms", "--data", "phantoms/test", "--hf", "export", "--out", "hf/phantoms.json", "--no-controls"],
    ):
        done = run([*medgpt, *arguments], work)
        assert done.returncode == 0, done.stderr[-3000:]
    ours = option_losses(work / "ours" / "phantoms.answers.jsonl")
    theirs = option_losses(work / "hf" / "phantoms.answers.jsonl")
    assert ours.keys() == theirs.keys() and len(ours) == 32
    worst = max(abs(a - b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    assert worst < 4e-5
