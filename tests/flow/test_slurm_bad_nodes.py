"""What a bad node does to a job on a real Slurm: one line with the node and the cause, within a deadline, no requeue.

The second slurmd has mounts of its own (``LocalCluster``), so that a folder can be missing or a file old on one node
alone, as on a cluster. ``make slurm-test`` runs these.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.flow.slurm_jobs import ROOT, Launched, slow, submit
from tests.flow.slurm_jobs import needs_slurm as pytestmark  # noqa: F401  (pytest looks for this name)

pytest_plugins = ["tests.flow.slurm_jobs"]


@pytest.fixture
def on_n2(cluster):
    """Mounts on the second node, taken away afterwards."""
    mounted: list[str] = []

    def mount(*arguments: str) -> None:
        cluster.run_on("n2", "mount", *arguments)
        mounted.append(arguments[-1])

    yield mount
    for path in reversed(mounted):
        cluster.run_on("n2", "umount", "--lazy", path)


def refused(job: Launched, deadline_s: float = 90) -> str:
    """The log of a job that has been given up without a requeue."""
    assert job.wait_for_end(deadline_s) == "FAILED", job.log
    assert job.fields["Restarts"] == "0"
    return job.log


def lines(log: str, prefix: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith(prefix)]


@slow
def test_a_missing_mount_is_named(cluster, run_file, tmp_path, on_n2):
    on_n2("-t", "tmpfs", "none", str(run_file.parent / "small/data"))
    needs = [str(run_file.parent / "small/data"), str(run_file.parent / "small/tokenizer")]
    (job,) = submit(cluster, tmp_path / "w", needs=needs, train={"run": str(run_file), "out": "run"})
    assert lines(refused(job), "preflight:") == [f"preflight: node n2: {needs[0]} is empty; is it mounted?"]


@slow
def test_a_node_that_does_not_share_the_run_folder_is_named(cluster, run_file, tmp_path, on_n2):
    (tmp_path / "w").mkdir()
    on_n2("-t", "tmpfs", "none", str(tmp_path / "w"))
    (job,) = submit(cluster, tmp_path / "w", train={"run": str(run_file), "out": "run"})
    said = lines(refused(job), "preflight:")
    assert all(line.startswith("preflight: node n2: ") for line in said)
    assert "w/run cannot be written: No such file or directory" in said[0]


@slow
def test_a_node_with_other_code_is_named(cluster, run_file, tmp_path, on_n2):
    (tmp_path / "types.py").write_text((ROOT / "megatron_medgpt/types.py").read_text() + "# newer\n")
    on_n2("--bind", str(tmp_path / "types.py"), str(ROOT / "megatron_medgpt/types.py"))
    (job,) = submit(cluster, tmp_path / "w", train={"run": str(run_file), "out": "run"})
    (line,) = lines(refused(job), "preflight:")
    assert line.startswith("preflight: node n2: code ")


@slow
def test_a_node_with_another_image_is_named(cluster, run_file, tmp_path, on_n2):
    (tmp_path / "release").write_text('PRETTY_NAME="Another Linux 1"\n')
    on_n2("--bind", str(tmp_path / "release"), str(Path("/etc/os-release").resolve()))
    (job,) = submit(cluster, tmp_path / "w", train={"run": str(run_file), "out": "run"})
    (line,) = lines(refused(job), "preflight:")
    assert line.startswith('preflight: node n2: system "Another Linux 1" differs from ')


@slow
def test_a_full_disk_is_named(cluster, run_file, tmp_path):
    out = tmp_path / "w/run"
    out.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(out)], check=True)
    try:
        (job,) = submit(cluster, tmp_path / "w", nodes=1, extra=["--nodelist=n1"],
                        train={"run": str(run_file), "out": "run"})  # fmt: skip
        said = lines(refused(job), "preflight:")
    finally:
        subprocess.run(["umount", str(out)], check=True)
    assert said == [f"preflight: node n1: {out} cannot be written: No space left on device"]


@slow
def test_nodes_without_a_driver_are_named(cluster, run_file, tmp_path):
    """Slurm believes in eight GPUs a node; here is none."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this host has GPUs")
    train = {"run": str(run_file), "out": "run"}
    (job,) = submit(cluster, tmp_path / "w", gpu="h100", gpus_per_node=8, train=train)
    said = lines(refused(job), "preflight:")
    assert [line.split(":")[1].strip() for line in said] == ["node n1", "node n2"]
    assert all("nvidia-smi does not run" in line for line in said)


@slow
@pytest.mark.parametrize(
    ("launch", "file", "says"),
    [
        ("torchrun", "tools/slurm/node.py", "node n1: node n2 did not come within 12 s; giving up"),
        ("srun", "megatron_medgpt/cli.py", "not all of the 2 ranks came to 127.0.0.1:"),
    ],
)
def test_a_node_that_never_comes_is_named_within_the_deadline(cluster, run_file, tmp_path, on_n2, launch, file, says):
    """Its program hangs before it has done anything."""
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(3600)\n")
    on_n2("--bind", str(tmp_path / "hangs.py"), str(ROOT / file))
    (job,) = submit(
        cluster, tmp_path / "w", launch=launch, preflight="no", meet_seconds=12,
        train={"run": str(run_file), "out": "run"},
    )  # fmt: skip
    log = refused(job)
    assert says in log
    assert "rank 1 (node n2)" in log or launch == "torchrun"
    assert "[slurm] not requeued: training never began" in log


@slow
def test_a_node_whose_check_hangs_is_named_within_the_deadline(cluster, run_file, tmp_path, on_n2):
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(3600)\n")
    on_n2("--bind", str(tmp_path / "hangs.py"), str(ROOT / "tools/slurm/preflight.py"))
    (job,) = submit(cluster, tmp_path / "w", preflight_seconds=20, train={"run": str(run_file), "out": "run"})
    (line,) = lines(refused(job), "preflight:")
    assert line.startswith("preflight: node n2: no answer")


@slow
def test_a_link_that_is_too_slow_is_named_with_both_ends(cluster, run_file, tmp_path):
    """No network reaches a terabyte per second here."""
    train = {"run": str(run_file), "out": "run"}
    (job,) = submit(cluster, tmp_path / "w", min_bandwidth_gb_s=1000, train=train)
    *_, line = lines(refused(job, 240), "preflight:")
    assert line.startswith("preflight: nodes n1 and n2: ") and line.endswith(" GB/s between them, 1000 expected")
