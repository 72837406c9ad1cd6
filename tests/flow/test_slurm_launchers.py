"""What the launchers decide and print, without Slurm."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "tools" / "slurm"
sys.path.insert(0, str(SLURM))

import attempt  # noqa: E402  (tools are programs, not a package)
import node  # noqa: E402
import preflight  # noqa: E402
import submit  # noqa: E402


def ended(out: Path, status: str, step: int = -1, **fields) -> tuple[int, str]:
    """One attempt that left this marker and this newest checkpoint."""
    attempt.begin(out, max_restarts=3)
    if step >= 0:
        (out / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (out / "state.json").write_text(json.dumps({"status": status, **fields}))
    return attempt.decide(out, max_restarts=3)


def test_a_stopped_run_is_requeued_and_a_finished_one_is_not(tmp_path):
    assert ended(tmp_path, "stopped", 10)[0] == attempt.REQUEUE
    assert ended(tmp_path, "done", 20)[0] == attempt.DONE


def test_a_run_that_says_it_failed_is_given_up_with_its_reason(tmp_path):
    code, reason = ended(tmp_path, "failed", 10, reason="step 11: loss is not finite")
    assert code == attempt.GIVE_UP
    assert "loss is not finite" in reason


def test_a_run_that_never_began_is_given_up_though_an_earlier_attempt_had_stopped(tmp_path):
    ended(tmp_path, "stopped", 10)
    attempt.begin(tmp_path, max_restarts=3)  # and then nothing
    assert attempt.decide(tmp_path, max_restarts=3)[0] == attempt.GIVE_UP


def test_a_run_that_lost_a_peer_is_requeued_with_its_reason(tmp_path):
    code, reason = ended(tmp_path, "crashed", 10, reason="RuntimeError: Connection closed by peer")
    assert code == attempt.REQUEUE
    assert "Connection closed by peer" in reason


def test_nothing_is_requeued_for_ever(tmp_path):
    codes = [ended(tmp_path, "running", 10)[0] for _ in range(4)]
    assert codes == [attempt.REQUEUE, attempt.REQUEUE, attempt.REQUEUE, attempt.GIVE_UP]


def test_restarts_that_slurm_made_by_itself_are_counted_too(tmp_path):
    """The script of the attempt was ended with its node, so it decided nothing."""
    answers = [attempt.begin(tmp_path, 3, job="7") for _ in range(4)]
    assert [code for code, _ in answers] == [attempt.DONE] * 3 + [attempt.GIVE_UP]
    assert "3 restarts in a row without a checkpoint" in answers[-1][1]
    assert attempt.begin(tmp_path, 3, job="8")[0] == attempt.DONE, "sent anew"


@pytest.mark.parametrize(("state", "code"), [("RUNNING", attempt.GIVE_UP), ("PENDING", 0), ("", 0)])
def test_a_second_job_is_not_begun_while_another_one_trains_in_the_folder(tmp_path, monkeypatch, state, code):
    (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$5" = 7 ] && echo {state}\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert attempt.begin(tmp_path / "run", 3, job="7")[0] == attempt.DONE
    (tmp_path / "run/state.json").write_text('{"status": "running"}')
    found, reason = attempt.begin(tmp_path / "run", 3, job="8")
    assert found == code
    assert (tmp_path / "run/state.json").read_text() == (
        '{"status": "running"}' if code else '{"status": "starting"}\n'
    )
    assert not code or f"job 7 trains in {tmp_path / 'run'}; scancel it first" in reason


def test_a_job_that_may_not_be_requeued_starts_all_the_same(tmp_path):
    assert attempt.begin(tmp_path, 0, job="7")[0] == attempt.DONE
    (tmp_path / "state.json").write_text('{"status": "stopped"}')
    assert attempt.decide(tmp_path, 0)[0] == attempt.GIVE_UP


def test_a_checkpoint_starts_the_count_of_such_restarts_again(tmp_path):
    for step in (1, 2, 3, 4, 5):
        assert attempt.begin(tmp_path, 1, job="7")[0] == attempt.DONE
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def test_a_new_checkpoint_starts_the_count_again(tmp_path):
    for step in (10, 10, 10, 20, 20, 20):
        assert ended(tmp_path, "running", step)[0] == attempt.REQUEUE
    assert "20" in ended(tmp_path, "running", 20)[1]


def test_torchrun_waits_for_ranks_that_save_and_survives_sigusr1():
    command = node.torchrun_command(ranks=2, nodes=2, node=1, address="h", port="1", save_seconds=300)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in command
    assert "--shutdown-timeout=240" in command
    assert "--max-restarts=0" in command


def test_a_port_in_use_is_named(unused_port):
    with unused_port as (listener, port):
        listener.listen()
        assert f"port {port} on here cannot be opened" in node.port_fault("here", port)


def test_a_first_node_that_never_comes_is_named_within_the_deadline():
    fault = node.reach_fault("127.0.0.1", 9, deadline_s=1.0)
    assert "cannot reach the first node at 127.0.0.1:9 within 1 s" in fault


@pytest.fixture
def unused_port():
    import contextlib
    import socket

    @contextlib.contextmanager
    def bound():
        with socket.socket() as listener:
            listener.bind(("", 0))
            yield listener, listener.getsockname()[1]

    return bound()


def report(name: str, **changes) -> dict:
    card = {"name": "NVIDIA H100", "memory_mib": 81_559, "used_mib": 3}
    fields = {
        "node": name, "time": 1000.0, "python": "3.12", "packages": {"torch": "2.13"}, "code": "abc", "system": "x",
        "image": "1", "missing": [], "gpus": [dict(card) for _ in range(8)], "shared": None, "free_bytes": 10**12,
    }  # fmt: skip
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": [{"name": "NVIDIA H100", "memory_mib": 81_559, "used_mib": 3}] * 7}, "7 GPU(s), 8 expected"),
        ({"gpus": [{"name": "A100", "memory_mib": 40_960, "used_mib": 3}] * 8}, "is A100 with 40960 MiB"),
        ({"gpus": [{"name": "H100", "memory_mib": 81_559, "used_mib": 9_000}] * 8}, "in use by another process"),
        ({"gpus": None}, "nvidia-smi does not run"),
        ({"shared": "/run cannot be written: Read-only file system"}, "Read-only file system"),
        ({"free_bytes": 10**9}, "1.0 GB free"),
        ({"code": None}, "not installed"),
        ({"code": "def"}, 'code "def" differs'),
        ({"system": "other image"}, 'system "other image" differs'),
        ({"image": "2"}, 'image "2" differs'),
        ({"missing": ["/data is empty; is it mounted?"]}, "/data is empty"),
        ({"time": 1100.0}, "clock is +100 s off"),
    ],
)
def test_preflight_names_the_bad_node_and_the_cause(changes, says):
    reports = {name: report(name) for name in ("n1", "n3")} | {"n2": report("n2", **changes)}
    found = preflight.faults(reports, ["n1", "n2", "n3"], gpus=8, gpu="h100")
    assert found
    assert all(fault.startswith("node n2: ") for fault in found)
    assert says in found[0]


@pytest.mark.parametrize("code", ["0", "z"])
def test_of_two_nodes_that_differ_the_second_is_the_odd_one(code):
    reports = {"n1": report("n1", code="m"), "n2": report("n2", code=code)}
    (fault,) = preflight.faults(reports, ["n1", "n2"], gpus=8, gpu="h100")
    assert fault == f'node n2: code "{code}" differs from "m" elsewhere'


def test_preflight_accepts_nodes_that_are_alike_and_names_one_that_does_not_answer():
    reports = {name: report(name) for name in ("n1", "n2")}
    assert preflight.faults(reports, ["n1", "n2"], gpus=8, gpu="h100") == []
    assert preflight.faults(reports, ["n1", "n2", "n3"], gpus=8, gpu="h100")[0].startswith("node n3: no answer")


def test_what_a_node_must_see_is_there_or_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert preflight.missing_fault(tmp_path / "full") is None
    assert preflight.missing_fault(tmp_path / "full/file") is None
    assert preflight.missing_fault(tmp_path / "empty") == f"{tmp_path}/empty is empty; is it mounted?"
    assert "No such file or directory" in preflight.missing_fault(tmp_path / "gone")


def test_a_node_that_cannot_write_its_report_says_so_in_one_line(tmp_path):
    arguments = ["node", "--found", str(tmp_path / "gone"), "--shared", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SLURM / "preflight.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == preflight.NOT_FIT
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/gone cannot be written: No such file or directory" in done.stderr


def test_the_first_node_names_one_that_never_came_and_no_other():
    import time

    from heartbeat import Heartbeat

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    absent: list[list[str]] = []
    common = {"address": "127.0.0.1", "port": port, "deadline_s": 60, "lost": lambda silent: None}
    beats = [
        Heartbeat(name="n1", first=True, expected=("n1", "n2", "n3"), meet_s=3, never_came=absent.append, **common),
        Heartbeat(name="n2", first=False, **common),
    ]
    beats[1].start()
    assert select.select([beats[0]._socket], [], [], 300)[0], "the second was never heard"
    beats[0].start()
    end = time.monotonic() + 300
    while not absent and time.monotonic() < end:
        time.sleep(0.05)
    for beat in beats:
        beat.close()
    assert absent == [["n3"]]


def settings_file(folder: Path, **changes) -> Path:
    given = {
        "workspace": str(folder / "w"), "nodes": 4, "gpus_per_node": 8, "gpu": "h100", "account": "med",
        "chain": [
            {"job": "ingest", "inputs": ["a.jsonl", "b.jsonl"], "out": "data/align", "tokenizer": "t", "key_file": "k"},
            {"job": "convert", "arguments": ["hf-to-megatron", "--language", "gpt-oss-20b", "--out", "c"]},
            {"job": "train", "run": "20b-16xh100", "out": "runs/a", "overrides": ["seed=7"]},
            {"job": "evaluate", "arguments": ["omnimedvqa", "--data", "d", "--checkpoint", "a", "--out", "e.json"]},
        ],
        **changes,
    }  # fmt: skip
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def test_a_dry_run_prints_every_job_after_the_one_before_it_and_writes_nothing(tmp_path, capsys):
    assert submit.main(["chain", "--settings", str(settings_file(tmp_path)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scripts = [next(w for w in line.split() if w.endswith(".sbatch")).split("/")[-1] for line in lines]
    assert scripts == ["ingest.sbatch", "merge.sbatch", "convert.sbatch", "train.sbatch", "evaluate.sbatch"]
    assert "--array=0-1" in lines[0]
    assert "--dependency" not in lines[0]
    assert "--dependency=afterok:<train>" in lines[4]
    assert "--nodes=4" in lines[3] and "--gpus-per-node=8" in lines[3] and "--account=med" in lines[3]
    assert not (tmp_path / "w").exists()


def test_a_job_of_a_chain_may_run_in_a_partition_of_its_own(tmp_path, capsys):
    ingest = {"job": "ingest", "inputs": ["a"], "out": "d", "tokenizer": "t", "key_file": "k", "partition": "cpu",
              "time": "2:00:00", "cpus_per_task": 16}  # fmt: skip
    train = {"job": "train", "run": "20b-16xh100", "out": "runs/a"}
    file = settings_file(tmp_path, partition="gpu", chain=[ingest, train])
    assert submit.main(["chain", "--settings", str(file), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("--partition=cpu --time=2:00:00 --cpus-per-task=16" in line for line in lines[:2])
    assert "--partition=gpu" in lines[2] and "--time=24:00:00" in lines[2] and "--cpus-per-task" not in lines[2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodse": 4}, "unknown setting 'nodse'"),
        ({"runtime": "docker"}, "allowed: bare, pyxis, apptainer"),
        ({"runtime": "pyxis"}, "needs image"),
        ({"workspace": ""}, "workspace is missing"),
        ({"chain": [{"job": "dance"}]}, "allowed: ingest, convert, train, evaluate"),
        ({"chain": [{"job": "train", "run": "x"}]}, "train: out is missing"),
        ({"chain": [{"job": "train", "run": "x", "out": "y", "hf_token": "abc"}]}, "looks like a secret"),
        ({"extra": ["--comment=hf_" + "a" * 30]}, "holds a token"),
    ],
)
def test_wrong_settings_are_one_line_that_names_them(tmp_path, capsys, changes, says):
    assert submit.main(["chain", "--settings", str(settings_file(tmp_path, **changes)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_job_that_slurm_refuses_is_one_line_with_the_jobs_that_were_sent(tmp_path, capsys, monkeypatch):
    script = (
        "#!/bin/sh\ncase $* in *convert.sbatch*) echo 'error: no such' >&2; echo 'account' >&2; exit 1;; esac\necho 7\n"
    )
    (tmp_path / "sbatch").write_text(script)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submit.main(["chain", "--settings", str(settings_file(tmp_path))]) == 1
    said = capsys.readouterr().err
    assert said.startswith("submit: failed: job convert: error: no such; account. Jobs before it are sent; take them ")
    assert said.endswith(" scancel 7 7\n") and said.count("\n") == 1
    monkeypatch.setenv("PATH", str(tmp_path / "gone"))
    assert submit.main(["chain", "--settings", str(settings_file(tmp_path))]) == 1
    assert capsys.readouterr().err == "submit: failed: sbatch: No such file or directory\n"


def test_settings_that_are_not_there_are_named_once(tmp_path, capsys):
    assert submit.main(["train", "--settings", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err == f"submit: error: {tmp_path}/c.yaml: No such file or directory\n"


def test_the_example_settings_are_complete(capsys, tmp_path):
    text = (SLURM / "settings.example.yaml").read_text().replace("/shared/you/medgpt", str(tmp_path))
    (tmp_path / "c.yaml").write_text(text)
    assert submit.main(["train", "--settings", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    assert set(submit.DEFAULTS) - {"chain", "ranks_per_node"} <= set(yaml.safe_load(text))


SHELL_FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)


def linter(name: str) -> str:
    program = Path(sys.executable).with_name(name)
    if not program.is_file():
        pytest.skip(f"{name} is in the extra dev, for x86_64")
    return str(program)


def test_shell_files_pass_shellcheck():
    command = [linter("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", "--source-path=.", *SHELL_FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run([linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [name for name in SHELL_FILES if name.endswith(".sbatch")])
def test_every_job_is_strict(script):
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_srun_tasks_describe_their_world_as_torchrun_would():
    from megatron_medgpt.parallel.launch import world_of_srun

    task = {
        "SLURM_PROCID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "gpu7", "SLURM_JOB_ID": "12345",
    }  # fmt: skip
    assert world_of_srun(task) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu7",
        "MASTER_PORT": "32345",
    }  # fmt: skip
    assert world_of_srun({**task, "MASTER_ADDR": "a", "MASTER_PORT": "5"})["MASTER_ADDR"] == "a"
