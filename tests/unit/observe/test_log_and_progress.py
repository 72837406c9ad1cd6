from __future__ import annotations

import io
import logging

import pytest

from megatron_medgpt.observe.log import KERNELS, PACKAGE, say_platform, set_up_log
from megatron_medgpt.observe.progress import Progress, describe_step, duration


@pytest.fixture
def console(capsys):
    loggers = [logging.getLogger(name) for name in (PACKAGE, KERNELS)]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield capsys
    for logger, (handlers, level, propagate) in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_rank_0_speaks_and_other_ranks_only_warn(console):
    set_up_log(0)
    logging.getLogger("megatron_medgpt.train").info("step %d", 3)
    set_up_log(5)
    logging.getLogger("megatron_medgpt.train").info("hidden")
    logging.getLogger("megatron_medgpt.train").warning("odd")
    first, second = console.readouterr().err.splitlines()
    assert first[2] == ":" and first.endswith(" step 3")
    assert second.endswith(" rank 5: warning: odd")


def test_a_kernel_says_once_which_implementation_serves(console, monkeypatch):
    from medgpt_kernels import dispatch

    monkeypatch.setattr(dispatch, "_said", set())
    set_up_log(0)
    for _ in range(2):
        dispatch.choose("combine", "auto", {"triton": lambda: "no GPU", "reference": lambda: None})
    (line,) = console.readouterr().err.splitlines()
    assert line.endswith(" kernel combine: reference (auto)")


def test_setting_up_twice_prints_every_line_once(console):
    set_up_log(0)
    set_up_log(0)
    logging.getLogger(PACKAGE).info("once")
    assert console.readouterr().err.count("once") == 1


def test_the_log_file_holds_what_the_console_shows(console, tmp_path):
    set_up_log(0, file=tmp_path / "logs" / "rank0.log")
    say_platform("CPU, 2 threads", "TP1·PP1·EP2·DP2", 2)
    line = "running on CPU, 2 threads, 2 processes, layout TP1·PP1·EP2·DP2"
    assert line in (tmp_path / "logs" / "rank0.log").read_text()
    assert line in console.readouterr().err


def test_without_a_terminal_there_is_one_plain_line_per_interval(console):
    set_up_log(0)
    with Progress(name="align", total_steps=10, interval=4, stream=io.StringIO()) as progress:
        for step in range(1, 11):
            progress.step({"stage_step": step, "loss": 1.0, "tokens_per_s": 12345.0, "mfu": 0.412})
    shown = console.readouterr().err
    assert "\r" not in shown and "\x1b" not in shown
    lines = shown.splitlines()
    assert [line.split()[2] for line in lines] == ["4/10", "8/10", "10/10"]
    assert "loss 1.0000  12,345 tokens/s  MFU 41.2 %" in lines[0]
    assert lines[-1].endswith("0 s left")


def test_on_a_terminal_a_bar_is_drawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with Progress(name="align", total_steps=4, done_steps=2, stream=terminal) as progress:
        progress.step({"stage_step": 3, "loss": 0.5})
        progress.say("saved [step]")
    assert "3/4" in terminal.getvalue()
    assert "saved [step]" in terminal.getvalue()


def test_a_step_shows_what_its_record_has_and_nothing_else():
    assert describe_step({"step": 1}) == ""
    assert describe_step({"loss": 2.0, "mfu": None, "option_accuracy": 0.5}) == "loss 2.0000  accuracy 0.500"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (187, "3:07 min"), (3600, "1:00 h"), (18720, "5:12 h"),
     (187200, "2 d 4 h"), (float("inf"), "?")],
)  # fmt: skip
def test_durations_are_for_people(seconds, words):
    assert duration(seconds) == words
