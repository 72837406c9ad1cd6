"""What a stage watches: goals, patience, the best checkpoint, and their state over a restart."""

from __future__ import annotations

import json
import math

import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import BlendConfig, ExitConfig, StageConfig
from megatron_medgpt.train.watch import Watch

DATA = (BlendConfig(path="data"),)


def stage(**fields):
    return StageConfig(
        name="s", data=DATA, num_steps=9, validation_interval=1, validation_data=DATA, questions="q", **fields
    )


def notes(watch, metric, values):
    return [watch.note({metric: value}) for value in values]


def test_a_goal_is_reached_from_the_right_side():
    accuracy = Watch(stage(exit=ExitConfig(metric="option_accuracy", threshold=0.5)))
    assert notes(accuracy, "option_accuracy", [0.4, 0.5]) == [(False, False), (True, False)]
    loss = Watch(stage(exit=ExitConfig(metric="validation_loss", threshold=2.0)))
    assert notes(loss, "validation_loss", [2.1, 2.0]) == [(False, False), (True, False)]


def test_patience_counts_validations_without_a_new_best():
    watch = Watch(stage(exit=ExitConfig(metric="option_accuracy", patience=2)))
    ends = [end for end, _ in notes(watch, "option_accuracy", [0.2, 0.1, 0.3, 0.3, 0.2])]
    assert ends == [False, False, False, False, True]


def test_a_figure_that_is_not_a_number_is_never_the_best_and_wears_patience():
    watch = Watch(stage(exit=ExitConfig(metric="option_loss", patience=2), best_by="option_loss"))
    assert notes(watch, "option_loss", [math.nan, 1.0, math.nan, math.nan]) == [
        (False, False), (False, True), (False, False), (True, False)
    ]  # fmt: skip


def test_the_best_checkpoint_is_that_of_the_best_validation():
    watch = Watch(stage(best_by="option_accuracy/CT"))
    best = [is_best for _, is_best in notes(watch, "option_accuracy/CT", [0.2, 0.1, 0.3, 0.3])]
    assert best == [True, False, True, False]


def test_a_watch_goes_on_from_its_state():
    settings = stage(exit=ExitConfig(metric="validation_loss", patience=3), best_by="option_accuracy")
    values = [(2.0, 0.3), (1.0, 0.2), (1.5, 0.4), (1.4, 0.4), (1.2, 0.1)]
    figures = [{"validation_loss": loss, "option_accuracy": accuracy} for loss, accuracy in values]
    whole = Watch(settings)
    wanted = [whole.note(one) for one in figures]
    assert wanted[-1] == (True, False)
    for cut in range(len(figures)):
        first = Watch(settings)
        for one in figures[:cut]:
            first.note(one)
        second = Watch(settings, json.loads(json.dumps(first.state())))
        assert [second.note(one) for one in figures[cut:]] == wanted[cut:]


def test_another_figure_to_watch_begins_afresh():
    first = Watch(stage(best_by="option_accuracy"))
    first.note({"option_accuracy": 0.9})
    second = Watch(stage(best_by="validation_loss"), first.state())
    assert second.note({"validation_loss": 5.0}) == (False, True)


def test_a_figure_that_the_validation_lacks_is_named():
    with pytest.raises(UsageError, match=r"'option_accuracy/OCT'.*option_accuracy/CT"):
        Watch(stage(best_by="option_accuracy/OCT")).note({"option_accuracy/CT": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_by": "accuracy"}, "stages.s.best_by='accuracy'; allowed: validation_loss"),
        ({"best_by": "option_loss", "questions": None}, "needs stages.s.questions"),
        ({"best_by": "validation_loss", "validation_data": ()}, "needs stages.s.validation_data"),
        ({"best_by": "validation_loss", "validation_interval": 0}, "needs stages.s.validation_interval > 0"),
    ],
)
def test_a_figure_that_no_validation_has_is_refused_in_the_configuration(fields, message):
    settings = {"validation_interval": 1, "validation_data": DATA, "questions": "q"} | fields
    with pytest.raises(UsageError) as refused:
        StageConfig(name="s", data=DATA, num_steps=1, **settings)
    assert message in str(refused.value)


@pytest.mark.parametrize("fields", [{"metric": "option_loss"}, {"patience": 2}, {"patience": -1}])
def test_an_exit_that_ends_nothing_is_refused(fields):
    with pytest.raises(UsageError, match=r"exit\."):
        ExitConfig(**fields)
