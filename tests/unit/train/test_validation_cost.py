"""Validations that would take too much of a stage's time wait."""

from __future__ import annotations

import logging

import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import BlendConfig, StageConfig
from megatron_medgpt.train.validation_cost import ValidationCost

DATA = (BlendConfig(path="data"),)


def stage(**fields):
    return StageConfig(name="s", data=DATA, num_steps=400, validation_interval=10, validation_data=DATA, **fields)


def steps_of_validations(settings: StageConfig, *, step_s: float, validation_s: float) -> tuple[list[int], float]:
    """At which steps validations come, and their share of the time at the end."""
    now = [0.0]
    cost = ValidationCost(settings, speaks=True, clock=lambda: now[0])
    found, spent = [], 0.0
    for step in range(1, settings.num_steps + 1):
        now[0] += step_s
        if step % settings.validation_interval == 0 and cost.fits():
            now[0] += validation_s
            spent += validation_s
            assert cost.note(validation_s) == pytest.approx(spent / now[0])
            found.append(step)
    return found, spent / now[0]


def test_without_a_share_none_is_put_off_and_dear_ones_are_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        steps, share = steps_of_validations(stage(), step_s=1.0, validation_s=2.0)
    assert steps == list(range(10, 401, 10))
    assert share == pytest.approx(1 / 6)
    assert [record.getMessage()[:26] for record in caplog.records] == ["validation has taken 17 % "]


def test_dear_validations_are_put_off_until_they_fit(caplog):
    with caplog.at_level(logging.WARNING):
        steps, share = steps_of_validations(stage(validation_max_share=0.05), step_s=1.0, validation_s=2.0)
    # After the first, 2 s are 5 % of the time with 38 steps: the k-th at the first interval after 38 k.
    assert steps == [10, *(-(-38 * k // 10) * 10 for k in range(2, 11))]
    assert share <= 0.05
    assert len(caplog.records) == 1
    assert "a validation takes 2.0 s; those due are put off until they fit into 5 %" in caplog.text


def test_cheap_validations_come_at_every_interval(caplog):
    steps, _ = steps_of_validations(stage(validation_max_share=0.05), step_s=1.0, validation_s=0.5)
    assert steps == list(range(10, 401, 10))
    assert not caplog.records


def test_a_share_is_less_than_the_whole():
    with pytest.raises(UsageError, match=r"stages\.s\.validation_max_share is 5; it must be below 1 \(0\.05 is 5 %\)"):
        stage(validation_max_share=5)
