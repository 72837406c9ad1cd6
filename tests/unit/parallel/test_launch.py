"""Ranks that are started here end together, and the first failure is the one that counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_medgpt.parallel import launch

ENDED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (["pass", "pass"], 0, ""),
        (["import time; time.sleep(60)", ENDED], 143, "medgpt: rank 1 was ended by SIGTERM\n"),
        (["raise SystemExit(2)", "import time; time.sleep(60)"], 2, ""),  # it has said why
    ],
)
def test_a_rank_that_a_signal_has_ended_is_named(monkeypatch, capfd, programs, code, said):
    def start(arguments, rank, num_ranks, port):
        return subprocess.Popen([sys.executable, "-c", programs[rank]], start_new_session=True)

    monkeypatch.setattr(launch, "_start_rank", start)
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    assert launch.run_ranks([], len(programs)) == code
    assert capfd.readouterr().err == said
