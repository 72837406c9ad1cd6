"""A real Slurm on this host, jobs that submit.py sends to it, and how tests watch them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

CANARY = "hf_" + "canary" * 5
"""Stands in the environment of whoever submits, and in the token file; nobody else may have it."""
ALL = os.environ.get("MEDGPT_SLURM") == "all"
"""Set by ``make slurm-test``: nothing is skipped there."""

needs_slurm = [
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not ALL and (bool(missing_programs()) or os.geteuid() != 0), reason="needs root, slurm-wlm and munge"
    ),
]
slow = pytest.mark.skipif(not ALL, reason="minutes long; make slurm-test runs it")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = LocalCluster(tmp_path_factory.mktemp("slurm"), gpus=8)
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

    def wait_for_end(self, deadline_s: float = 900) -> str:
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait("the job's end", lambda: self.fields["JobState"] in ended, deadline_s)
        return self.fields["JobState"]

    def start_at_once(self, restart: int = 1) -> None:
        """Slurm keeps a requeued job back for two minutes, in which its nodes clean up; 15 seconds do here."""
        self.wait("the requeue", lambda: self.fields["Restarts"] == str(restart), 600)
        time.sleep(15)
        self.wait("the requeued job", self._runs_now, 900)

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
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "HF_TOKEN": CANARY}, capture_output=True, text=True,
        timeout=600,
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


def processes_of(cluster: LocalCluster, node: str | None = None) -> Iterator[tuple[int, list[str], list[str]]]:
    """What the slurmds (or one) have started, known by its environment: pid, command line, environment."""
    marks = {f"SLURM_CONF={cluster.folder / 'slurm.conf'}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command, environment = (
                (folder / name).read_bytes().decode(errors="replace").split("\0") for name in ("cmdline", "environ")
            )
        except OSError:  # it has ended meanwhile
            continue
        if marks <= set(environment) and any(word.startswith("SLURMD_NODENAME=") for word in environment):
            yield int(folder.name), command, environment


def end_processes_of(node: str, cluster: LocalCluster) -> None:
    """What dies with a node: the processes that its slurmd has started."""
    for pid, _, _ in list(processes_of(cluster, node)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
