"""What the command line refuses: one line, exit code 2, nothing on disk changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_medgpt.config.load import to_yaml
from tests.small_data import small_run, small_tokenizer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    run = small_run(folder)
    path = folder / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    return path


def medgpt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_medgpt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("overrides", "ranks", "says"),
    [
        (["stages.align.num_step=3"], 1, "did you mean 'num_steps'"),
        (["parallel.tensor=4"], 4, "parallel.tensor=4 does not divide"),
        (["parallel.expert=3"], 3, "parallel.expert=3 does not divide"),
        (["parallel.tensor=2"], 3, "not a multiple of"),
        (["stages.0.global_batch_rows=3"], 2, "global_batch_rows=3 is not a multiple"),
        (["stages.align.data.0.path=nowhere"], 1, "nowhere is not a dataset folder"),
        (["tokenizer=nowhere"], 1, "no tokenizer.json"),
        (["checkpoint.start_from=nowhere"], 1, "no whole checkpoint"),
        (["stages.align.exclude=nowhere.jsonl"], 1, "stages.align.exclude=nowhere.jsonl cannot be read: No such file"),
        (["stages.align.questions=nowhere"], 1, "no such folder"),
        (["stages.align.questions=data"], 1, "stages.align.questions=data: "),
        (["out=run.yaml/run"], 1, "run.yaml is a file; name a folder"),
        ([], 0, "--nproc 0: must be at least 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_starts(run_file, overrides, ranks, says):
    before = listing(run_file.parent)
    done = medgpt("train", run_file, *overrides, "--nproc", ranks, cwd=run_file.parent)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert listing(run_file.parent) == before


def test_what_the_machine_refuses_is_one_line_and_the_work_has_failed():
    done = medgpt("plan", "--model", "tiny", "--gpus", 1, "--sequence-length", 1024, "--out", "/proc/none/run.yaml")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("medgpt: failed: ") and "/proc/none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["demoo", "nowhere.yaml"])
def test_an_unknown_recipe_or_file_is_named(name):
    done = medgpt("train", name)
    assert done.returncode == 2
    assert name in done.stderr and "Traceback" not in done.stderr


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(run_file):
    done = medgpt("train", run_file, "model.language.vocab_size=128")
    assert done.returncode == 2
    assert "model.language.vocab_size=128 is smaller than" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_file.parent / "run" / "checkpoints").exists()


def test_a_dataset_of_another_tokenizer_is_refused(run_file, tmp_path):
    small_tokenizer(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "other" / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    done = medgpt("train", run_file, f"tokenizer={tmp_path / 'other'}", f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "tokenizer" in done.stderr and "Traceback" not in done.stderr


def test_a_half_written_checkpoint_is_passed_over_and_none_left_is_an_error(run_file, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"half")
    done = medgpt("train", run_file, f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "none is whole" in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "command", ["doctor", "demo", "phantoms", "ingest", "inspect", "train", "eval", "score", "report"]
)
def test_every_command_explains_itself_with_an_example(command):
    done = medgpt(command, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
