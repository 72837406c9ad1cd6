"""A save that dies, wherever it dies, leaves the last published checkpoint found and whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_crashes import EVERY_RANK, POINTS

from megatron_medgpt.checkpoint.ranks import EXIT_HUNG

NUM_RANDOM = 5


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    script = Path(__file__).with_name("checkpoint_crashes.py")
    folder = tmp_path_factory.mktemp("crashes")
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(NUM_RANDOM), "20261122"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True, stdout=subprocess.PIPE
    )
    try:
        output, _ = process.communicate(timeout=1100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def assert_nothing_torn(outcome: dict) -> None:
    assert "error" not in outcome, outcome["error"]
    assert outcome["right values"]
    assert outcome["latest is whole"]
    assert outcome["litter after next save"] == 0


@pytest.mark.parametrize(("point", "newest"), POINTS.items())
def test_a_rank_killed_at_a_named_point_leaves_a_whole_checkpoint(outcomes, point, newest):
    found = [outcome for outcome in outcomes if outcome["case"] == "killed" and outcome["point"] == point]
    assert len(found) == (2 if point in EVERY_RANK else 1)
    for outcome in found:
        assert_nothing_torn(outcome)
        assert outcome["exits"][outcome["victim"]] == -signal.SIGKILL
        assert outcome["exits"][1 - outcome["victim"]] == 1, "the other rank did not notice"
        if point == "files hashed" and outcome["victim"] == 1:
            assert outcome["newest"] in (1, 2)  # rank 0 has all it needs to publish; whether it does is a race
        else:
            assert outcome["newest"] == newest


def test_a_rank_that_stands_still_ends_the_others_at_the_deadline(outcomes):
    (outcome,) = [outcome for outcome in outcomes if outcome["case"] == "stopped"]
    assert outcome["exits"] == [EXIT_HUNG, None]
    assert_nothing_torn(outcome)
    assert outcome["newest"] == 1


def test_ranks_killed_at_random_moments_leave_no_torn_checkpoint(outcomes):
    found = [outcome for outcome in outcomes if outcome["case"] == "random"]
    assert len(found) == NUM_RANDOM
    for outcome in found:
        assert_nothing_torn(outcome)
