"""What validations take of a stage's time, and whether the next one fits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from megatron_medgpt.config.schema import StageConfig

DEAR = 0.05
"""Share of a stage's time above which its validations are worth a word."""
_LOG = logging.getLogger(__name__)


class ValidationCost:
    """Of one stage, since it began or was resumed here. It says once what is dear, or put off."""

    def __init__(self, stage: StageConfig, *, speaks: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._stage, self._speaks, self._clock = stage, speaks, clock
        self._began_s = clock()
        self._total_s = self._last_s = 0.0

    def fits(self) -> bool:
        """Whether one more that takes as long as the last keeps within ``validation_max_share``. The first always."""
        most = self._stage.validation_max_share
        if not most or not self._last_s:
            return True
        fits = self._total_s + self._last_s <= most * (self._clock() - self._began_s + self._last_s)
        if not fits:
            self._say(
                "a validation takes %.1f s; those due are put off until they fit into %g %% of the time of stage %s "
                "(stages.%s.validation_max_share)", self._last_s, 100 * most, self._stage.name, self._stage.name,
            )  # fmt: skip
        return fits

    def note(self, seconds: float) -> float:
        """Take in a validation that is over; the share of the stage's time that all of them have taken."""
        self._last_s = seconds
        self._total_s += seconds
        share = self._total_s / (self._clock() - self._began_s)
        if share > DEAR and not self._stage.validation_max_share:
            name = self._stage.name
            self._say(
                "validation has taken %.0f %% of the time of stage %s; a longer stages.%s.validation_interval, fewer "
                "num_questions and validation_rows, or a validation_max_share make it cheaper", 100 * share, name, name,
            )  # fmt: skip
        return share

    def _say(self, *message: object) -> None:
        if self._speaks:
            _LOG.warning(*message)  # type: ignore[arg-type]
        self._speaks = False
