"""An evaluation of a checkpoint is killed while it writes: the same command finishes it and asks nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from question_folders import omnimedvqa_folder

from megatron_medgpt.checkpoint.save import CheckpointFacts, save_checkpoint
from megatron_medgpt.checkpoint.state import model_state
from megatron_medgpt.config.load import to_tree
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.evaluate.run import evaluate_model
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups as process_groups
from megatron_medgpt.parallel.plan import make_layout

MODEL = ModelConfig(language=replace(TINY, vocab_size=512), vision=TINY_CLIP)
PROTOCOLS = ("chat-likelihood", "letter")
CONTROLS = ("", ".blank_image", ".shuffled_image")
NUM_QUESTIONS = 48
pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with one checkpoint of a random model."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["What is number 3? PET scan CT scan Blood test"] * 20, run / "tokenizer", 400)
    world = process_groups.start(timeout_s=60, kind="cpu")
    layout = make_layout(ParallelConfig(), MODEL, world.size)
    groups = process_groups.build_groups(layout)
    torch.manual_seed(0)
    chunks = build_model(MODEL, layout=layout, groups=groups, dtype=torch.float32)
    facts = CheckpointFacts(step=1, model=to_tree(MODEL), extra={"tokenizer": tokenizer.fingerprint})
    save_checkpoint(run / "checkpoints", 1, model_state(chunks, groups), facts, parallel_group=groups.dp_cp)
    process_groups.destroy_groups()
    process_groups.stop()
    return run


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return omnimedvqa_folder(tmp_path_factory.mktemp("set") / "set", num_questions=NUM_QUESTIONS)


def start(run: Path, questions: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "megatron_medgpt.cli", "eval", "phantoms", "--data", str(questions), "--checkpoint",
        str(run), "--protocol", ",".join(PROTOCOLS), "--reader", "pillow", "--max-new-tokens", "12", "--out", str(out),
    ]  # fmt: skip
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def answers(folder: Path, protocol: str, control: str = "") -> list[dict]:
    path = folder / f"result.{protocol}{control}.answers.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def test_a_killed_evaluation_of_a_checkpoint_goes_on_where_it_was(run, questions, tmp_path):
    killed = tmp_path / "killed"
    process = start(run, questions, killed / "result.json")
    try:
        deadline = time.monotonic() + 900
        while len(answers(killed, "letter")) < 16 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[0].decode()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    kept = {(p, c): answers(killed, p, c) for p in PROTOCOLS for c in CONTROLS}
    assert all(len(kept["chat-likelihood", c]) == NUM_QUESTIONS for c in CONTROLS)
    assert 16 <= sum(len(kept["letter", c]) for c in CONTROLS) < 3 * NUM_QUESTIONS

    process = start(run, questions, killed / "result.json")
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output.decode()

    whole = tmp_path / "whole"
    evaluate_model(
        "phantoms", data=questions, out=whole / "result.json", arguments=[], checkpoint=run, protocols=PROTOCOLS,
        reader="pillow", max_new_tokens=12,
    )  # fmt: skip
    for (protocol, control), before in kept.items():
        found = answers(killed, protocol, control)
        assert found[: len(before)] == before
        assert max(Counter(row["question_id"] for row in found).values()) == 1
        wanted = {row["question_id"]: row for row in answers(whole, protocol, control)}
        assert len(found) == len(wanted) == NUM_QUESTIONS
        for row in found:
            other = wanted[row["question_id"]]
            assert row.get("prediction") == other.get("prediction")
            # float32, another batch: the bound of test_engine_layouts
            np.testing.assert_allclose(row.get("option_losses", []), other.get("option_losses", []), rtol=60 * 2**-24)
    for protocol in PROTOCOLS:
        results = [json.loads((folder / f"result.{protocol}.json").read_text()) for folder in (killed, whole)]
        assert results[0] == results[1]
        assert results[0]["n"] == NUM_QUESTIONS
