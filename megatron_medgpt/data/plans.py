"""Plans of the epochs of a stage: in memory, from disk, or made and kept.

A plan of many samples takes seconds and much memory to make and little to read, and every rank of a node needs the
same one. So one rank makes it while the others wait, and all of them map the file. It is named by its content key (the
stage's plan hash and the epoch); what is damaged or of another key is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_medgpt.data.manifest import write_json
from megatron_medgpt.data.pack import EpochPlan

KEPT_ON_DISK_FROM = 1 << 18
"""Samples of an epoch above which its plan is kept on disk: below it is made in a fraction of a second."""
_IN_MEMORY = 2


class EpochPlans:
    """``plans[epoch]`` is the plan of an epoch.

    Args:
        make: makes the plan of an epoch.
        key: hash of everything a plan depends on, but the epoch.
        folder: where plans are kept; None keeps none.
    """

    def __init__(self, make: Callable[[int], EpochPlan], key: str, folder: Path | None) -> None:
        self._make, self._key, self._folder = make, key, folder
        self._plans: dict[int, EpochPlan] = {}
        self._lock = threading.Lock()

    def __getitem__(self, epoch: int) -> EpochPlan:
        with self._lock:
            plan = self._plans.get(epoch)
            if plan is None:
                plan = self._made_by_one(epoch) if self._folder else self._make(epoch)
                while len(self._plans) >= _IN_MEMORY:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[epoch] = plan
            return plan

    def _made_by_one(self, epoch: int) -> EpochPlan:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._key[:16]}-epoch-{epoch:05d}"
        with _one_at_a_time(self._folder / f"{name}.lock"):
            plan = _read(self._folder, name, self._key)
            if plan is None:
                plan = self._make(epoch)
                if plan.samples.size >= KEPT_ON_DISK_FROM:
                    _keep(self._folder, name, self._key, plan)
                    self._forget(epoch)
                    plan = _read(self._folder, name, self._key) or plan
        return plan

    def _forget(self, epoch: int) -> None:
        """Remove plans that nobody asks for again: the first gives the rows of an epoch, the last may still be read."""
        start = f"{self._key[:16]}-epoch-"
        for path in self._folder.glob(f"{start}*"):
            if 0 < int(path.name.removeprefix(start)[:5]) < epoch - 1:
                path.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _keep(folder: Path, name: str, key: str, plan: EpochPlan) -> None:
    entry: dict[str, str] = {"key": key}
    for field in fields(plan):
        partial = folder / f".{name}.{secrets.token_hex(4)}.partial"
        with open(partial, "wb") as file:
            np.save(file, getattr(plan, field.name), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        entry[field.name] = _sha256(partial)
        os.replace(partial, folder / f"{name}.{field.name}.npy")
    write_json(folder / f"{name}.json", entry)  # the last file: without it there is no plan


def _read(folder: Path, name: str, key: str) -> EpochPlan | None:
    try:
        entry = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        arrays = {}
        for field in fields(EpochPlan):
            path = folder / f"{name}.{field.name}.npy"
            if entry["key"] != key or _sha256(path) != entry[field.name]:
                return None
            arrays[field.name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return EpochPlan(**arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
