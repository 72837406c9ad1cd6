from __future__ import annotations

import os
import signal

import pytest

from megatron_medgpt.train import guard


@pytest.fixture
def stop():
    request = guard.StopRequest()
    yield request
    request.restore()


def test_one_request_that_arrives_several_times_is_one(stop):
    """Slurm signals every process of a step, and torchrun passes the signal on."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.signal_name == "SIGTERM"


def test_a_signal_long_after_the_first_acts_as_if_there_were_no_handler(monkeypatch):
    ended = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: ended.append("default"))
    monkeypatch.setattr(guard, "REPEAT_S", dict.fromkeys(guard.STOP_SIGNALS, 0.0))
    real = signal.signal

    def noted(*_: object) -> None:
        ended.append("default")

    monkeypatch.setattr(
        guard.signal, "signal",
        lambda number, action: real(number, noted if action is signal.SIG_DFL else action),
    )  # fmt: skip
    request = guard.StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.requested and not ended
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ended == ["default"]
    finally:
        request.restore()
        real(signal.SIGUSR1, previous)
