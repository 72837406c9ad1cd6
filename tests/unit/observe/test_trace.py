from __future__ import annotations

import pytest

from megatron_medgpt.observe import trace
from megatron_medgpt.observe.trace import Trace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trace.time, "perf_counter", clock)
    return clock


def test_spans_and_the_rest_add_up_to_the_step(clock):
    spans = Trace()
    with spans.span("data"):
        clock.now += 1
    clock.now += 2
    with spans.span("model"):
        clock.now += 5
    with spans.span("data"):
        clock.now += 1
    assert spans.end_step() == {"data": 2, "model": 5, "other": 2}
    assert spans.end_step() == {"other": 0}


def test_time_inside_an_inner_span_is_not_counted_twice(clock):
    spans = Trace()
    with spans.span("model"):
        clock.now += 1
        with spans.span("data"):
            clock.now += 2
        clock.now += 3
    assert spans.end_step() == {"data": 2, "model": 4, "other": 0}


def test_a_span_ends_when_its_block_raises(clock):
    spans = Trace()
    with pytest.raises(KeyError), spans.span("data"):
        clock.now += 1
        raise KeyError
    assert spans.end_step() == {"data": 1, "other": 0}


def test_shares_are_over_all_steps(clock):
    spans = Trace()
    assert spans.shares() == {}
    for seconds in (1, 3):
        with spans.span("model"):
            clock.now += seconds
        clock.now += 1
        spans.end_step()
    assert spans.shares() == {"model": 4 / 6, "other": 2 / 6}
    assert spans.share_outside("model") == pytest.approx(1 / 3)
