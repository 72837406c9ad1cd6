"""Runs a table over tensors that are not in memory: part by part, several parts side by side.

A part is a range of the first axis of a row's tensors (a handful of experts, some rows of the embedding), or a whole
tensor where the row's move mixes the axis. Memory in use is therefore a few parts, whatever the size of the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.table import Constant, Row

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20
"""About as much of a tensor is worked on at a time."""
_SPACE_MARGIN = 1.02
_REPORT_SECONDS = 10.0


class Source(Protocol):
    """Tensors by name, read on demand: ``SafetensorsFolder``, ``StoredCheckpoint``, ``TensorsInMemory``."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def spec(self, name: str) -> TensorSpec: ...

    def tensor(self, name: str, first: int = 0, end: int | None = None) -> Tensor: ...

    def forget(self, name: str, first: int = 0, end: int | None = None) -> None: ...


class TensorsInMemory:
    """A mapping as a source; for tests and for small new tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec.of(self._tensors[name])

    def tensor(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor[first:end] if tensor.ndim else tensor

    def forget(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Nothing: the mapping owns its tensors."""


class Renamed:
    """A source under other names; names that the function maps to None are left out."""

    def __init__(self, source: Source, rename: Callable[[str], str | None]) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.names:
            new = rename(name)
            if new is None:
                continue
            if new in self._names:
                raise UsageError(f"tensors {self._names[new]} and {name} are both spellings of {new}; keep one of them")
            self._names[new] = name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(self._names[name])

    def tensor(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        return self._source.tensor(self._names[name], first, end)

    def forget(self, name: str, first: int = 0, end: int | None = None) -> None:
        self._source.forget(self._names[name], first, end)


@dataclass(frozen=True, slots=True)
class Part:
    """Range ``[first, end)`` of the first axis of a row's tensors."""

    row: Row
    first: int
    end: int
    num_bytes: int


def split_rows(rows: Sequence[Row], source: Source, names_of: Callable[[Row], tuple[str, ...]]) -> Iterator[Part]:
    """The parts of all rows.

    Args:
        names_of: the tensors that a row reads from the source.
    """
    for row in rows:
        specs = [source.spec(name) for name in names_of(row)]
        total = sum(spec.num_bytes for spec in specs)
        length = specs[0].shape[0] if specs[0].shape else 1
        step = length
        if row.move.by_parts and total > PART_BYTES:
            step = max(1, length * PART_BYTES // total)
        for first in range(0, max(length, 1), max(step, 1)):
            end = min(first + step, length)
            yield Part(row, first, end, total * (end - first) // max(length, 1))


def read_part(part: Part, source: Source, names: Sequence[str]) -> list[Tensor]:
    """The tensors of a part, in the order of the names."""
    if not part.row.move.by_parts:
        return [source.tensor(name) for name in names]
    return [source.tensor(name, part.first, part.end) for name in names]


def forget_part(part: Part, source: Source, names: Sequence[str]) -> None:
    for name in names:
        if part.row.move.by_parts:
            source.forget(name, part.first, part.end)
        else:
            source.forget(name)


def to_ours_specs(rows: Sequence[Row], source: Source, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Shape and dtype of our tensors; floating point is cast to ``dtype`` when given."""
    found = {}
    for row in rows:
        spec = TensorSpec.of(row.move.to_ours([source.spec(name).meta() for name in row.published]))
        found[row.ours] = _cast_spec(spec, dtype)
    return found


def to_published_specs(
    rows: Sequence[Row], constants: Sequence[Constant], source: Source, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Shape and dtype of the published tensors, in the order of the table; packed ones stay uint8."""
    found = {}
    for row in rows:
        for name, tensor in zip(row.published, row.move.to_published(source.spec(row.ours).meta())):
            found[name] = _cast_spec(TensorSpec.of(tensor), dtype)
    for constant in constants:
        found[constant.published] = TensorSpec(constant.shape, dtype)
    return found


def _cast_spec(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return TensorSpec(spec.shape, dtype) if dtype is not None and spec.dtype.is_floating_point else spec


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Floating point in another dtype; integers as they are."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def run_parts(parts: Iterable[Part], work: Callable[[Part], None], *, num_threads: int, what: str) -> None:
    """Do ``work`` for every part on a few threads, and say how far it is.

    Raises:
        MedgptError, OSError: the first that a part raised; parts not yet begun are not begun.
    """
    parts = list(parts)
    total, done, said = sum(part.num_bytes for part in parts), 0, time.monotonic()
    waiting = iter(parts)
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        running: dict[Future[None], Part] = {}

        def begin() -> None:
            part = next(waiting, None)
            if part is not None:
                running[pool.submit(work, part)] = part

        for _ in range(max(1, num_threads)):
            begin()
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                part = running.pop(future)
                future.result()
                done += part.num_bytes
                begin()
            if time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                log.info("%s: %.2f of %.2f GB", what, done / 1e9, total / 1e9)


def amount(num_bytes: float) -> str:
    """Bytes for people: of a small model ``29.30 MB``, not ``0.03 GB``."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def refuse_existing(out: Path) -> None:
    """Raise UsageError where a new folder cannot be made: something is there, or a folder above it is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is never overwritten; name another folder with --out, or remove it")
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise UsageError(f"--out {out}: {above} is a file; name a folder")


@contextmanager
def staged_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends without an error, and is removed otherwise.

    A reader therefore never takes a half-written folder for a whole one. Leftovers of a conversion that was killed are
    cleared by the next one to the same place.

    Raises:
        UsageError: ``out`` exists and is not an empty folder.
        WorkError: too little space, or the disk refuses.
    """
    out = out.absolute()
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".tmp-{out.name}.*"):
            log.warning("removing %s, left by a conversion that did not finish", left)
            shutil.rmtree(left)
        free = shutil.disk_usage(out.parent).free
        if needed_bytes * _SPACE_MARGIN > free:
            raise WorkError(f"{out} needs {amount(needed_bytes)} and its disk has {amount(free)} free; free some space")
        staging = out.parent / f".tmp-{out.name}.{uuid.uuid4().hex[:8]}"
        staging.mkdir()
    except OSError as error:
        raise WorkError(f"{out} cannot be written: {error}; check the path and its rights") from error
    try:
        yield staging
        _flush(staging)
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
        _flush(out.parent)
    except MedgptError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise WorkError(f"{out} was not written: {error}") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
