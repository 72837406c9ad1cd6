"""Ranks that are started here end together, and the first failure is the one that counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_medgpt.parallel import launch

ENDED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (["pass", "pass"], 0, ""),
        (["import time; time.sleep(3600)", ENDED], 143, "medgpt: rank 1 was ended by SIGTERM\n"),
        (["raise SystemExit(2)", "import time; time.sleep(3600)"], 2, ""),  # it has said why
    ],
)
def test_a_rank_that_a_signal_has_ended_is_named(monkeypatch, capfd, programs, code, said):
    def start(arguments, rank, num_ranks, listener):
        return subprocess.Popen([sys.executable, "-c", programs[rank]], start_new_session=True)

    monkeypatch.setattr(launch, "_start_rank", start)
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    assert launch.run_ranks([], len(programs)) == code
    assert capfd.readouterr().err == said


STOPS_WHEN_TOLD = "import signal, time; signal.signal(2, lambda *_: exit(130)); open('here', 'w'); time.sleep(3600)"
WAITS_IN_THE_ENGINE = "import signal, time; signal.signal(2, signal.SIG_IGN); open('there', 'w'); time.sleep(3600)"


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ((STOPS_WHEN_TOLD, WAITS_IN_THE_ENGINE), ""),
        ((WAITS_IN_THE_ENGINE, STOPS_WHEN_TOLD), "medgpt: stopped by SIGINT\n"),  # rank 0 could not say it
    ],
)
def test_a_rank_that_hears_no_signal_is_not_waited_for_when_the_others_have_stopped(
    monkeypatch, tmp_path, capfd, programs, said
):
    monkeypatch.chdir(tmp_path)

    def start(arguments, rank, num_ranks, listener):
        return subprocess.Popen([sys.executable, "-c", programs[rank]], start_new_session=True)

    def tell():
        while not ((tmp_path / "here").exists() and (tmp_path / "there").exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launch, "_start_rank", start)
    monkeypatch.setattr(launch, "STOPPED_GRACE_S", 0.1)
    monkeypatch.setattr(launch, "GRACE_S", 3600)
    threading.Thread(target=tell, daemon=True).start()
    assert launch.run_ranks([], 2) == 130
    assert capfd.readouterr().err == said


def test_a_signal_before_the_last_rank_is_started_leaves_none_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []

    def start(arguments, rank, num_ranks, listener):
        if rank == 1:
            while not (tmp_path / "here").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        started.append(subprocess.Popen([sys.executable, "-c", STOPS_WHEN_TOLD], start_new_session=True))
        return started[-1]

    def unheard(*_):
        raise AssertionError("the signal came before anybody listened")

    monkeypatch.setattr(launch, "_start_rank", start)
    monkeypatch.setattr(launch, "STOPPED_GRACE_S", 0.1)
    previous = signal.signal(signal.SIGINT, unheard)
    try:
        assert launch.run_ranks([], 2) == 130
        assert len(started) == 2 and all(process.poll() is not None for process in started)
    finally:
        signal.signal(signal.SIGINT, previous)
        for process in started:
            process.kill()
