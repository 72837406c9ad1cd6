"""``state.json``: whole or not there, and a run that was killed is told from one that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_medgpt.observe.marker import NAME, RunState, read_state, write_marker
from megatron_medgpt.observe.report import write_report


def test_the_marker_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_marker(tmp_path / "run", "running")
    write_marker(tmp_path / "run", "stopped", step=7)
    assert json.loads((tmp_path / "run/state.json").read_text()) == {"status": "stopped", "step": 7}
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["state.json"]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has marked the folder as running, and stays."""
    code = (
        "import sys; from pathlib import Path; from megatron_medgpt.observe.marker import write_marker; "
        "write_marker(Path(sys.argv[1]), 'running'); print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=300)


def state_of(folder: Path) -> RunState:
    state = read_state(folder)
    assert state is not None
    return state


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(tmp_path: Path, running: subprocess.Popen) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 811}\n{"step": 812}\n{"step": 8')
    state = state_of(tmp_path)
    assert (state.alive, state.cut_off) == (True, False)
    assert f"running: process {running.pid} on " in state.describe()
    assert "step 812, last sign " in state.describe()

    os.kill(running.pid, signal.SIGKILL)
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)  # ended, and its parent has not noticed yet
    assert state_of(tmp_path).cut_off
    running.wait()
    state = state_of(tmp_path)
    assert (state.alive, state.cut_off) == (False, True)
    assert state.describe().startswith("ended without a word after step 812 (killed, or the machine went down)")


def altered(folder: Path, **fields: object) -> RunState:
    """The state of a folder that this process has marked as running, with these fields of the marker changed."""
    write_marker(folder, "running")
    marker = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(marker | fields))
    return state_of(folder)


def test_the_number_of_a_process_that_was_given_to_another_one_is_not_the_run(tmp_path: Path) -> None:
    assert altered(tmp_path).alive
    assert altered(tmp_path, began=1).cut_off


def test_a_machine_that_was_started_anew_runs_nothing_of_before(tmp_path: Path) -> None:
    assert altered(tmp_path, system="another-boot pid:[1]").cut_off


def test_of_a_process_on_another_machine_only_its_last_sign_is_known(tmp_path: Path) -> None:
    there = altered(tmp_path, host="n2", process=71, system="another-boot pid:[1]")
    os.utime(tmp_path / NAME, (1e9, 1e9))
    assert (there.alive, there.cut_off) == (None, False)
    assert state_of(tmp_path).describe().startswith("marked as running: process 71 on n2, before its first step, last")
    assert state_of(tmp_path).silent_s > 1e8


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"status": 3}'])
def test_a_marker_that_says_nothing_is_no_state(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert read_state(tmp_path) is None


def test_a_marker_of_before_that_names_no_process_is_of_an_unknown_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"status": "running"}')
    assert state_of(tmp_path).alive is None
    assert "process ? on an unknown machine" in state_of(tmp_path).describe()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"status": "failed", "reason": "step 3: loss is not <finite>"},
            "<strong>This run</strong> failed: step 3: loss is not &lt;finite&gt;.",
        ),
        (
            {"status": "stopped", "step": 1200},
            "<strong>This run</strong> stopped after step 1,200; the same command continues.",
        ),
        (
            {"status": "running", "host": "n2", "process": 71},
            "this run was</strong> marked as running: process 71 on n2",
        ),
    ],
)
def test_the_report_says_on_top_how_a_run_stands_that_is_not_done(tmp_path: Path, fields: dict, says: str) -> None:
    (tmp_path / "run.yaml").write_text("name: a\n")
    (tmp_path / NAME).write_text(json.dumps(fields))
    assert says in write_report(tmp_path).read_text(encoding="utf-8")
    write_marker(tmp_path, "done", step=9)
    assert "This run" not in write_report(tmp_path).read_text(encoding="utf-8")
