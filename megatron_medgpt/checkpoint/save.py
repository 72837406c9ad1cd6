"""Writes a checkpoint so that it is either whole or not there.

    .tmp-step-N.<id>/  tensors (each rank its own file), manifest with every file's sha256, all flushed
        -> rename to step-N  -> flush the parent  -> latest

A crash at any point leaves the last published checkpoint as it was; ``load.find_latest`` never looks at ``.tmp-*``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_medgpt.checkpoint.manifest import (
    BEST,
    LATEST,
    CheckpointFacts,
    FileEntry,
    check_listing,
    engine_versions,
    flush,
    hash_file,
    pointed_at,
    read_manifest,
    step_folder_name,
    step_folders,
    write_durably,
    write_manifest,
)
from megatron_medgpt.checkpoint.metadata import COMMON, ENGINE_CONFIG, METADATA
from megatron_medgpt.checkpoint.ranks import Deadline, all_or_none, gather, on_first_rank, rank_and_size, reason
from megatron_medgpt.checkpoint.tensors import rank_file, tensors_nbytes, write_rank_state, write_tensors
from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError

log = logging.getLogger(__name__)

_SPACE_MARGIN = 1.1
_LEFTOVER = re.compile(rf"\.(tmp-|trash-|{LATEST}\.|{BEST}\.).*")


def save_checkpoint(
    folder: Path | str,
    step: int,
    sharded_state: dict[str, Any],
    facts: CheckpointFacts,
    *,
    rank_state: Mapping[str, Any] | None = None,
    keep: int = 0,
    is_best: bool = False,
    parallel_group: torch.distributed.ProcessGroup | None = None,
    timeout_s: float = 1800.0,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and move ``latest`` to it. Collective: every rank of the world calls it.

    Args:
        folder: the run's ``checkpoints`` folder, on a file system that all ranks see.
        step: names the folder. It must equal ``facts.step``.
        sharded_state: nested dict of megatron-core sharded tensors (``state.model_state``, ``state.full_state``).
        facts: where the run stands, equal on all ranks; ``versions`` is filled in here when empty.
        rank_state: JSON values of this rank (its random states), kept in a file of its own.
        keep: newest checkpoints to keep after this one is published; ends of stages and the best one are kept besides;
            0 keeps all.
        is_best: move ``best`` to it as well.
        parallel_group: ranks that hold copies of one another's tensors (the data-parallel group). When given they
            share the writing; otherwise the first of them writes alone.
        timeout_s: a rank still inside after this ends with ``ranks.EXIT_HUNG``.

    Raises:
        UsageError: the folder exists already (nothing is ever overwritten).
        WorkError: too little space, or the write failed on any rank. Nothing was published.
    """
    if step != facts.step:
        raise ValueError(f"step={step} but facts.step={facts.step}")
    facts = facts if facts.versions else replace(facts, versions=engine_versions())
    folder = Path(folder).absolute()
    with Deadline(f"saving {folder / step_folder_name(step)}", timeout_s):
        needed = sum(gather(tensors_nbytes(sharded_state)))
        staging = on_first_rank(lambda: _prepare(folder, step, needed))
        try:
            _reached("staging folder made")
            files = _write(staging, sharded_state, rank_state, parallel_group)
            published = on_first_rank(lambda: _publish(folder, staging, facts, files, is_best))
        except MedgptError:
            _discard(staging)
            raise
        except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
            # The writer's own words for a full disk are "unexpected pos": say how much room there was.
            free = shutil.disk_usage(folder).free
            _discard(staging)
            raise WorkError(
                f"checkpoint {folder / step_folder_name(step)} was not written: {reason(error)} (it needed "
                f"{needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB were free when it failed)"
            ) from error
        if keep:
            on_first_rank(lambda: prune(folder, keep))
    return published


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove whole checkpoints older than the newest ``keep`` whole ones, but never the end of a stage or the best.

    A folder that is not whole (by its manifest and its files' sizes) counts for nothing and is left for a person.
    """
    whole = []
    for path in step_folders(folder):
        try:
            manifest = read_manifest(path)
            check_listing(path, manifest)
        except UsageError as error:
            log.warning("not counted and not removed: %s", error)
            continue
        whole.append((path, manifest.facts.stage_end))
    best = pointed_at(folder, BEST)
    removed = [path for path, stage_end in whole[max(keep, 1) :] if not stage_end and path.name != best]
    for path in removed:
        trash = folder / f".trash-{path.name}.{uuid.uuid4().hex[:8]}"
        os.rename(path, trash)
        _reached("old checkpoint renamed")
        shutil.rmtree(trash)
        log.info("removed old checkpoint %s", path.name)
    return removed


def _prepare(folder: Path, step: int, needed_bytes: int) -> Path:
    """On rank 0: refuse what would overwrite or not fit, clear leftovers of dead saves, make the staging folder."""
    target = folder / step_folder_name(step)
    if target.exists():
        raise UsageError(
            f"checkpoint {target} exists and is never overwritten; resume from it, or set another run folder (out=...)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                log.warning("removing %s, left by a save that did not finish", path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = shutil.disk_usage(folder).free
        if needed_bytes * _SPACE_MARGIN > free:
            raise WorkError(
                f"checkpoint {target} needs {needed_bytes / 1e9:.3f} GB and {folder} has {free / 1e9:.3f} GB free; "
                "free some space or set checkpoint.keep lower"
            )
        staging = folder / f".tmp-{target.name}.{uuid.uuid4().hex[:8]}"
        staging.mkdir()
    except OSError as error:
        raise WorkError(
            f"checkpoint folder {folder} cannot be written: {error}; check the path and its rights"
        ) from error
    return staging


def _write(
    staging: Path,
    sharded_state: dict[str, Any],
    rank_state: Mapping[str, Any] | None,
    parallel_group: torch.distributed.ProcessGroup | None,
) -> dict[str, FileEntry]:
    """Write tensors and rank states; return every file with its hash. Each rank reads back only what it wrote."""
    rank, _ = rank_and_size()
    write_tensors(sharded_state, staging, parallel_group=parallel_group)
    _reached("tensors written")

    def finish_own_files() -> dict[str, FileEntry]:
        if rank_state is not None:
            write_rank_state(staging, rank, rank_state)
        names = [path.name for path in staging.glob(f"__{rank}_*.distcp")]
        names += [rank_file(rank)] if rank_state is not None else []
        names += [METADATA, ENGINE_CONFIG, COMMON] if rank == 0 else []
        for name in names:  # torch flushes its own; megatron-core's metadata.json is not
            flush(staging / name)
        return {name: hash_file(staging / name) for name in names}

    files: dict[str, FileEntry] = {}
    for part in all_or_none(finish_own_files):
        files.update(part)
    _reached("files hashed")
    return files


def _publish(
    folder: Path, staging: Path, facts: CheckpointFacts, files: dict[str, FileEntry], is_best: bool
) -> Path:  # fmt: skip
    """On rank 0: manifest, flush, rename, flush, latest, best."""
    target = folder / step_folder_name(facts.step)
    manifest = write_manifest(staging, facts, files)
    check_listing(staging, manifest)
    flush(staging)
    _reached("manifest written")
    os.rename(staging, target)
    flush(folder)
    _reached("renamed")
    _point(folder, LATEST, target)
    if is_best:
        _point(folder, BEST, target)
    total = sum(entry.size_bytes for entry in files.values())
    log.info("saved %s (%d files, %.1f MB)", target, len(files), total / 1e6)
    return target


def _point(folder: Path, name: str, target: Path) -> None:
    """Let ``latest`` or ``best`` name a checkpoint; a reader finds the old name or the new one."""
    pointer = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    write_durably(pointer, (target.name + "\n").encode())
    _reached(f"{name} written aside")
    os.replace(pointer, folder / name)
    flush(folder)


def _discard(staging: Path) -> None:
    """On rank 0: free the disk of a save that failed. What remains of it is cleared by the next save."""
    if rank_and_size()[0] == 0:
        shutil.rmtree(staging, ignore_errors=True)


def _reached(point: str) -> None:
    """Say where a save stands. The crash tests end the process at these lines."""
    log.debug("save: %s", point)
