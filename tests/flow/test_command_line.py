"""What the command line refuses: one line, exit code 2, nothing on disk changed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_medgpt.config.load import to_yaml
from tests.small_data import small_run, small_tokenizer


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    run = small_run(folder)
    path = folder / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    return path


def medgpt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_medgpt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd)


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


def few_bytes() -> None:
    """No file of this process may grow beyond 100 bytes: what a full disk is, as root too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_a_disk_that_is_full_is_named_with_its_file_and_what_was_there_stays(tmp_path):
    (tmp_path / "run.yaml").write_text("name: small\n")
    (tmp_path / "report.html").write_text("of before")
    command = [sys.executable, "-m", "megatron_medgpt", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=few_bytes)
    assert (done.returncode, done.stderr) == (1, f"medgpt: failed: {tmp_path}/report.html: File too large\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.yaml"]
    assert (tmp_path / "report.html").read_text() == "of before"


@pytest.mark.parametrize(
    ("module", "opened", "line"),
    [
        ("observe.metrics", "MetricsWriter('x', tensorboard=False)", "{'step': 1, 'note': 'n' * 99}"),
        ("evaluate.predictions", "AnswerFile('x/metrics.jsonl')", "[Prediction(question_id='q' * 99)]"),
    ],
)
def test_lines_that_a_full_disk_does_not_take_name_their_file(tmp_path, module, opened, line):
    write = f"with {opened} as file: file.write({line})"
    code = f"from megatron_medgpt.{module} import *\ntry:\n {write}\nexcept OSError as error:\n print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=tmp_path, preexec_fn=few_bytes
    )
    assert done.stdout == "[Errno 27] File too large: 'x/metrics.jsonl'\n", done.stderr


def test_a_folder_whose_name_is_no_text_is_worked_on_and_shown(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn"))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    done = subprocess.run([sys.executable, "-m", "megatron_medgpt", "report", folder], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"/r\\udcfcn/report.html\n")
    assert "<h1>r\\udcfcn</h1>" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_service_without_an_output_does_its_work(tmp_path):
    (tmp_path / "run.yaml").write_text("name: small\n")
    line = f'"{sys.executable}" -m megatron_medgpt report "{tmp_path}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line], timeout=600).returncode == 0
    assert "<h1>small</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_that_was_removed_under_its_user_is_said(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("stages: [{name: align, data: [{path: captions}]}]\n")
    medgpt = f'"{sys.executable}" -m megatron_medgpt report ../run'
    line = f"mkdir gone && cd gone && rmdir ../gone && {medgpt}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "medgpt: failed: the folder in which medgpt was called is gone; change to one that is there\n"
    )


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
