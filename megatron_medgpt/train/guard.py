"""What ends a run early: signals, and numbers that are not finite."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from megatron_medgpt.config.errors import WorkError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_S = {signal.SIGTERM: 30.0, signal.SIGINT: 3.0, signal.SIGUSR1: 30.0}
"""A person at a terminal may insist sooner."""


class StopRequest:
    """Remembers that a signal has asked this rank to stop.

    The loop adds the flag of all ranks once per step, so they save the same step, whichever of them was told. A later
    signal acts as if there were no handler: a run that hangs while saving can still be ended. Slurm signals every
    process of a step and torchrun passes the signal on, so one request arrives several times: repeats within
    ``REPEAT_S`` count as the same.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_s = 0.0
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, _frame: object) -> None:
        if self.signal_name is None:
            self.signal_name, self._first_s = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first_s > REPEAT_S[number]:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def refuse_non_finite(
    *, loss_sum: float, num_bad_ranks: int, bad_here: bool, rank: int, step: int, sample_ids: list[str], out: Path
) -> None:
    """Stop before the optimizer has used a loss or gradient that is NaN or infinite on any rank.

    The ranks that saw it write the opaque ids of their samples of the step into ``non-finite/``.

    Raises:
        WorkError: on every rank, naming the step and where the ids are.
    """
    if num_bad_ranks == 0 and loss_sum == loss_sum and abs(loss_sum) != float("inf"):
        return
    folder = out / "non-finite"
    if bad_here:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"step": step, "rank": rank, "samples": sample_ids}
        (folder / f"step-{step:08d}-rank-{rank:05d}.json").write_text(json.dumps(record, indent=1))
    raise WorkError(
        f"step {step}: loss or gradient is not finite on {max(num_bad_ranks, 1)} rank(s); no parameter was changed. "
        f"The samples are listed in {folder}; continue from the last checkpoint with a lower learning rate, or "
        "without them"
    )
