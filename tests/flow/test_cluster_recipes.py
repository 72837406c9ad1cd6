"""Tiny twins of the cluster recipes train on the CPU, both stages, each in the kind of layout of the real one."""

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

DEADLINE_S = 280


@pytest.mark.parametrize("name", ["20b-8xh100", "120b-32xh200"])
def test_a_tiny_twin_trains_both_stages_on_four_ranks(tmp_path, name):
    """120b-32xh200: TP2 PP2 VPP3, then PP2 VPP2 EP2 with the experts learning."""
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    data = (BlendConfig(path=str(small_dataset(tmp_path / "data", tokenizer))),)
    twin = cluster.tiny_twin(recipe(name))
    stages = tuple(replace(stage, data=data, num_steps=1) for stage in twin.stages)
    run = replace(twin, out=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"), stages=stages, num_threads=1)
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    command = [sys.executable, "-m", "megatron_medgpt.cli", "train", str(tmp_path / "run.yaml"), "--nproc", "4"]
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
    assert json.loads((tmp_path / "run/state.json").read_text()) == {"status": "done", "step": 2}
