"""The launchers on a real Slurm: two slurmd on this host. ``make slurm-test`` runs all, CI only what is quick.

Debian, Ubuntu: ``apt install slurm-wlm munge``. Needs root, as slurmd does.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.flow.slurm_jobs import (
    CANARY,
    ROOT,
    Launched,
    end_processes_of,
    num_steps_done,
    parameters_of,
    processes_of,
    slow,
    submit,
)
from tests.flow.slurm_jobs import needs_slurm as pytestmark  # noqa: F401  (pytest looks for this name)

pytest_plugins = ["tests.flow.slurm_jobs"]


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_job_trains_across_two_nodes(cluster, run_file, tmp_path, launch):
    (tmp_path / "token").write_text(CANARY)
    (tmp_path / "token").chmod(0o600)
    train = {"run": str(run_file), "out": "run"}
    (job,) = submit(cluster, tmp_path / "w", launch=launch, token_file=str(tmp_path / "token"), train=train)
    job.wait("the first step", lambda: num_steps_done(tmp_path / "w/run") > 0, 900)
    seen = list(processes_of(cluster))
    assert len(seen) >= 4, "batch script, srun and two ranks at least"
    assert not [pid for pid, command, environment in seen if CANARY in "\0".join((*command, *environment))]
    assert job.wait_for_end() == "COMPLETED", job.log
    assert not [f for f in (tmp_path / "w").rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]
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
    job.wait("the requeue", lambda: job.fields["Restarts"] == "1", 120)
    cluster.start_node("n2")  # until then the job has one node of two
    job.start_at_once()
    assert job.wait_for_end(600) == "COMPLETED", job.log
    assert "attempt 1" in job.log
    assert "resumed from step-" in job.log
    assert json.loads((out / "state.json").read_text()) == {"status": "done", "step": 300}


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


@slow
def test_one_table_is_split_by_its_shards_and_comes_out_as_if_it_had_not_been(cluster, tmp_path):
    import numpy as np

    from megatron_medgpt.ingest.command import run_ingest
    from tests.small_data import picture, small_tokenizer

    small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "key").write_text("0" * 64)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "0.png").write_bytes(picture("red", np.random.default_rng(0)))
    rows = [{"id": str(i), "image": "0.png", "caption": f"The picture is red {i}."} for i in range(2100)]
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chain = [{
        "job": "ingest", "name": "captions", "inputs": [str(table)], "out": "data", "elements": 2,
        "tokenizer": str(tmp_path / "tokenizer"), "key_file": str(tmp_path / "key"),
    }]  # fmt: skip
    array, merge = submit(cluster, tmp_path / "w", "chain", nodes=1, chain=chain)
    assert merge.wait_for_end() == "COMPLETED", array.log + merge.log
    run_ingest(
        [table], out=tmp_path / "whole", tokenizer=tmp_path / "tokenizer", key_file=tmp_path / "key", workers=1,
        echo=lambda line: None,
    )  # fmt: skip
    split, whole = (json.loads((f / "dataset.json").read_text()) for f in (tmp_path / "w/data", tmp_path / "whole"))
    assert len(split["shards"]) == 2
    assert split == whole


@slow
def test_sigusr1_saves_a_step_requeues_and_ends_like_sigterm(cluster, run_file, tmp_path):
    train = {"run": str(run_file), "out": "run", "overrides": ["stages.align.num_steps=150"]}
    (job,) = submit(cluster, tmp_path / "w", preflight="no", train=train)
    out = tmp_path / "w/run"
    job.wait("five steps", lambda: num_steps_done(out) >= 5, 240)
    cluster.run("scancel", "--signal=USR1", job.number)
    job.start_at_once()
    assert "stopped by SIGUSR1" in job.log
    saved = json.loads((out / "attempts.json").read_text())["step"]
    assert saved >= 5
    assert job.wait_for_end(400) == "COMPLETED", job.log
    assert f"resumed from step-{saved:08d}" in job.log
    assert num_steps_done(out) == 150


@slow
def test_a_job_that_gets_nowhere_is_requeued_as_often_as_allowed_and_no_more(cluster, run_file, tmp_path):
    train = {"run": str(run_file), "out": "run", "overrides": ["stages.align.num_steps=5000"]}
    (job,) = submit(cluster, tmp_path / "w", preflight="no", max_restarts=2, train=train)
    out = tmp_path / "w/run"

    def trains(attempt: int) -> bool:
        return f"attempt {attempt} " in job.log and num_steps_done(out) >= 2

    for attempt in (0, 1):
        if attempt:
            job.start_at_once()
        job.wait("a step", functools.partial(trains, attempt), 240)
        ranks = [
            pid
            for pid, command, environment in processes_of(cluster, "n2")
            if "megatron_medgpt.cli" in command and any(word.startswith("LOCAL_RANK=") for word in environment)
        ]
        os.kill(ranks[0], signal.SIGKILL)
        (out / "metrics.jsonl").unlink()
    assert job.wait_for_end(200) == "FAILED"
    assert "not requeued: 2 restarts in a row without a checkpoint" in job.log
    assert job.fields["Restarts"] == "1"


@slow
def test_a_chain_goes_from_captions_to_a_score(cluster, tmp_path):
    """ingest.sbatch, merge.sbatch, convert.sbatch, train.sbatch and evaluate.sbatch, with paths below the workspace."""
    example, work = ROOT / "examples/02_import_train_export", tmp_path / "data"
    for command in (
        ["-m", "megatron_medgpt.cli", "phantoms", "--out", str(work / "phantoms"), "--images", "24",
         "--questions", "8"],
        [str(ROOT / "tools/data/train_tokenizer.py"), "--out", str(work / "tokenizer"), "--vocab-size", "512",
         str(work / "phantoms/train/captions.jsonl")],
        [str(example / "small_weights.py"), str(work / "published"), str(work / "tokenizer")],
    ):  # fmt: skip
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "key").write_text("0" * 64)
    (tmp_path / "key").chmod(0o600)
    workspace = tmp_path / "w"
    chain = [
        {"job": "ingest", "inputs": [str(work / "phantoms/train/captions.jsonl")], "out": "captions",
         "tokenizer": str(work / "tokenizer"), "key_file": str(tmp_path / "key")},
        {"job": "convert", "arguments": ["hf-to-megatron", "--language", str(work / "published/language"), "--vision",
                                         str(work / "published/vision"), "--out", "start"]},
        {"job": "train", "run": str(example / "run.yaml"), "out": "run",
         "overrides": [f"tokenizer={work / 'tokenizer'}", "stages.align.data.0.path=captions",
                       "checkpoint.start_from=start", "stages.align.num_steps=4"]},
        {"job": "evaluate", "arguments": ["phantoms", "--data", str(work / "phantoms/test"), "--checkpoint",
                                          "run", "--out", "score.json", "--limit",
                                          "8", "--no-controls"]},
    ]  # fmt: skip
    jobs = submit(cluster, workspace, "chain", chain=chain)
    assert [job.name for job in jobs] == ["ingest", "ingest-merge", "convert", "train", "evaluate"]
    for job in jobs:
        assert job.wait_for_end(300) == "COMPLETED", (job.name, job.log, sorted((workspace / "slurm").iterdir()))
    assert json.loads((workspace / "score.json").read_text())["n"] == 8
