"""The launchers on a real Slurm: two slurmd on this host. ``make slurm-test`` runs all, CI only what is quick.

Debian, Ubuntu: ``apt install slurm-wlm munge``. Needs root, as slurmd does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import ParallelConfig
from tests.small_data import small_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "slurm"))

from local_cluster import LocalCluster, missing_programs  # noqa: E402  (a tool, not a package)

ALL = os.environ.get("MEDGPT_SLURM") == "all"
"""Set by ``make slurm-test``: nothing is skipped there."""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not ALL and (bool(missing_programs()) or os.geteuid() != 0), reason="needs root, slurm-wlm and munge"
    ),
]
slow = pytest.mark.skipif(not ALL, reason="minutes long; make slurm-test runs it")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = LocalCluster(tmp_path_factory.mktemp("slurm"))
    started.start()
    yield started
    for job in started.run("squeue", "--noheader", "--format=%A").split():
        started.run("scancel", "--full", "--signal=KILL", job)
    started.stop()


class Launched:
    """A job that submit.py has sent, and how to watch it."""

    def __init__(self, cluster: LocalCluster, workspace: Path, number: str, name: str):
        self.cluster, self.workspace, self.number, self.name = cluster, workspace, number, name

    @property
    def fields(self) -> dict[str, str]:
        return self.cluster.job_fields(self.number)

    @property
    def log(self) -> str:
        path = self.workspace / "slurm" / f"{self.name}_{self.number}.log"
        return path.read_text() if path.is_file() else ""

    def wait(self, what: str, condition: Callable[[], bool], deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.5)
        raise AssertionError(
            f"not within {deadline_s:.0f} s: {what}\n{self.fields.get('JobState')}\n{self.log[-3000:]}"
        )

    def wait_for_end(self, deadline_s: float = 300) -> str:
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait("the job's end", lambda: self.fields["JobState"] in ended, deadline_s)
        return self.fields["JobState"]

    def start_at_once(self) -> None:
        """Slurm keeps a requeued job back for two minutes, in which its nodes clean up; 15 seconds do here."""
        self.wait("the requeue", lambda: self.fields["Restarts"] == "1", 120)
        time.sleep(15)
        self.wait("the requeued job", self._runs_now, 240)

    def _runs_now(self) -> bool:
        if self.fields["JobState"] == "PENDING":
            with contextlib.suppress(RuntimeError):  # it is still being cleaned up, or has just begun
                self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        return self.fields["JobState"] == "RUNNING"


def submit(cluster: LocalCluster, workspace: Path, what: str = "train", **settings) -> list[Launched]:
    given = {
        "workspace": str(workspace), "nodes": 2, "time": "30", "save_seconds": 60, "python": sys.executable,
        "extra": ["--cpus-per-task=1"], **settings,
    }  # fmt: skip
    workspace.mkdir(parents=True, exist_ok=True)
    file = workspace / "cluster.yaml"
    file.write_text(yaml.safe_dump(given))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/slurm/submit.py"), "--settings", str(file), what],
        env={**cluster.environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\S+): job (\d+)", done.stdout, re.MULTILINE)
    return [Launched(cluster, workspace, number, name) for name, number in found]


@pytest.fixture
def run_file(tmp_path):
    """A run of one stage on two ranks, experts split over both nodes."""
    run = small_run(tmp_path / "small")
    stage = replace(run.stages[0], num_steps=8, validation_data=(), validation_interval=0)
    run = replace(
        run, stages=(stage,), parallel=ParallelConfig(expert=2), checkpoint=replace(run.checkpoint, interval=100_000)
    )
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    return file


def num_steps_done(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def parameters_of(out: Path) -> dict[str, str]:
    """Checksums of the last checkpoint's payload (weights and optimizer) by file, from its manifest."""
    newest = max((out / "checkpoints").glob("step-*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    found = {name: facts["sha256"] for name, facts in files.items() if name.endswith(".distcp")}
    assert found
    return found


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_job_trains_across_two_nodes(cluster, run_file, tmp_path, launch):
    (job,) = submit(cluster, tmp_path / "w", launch=launch, train={"run": str(run_file), "out": "run"})
    assert job.wait_for_end() == "COMPLETED", job.log
    assert "preflight: 2 node(s) fit" in job.log
    assert "2 processes" in job.log
    assert json.loads((tmp_path / "w/run/state.json").read_text()) == {"status": "done", "step": 8}


def test_a_run_that_cannot_begin_is_not_requeued_and_says_why(cluster, run_file, tmp_path):
    train = {"run": str(run_file), "out": "run", "overrides": ["parallel.expert=3"]}
    (job,) = submit(cluster, tmp_path / "w", preflight="no", train=train)
    assert job.wait_for_end() == "FAILED"
    assert "parallel.expert=3 does not divide" in job.log
    assert "[slurm] not requeued" in job.log
    assert job.fields["Restarts"] == "0"


@slow
def test_a_run_cut_by_its_time_limit_is_requeued_and_ends_bitwise_as_if_uninterrupted(cluster, run_file, tmp_path):
    steps = "stages.align.num_steps=400"
    train = {"run": str(run_file), "out": "cut", "overrides": [steps]}
    (job,) = submit(cluster, tmp_path / "w", train=train)
    out = tmp_path / "w" / "cut"
    job.wait("five steps", lambda: num_steps_done(out) >= 5, 240)
    minutes = 2 + int(cluster.run("squeue", "--noheader", f"--jobs={job.number}", "--format=%M").split(":")[0])
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    job.start_at_once()
    cut_at = json.loads((out / "attempts.json").read_text())["step"]
    assert 0 < cut_at < 400, job.log
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    assert job.wait_for_end(600) == "COMPLETED", job.log
    assert f"[slurm] requeued: stopped; checkpoint of step {cut_at}" in job.log
    assert num_steps_done(out) == 400

    whole = tmp_path / "whole"
    command = [
        sys.executable,
        "-m",
        "megatron_medgpt.cli",
        "train",
        str(run_file),
        f"out={whole}",
        steps,
        "--nproc",
        "2",
    ]
    uninterrupted = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, capture_output=True, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-2000:]
    assert parameters_of(out) == parameters_of(whole)
    losses = [[json.loads(line)["loss"].hex() for line in (f / "metrics.jsonl").open()] for f in (out, whole)]
    assert losses[0] == losses[1]


@slow
def test_a_job_whose_node_is_lost_starts_again_from_its_checkpoint_when_the_node_is_back(cluster, run_file, tmp_path):
    train = {
        "run": str(run_file), "out": "lost", "overrides": ["stages.align.num_steps=300", "checkpoint.interval=20"],
    }  # fmt: skip
    (job,) = submit(cluster, tmp_path / "w", preflight="no", train=train)
    out = tmp_path / "w" / "lost"
    job.wait("a checkpoint", lambda: any((out / "checkpoints").glob("step-*")), 240)
    cluster.kill_node("n2")
    end_processes_of("n2", cluster)
    job.start_at_once()
    cluster.start_node("n2")
    assert job.wait_for_end(600) == "COMPLETED", job.log
    assert "attempt 1" in job.log
    assert "resumed from step-" in job.log
    assert json.loads((out / "state.json").read_text()) == {"status": "done", "step": 300}


def end_processes_of(node: str, cluster: LocalCluster) -> None:
    """What dies with a node: the processes that its slurmd has started, known by their environment."""
    marks = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={cluster.folder / 'slurm.conf'}"}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            found = marks <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            if found:
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


@slow
def test_an_ingest_array_with_one_failed_element_is_mended_by_running_that_element_again(cluster, tmp_path):
    import numpy as np

    from tests.small_data import picture, small_tokenizer

    small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "key").write_text("0" * 64)
    (tmp_path / "key").chmod(0o600)
    rng, tables = np.random.default_rng(0), []
    for number in range(3):
        folder = tmp_path / f"source-{number}"
        folder.mkdir()
        rows = []
        for i, colour in enumerate(("red", "green", "blue", "grey")):
            (folder / f"{i}.png").write_bytes(picture(colour, rng))
            rows.append({"id": f"{number}-{i}", "image": f"{i}.png", "caption": f"The picture is {colour}."})
        tables.append(folder / "captions.jsonl")
        tables[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = tables[1].read_text()
    tables[1].unlink()
    chain = [{
        "job": "ingest", "name": "captions", "inputs": [str(t) for t in tables], "out": "data", "elements": 3,
        "tokenizer": str(tmp_path / "tokenizer"), "key_file": str(tmp_path / "key"),
    }]  # fmt: skip
    array, merge = submit(cluster, tmp_path / "w", "chain", nodes=1, chain=chain)
    parts = tmp_path / "w/data.parts"
    array.wait("the other two parts", lambda: len(list(parts.glob("part-*/dataset.json"))) == 2, 240)
    array.wait("the merge to be given up", lambda: merge.fields["JobState"] == "CANCELLED", 120)

    tables[1].write_text(broken)
    settings, script = str(tmp_path / "w/slurm/captions.env"), str(ROOT / "tools/slurm/ingest.sbatch")
    again = cluster.run("sbatch", "--parsable", "--array=1", f"--output={tmp_path}/again.log", script, settings)
    joined = cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{again}", f"--output={tmp_path}/merge.log",
        str(ROOT / "tools/slurm/merge.sbatch"), str(tmp_path / "w/slurm/captions-merge.env"),
    )  # fmt: skip
    assert Launched(cluster, tmp_path / "w", joined, "merge").wait_for_end() == "COMPLETED", (
        tmp_path / "again.log"
    ).read_text() + (tmp_path / "merge.log").read_text()
    manifest = json.loads((tmp_path / "w/data/dataset.json").read_text())
    assert manifest["num_samples"] == 12
    assert "merge: 12 samples, 12 images" in (tmp_path / "merge.log").read_text()
