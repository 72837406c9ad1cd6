"""What the ranks of a save or load tell each other, and the deadline under which they do it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed
from torch.distributed.checkpoint import CheckpointException

from megatron_medgpt.config.errors import MedgptError

T = TypeVar("T")

EXIT_HUNG = 75
"""Exit code of a rank whose save or load passed its deadline (sysexits' EX_TEMPFAIL: try again)."""


def rank_and_size() -> tuple[int, int]:
    """This process and the number of all; (0, 1) where torch.distributed was not started."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank. Collective over the world."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, value)
    return values


def all_or_none(work: Callable[[], T]) -> list[T]:
    """Do ``work`` on every rank and return every rank's result, or raise on all ranks if it failed on any.

    Without this a rank whose disk is full raises alone and the others wait for it until the group times out.

    Raises:
        MedgptError: of the first rank that raised one; other exceptions are raised as RuntimeError on the other ranks.
    """
    result, own_error = None, None
    try:
        result = work()
    except Exception as error:
        own_error = error
    message = str(own_error) if isinstance(own_error, MedgptError) else own_error and reason(own_error)
    outcomes = gather((result, None if own_error is None else (type(own_error), message)))
    failures = [(rank, failure) for rank, (_, failure) in enumerate(outcomes) if failure is not None]
    if own_error is not None:
        raise own_error
    if failures:
        rank, (kind, message) = failures[0]
        if issubclass(kind, MedgptError):
            raise kind(message)
        raise RuntimeError(f"rank {rank}: {message}")
    return [result for result, _ in outcomes]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0 and give its result to all, or raise on all what it raised there."""
    rank, _ = rank_and_size()
    return all_or_none(lambda: work() if rank == 0 else None)[0]  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the system's own word where there is one behind the error."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {reason(failure[0])}" for rank, failure in sorted(error.failures.items()))
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


class Deadline:
    """Ends the process with ``EXIT_HUNG`` when the block takes longer than ``timeout_s``.

    A write into a dead file system, or a collective whose peer is stopped, cannot be interrupted from Python: the
    thread is inside the kernel or NCCL. Ending the process is what lets the launcher start the job again.
    """

    def __init__(self, what: str, timeout_s: float) -> None:
        self._what, self._timeout_s = what, timeout_s
        self._timer = threading.Timer(timeout_s, self._abort)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def _abort(self) -> None:
        rank, _ = rank_and_size()
        print(
            f"rank {rank}: {self._what} took longer than {self._timeout_s:.0f} s; this process ends with exit code "
            f"{EXIT_HUNG}. What was saved before is untouched: start the run again to resume from it.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_HUNG)
