"""Validation figures watched over a stage: has it reached its goal, has it stopped getting better, is this the best?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import StageConfig, lower_is_better


@dataclass(kw_only=True)
class Best:
    """The best value of one figure so far."""

    metric: str
    value: float | None = None
    validations_since: int = 0

    def note(self, figures: Mapping[str, float]) -> bool:
        """Take in a validation; true where it is better than all before. A figure that is not a number never is.

        Raises:
            UsageError: the validation has no such figure.
        """
        if self.metric not in figures:
            raise UsageError(
                f"the validation has no figure {self.metric!r} to watch; it has {', '.join(sorted(figures))}"
            )
        value = figures[self.metric]
        reached = value == value and (self.value is None or self._is_better(value))
        self.value = value if reached else self.value
        self.validations_since = 0 if reached else self.validations_since + 1
        return reached

    def _is_better(self, value: float) -> bool:
        assert self.value is not None
        return value < self.value if lower_is_better(self.metric) else value > self.value


class Watch:
    """What a stage watches: the figure of its exit criterion, and the one by which the best checkpoint is chosen.

    The state goes into every checkpoint (``state``), so that a resumed stage stops where it would have stopped.
    """

    def __init__(self, stage: StageConfig, state: Mapping[str, Any] | None = None) -> None:
        self._exit, state = stage.exit, state or {}
        self._ending = self._restored(stage.exit.metric, state.get("exit"))
        self._keeping = self._restored(stage.best_by, state.get("best"))

    @staticmethod
    def _restored(metric: str | None, state: Mapping[str, Any] | None) -> Best | None:
        if metric is None:
            return None
        if state is None or state["metric"] != metric:  # the stage was resumed with another figure to watch
            return Best(metric=metric)
        return Best(metric=metric, value=state["value"], validations_since=state["validations_since"])

    @property
    def best(self) -> Best | None:
        """By which the best checkpoint is chosen; None where none is kept."""
        return self._keeping

    def note(self, figures: Mapping[str, float]) -> tuple[bool, bool]:
        """(the stage is over, this is its best checkpoint) by a validation's figures, equal on every rank."""
        is_best = self._keeping is not None and self._keeping.note(figures)
        if self._ending is None:
            return False, is_best
        self._ending.note(figures)
        return self._reached(figures[self._ending.metric]) or self._tired(), is_best

    def _reached(self, value: float) -> bool:
        threshold = self._exit.threshold
        if threshold is None:
            return False
        assert self._ending is not None
        return value <= threshold if lower_is_better(self._ending.metric) else value >= threshold

    def _tired(self) -> bool:
        assert self._ending is not None
        return 0 < self._exit.patience <= self._ending.validations_since

    def state(self) -> dict[str, Any]:
        """JSON values from which ``Watch`` goes on."""
        kept = {"exit": self._ending, "best": self._keeping}
        return {name: dict(vars(best)) for name, best in kept.items() if best is not None}
