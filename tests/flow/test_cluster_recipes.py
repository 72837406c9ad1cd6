"""Tiny twins of the cluster recipes train on the CPU, both stages, each in the kind of layout of the real one.

CI trains two; ``make twins`` all ten.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.recipes import cluster, recipe
from tests.small_data import small_dataset, small_tokenizer

DEADLINE_S = 900
ALL = os.environ.get("MEDGPT_TWINS") == "all"
"""Set by ``make twins``."""
IN_CI = {
    # TP2 PP2 VPP3, then PP2 VPP2 EP2 with the experts learning
    "120b-32xh200",
    # DP4, then TP2 EP2 DP2
    "20b-8xh100",
}
NAMES = [cluster.name_of(*key) for key in cluster.PLANNED]


@pytest.mark.timeout(DEADLINE_S + 20)
@pytest.mark.parametrize("key", cluster.PLANNED, ids=NAMES)
def test_a_tiny_twin_trains_both_stages_in_the_layout_of_its_recipe(tmp_path, key):
    name = cluster.name_of(*key)
    if not ALL and name not in IN_CI:
        pytest.skip("make twins runs it")
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    data = (BlendConfig(path=str(small_dataset(tmp_path / "data", tokenizer))),)
    twin = cluster.tiny_twin(recipe(name))
    steps = 2 if ALL else 1
    stages = tuple(replace(stage, data=data, num_steps=steps) for stage in twin.stages)
    run = replace(twin, out=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"), stages=stages, num_threads=1)
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    ranks = min(4, key[1])
    command = [sys.executable, "-m", "megatron_medgpt.cli", "train", str(tmp_path / "run.yaml"), "--nproc", str(ranks)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, output[-3000:]
    assert json.loads((tmp_path / "run/state.json").read_text()) == {"status": "done", "step": 2 * steps}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["align"] * steps + ["instruct"] * steps
    print(f"{name}: {ranks} rank(s), losses {', '.join(format(row['loss'], '.3f') for row in rows)}")
