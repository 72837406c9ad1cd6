"""Two network namespaces as two hosts: torchrun meets across them; a cut link ends the job and names the peer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import ParallelConfig
from tests.small_data import small_run

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"medgpt-{os.getpid()}-probe"  # every worker of pytest looks
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return probe.returncode == 0


pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and network namespaces"),
]


@pytest.fixture
def hosts():
    """Names of two namespaces, joined by a cable."""
    names = [f"medgpt-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, (FIRST, SECOND)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def started(hosts, tmp_path):
    """One rank on each host, training; ends them whatever happens."""
    run = small_run(tmp_path / "small")
    stage = replace(run.stages[0], num_steps=2000, validation_data=(), validation_interval=0)
    run = replace(
        run, stages=(stage,), parallel=ParallelConfig(expert=2), checkpoint=replace(run.checkpoint, interval=100_000)
    )
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    processes = []

    def start(*overrides: str, peer_seconds: float = 8) -> list[subprocess.Popen]:
        for number, host in enumerate(hosts):
            environment = {
                **os.environ, "SLURM_NNODES": "2", "SLURM_NODEID": str(number), "SLURMD_NODENAME": f"host{number}",
                "MASTER_ADDR": FIRST, "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
            }  # fmt: skip
            command = [
                "ip", "netns", "exec", host, sys.executable, str(ROOT / "tools/slurm/node.py"), "--ranks", "1",
                "--peer-seconds", str(peer_seconds), "--", "train", str(tmp_path / "run.yaml"),
                f"out={tmp_path / 'run'}", *overrides,
            ]  # fmt: skip
            log = (tmp_path / f"host{number}.log").open("wb")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return processes

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, deadline_s: float, logs: Path) -> float:
    begun = time.monotonic()
    while time.monotonic() < begun + deadline_s:
        if condition():
            return time.monotonic() - begun
        time.sleep(0.2)
    tails = "\n".join(f.read_text(errors="replace")[-1500:] for f in sorted(logs.glob("host*.log")))
    raise AssertionError(f"not within {deadline_s} s\n{tails}")


@pytest.mark.skipif(os.environ.get("MEDGPT_SLURM") != "all", reason="make slurm-test runs it; the next one meets too")
def test_torchrun_trains_across_two_hosts(started, tmp_path):
    processes = started("stages.align.num_steps=4", peer_seconds=60)
    wait_for(lambda: all(p.poll() is not None for p in processes), 900, tmp_path)
    assert [p.returncode for p in processes] == [0, 0], (tmp_path / "host1.log").read_text()[-2000:]
    assert json.loads((tmp_path / "run/state.json").read_text()) == {"status": "done", "step": 4}


def test_a_cut_link_ends_the_job_on_both_hosts_and_names_the_peer(started, hosts, tmp_path):
    processes = started(peer_seconds=8)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3, 900, tmp_path)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    wait_for(lambda: all(p.poll() is not None for p in processes), 900, tmp_path)
    assert all(p.returncode for p in processes)
    assert f"node host0: nothing heard from node host1 ({SECOND})" in (tmp_path / "host0.log").read_text()
    assert f"node host1: nothing heard from node host0 ({FIRST})" in (tmp_path / "host1.log").read_text()
    assert json.loads((tmp_path / "run/state.json").read_text())["status"] in ("running", "crashed"), "not failed"
