"""Finds the checkpoint that is meant, and proves that it is whole. Needs no megatron-core, and unpickles nothing."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_medgpt.checkpoint.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    STEP_NAME,
    CheckpointFacts,
    Manifest,
    altered_files,
    check_listing,
    listed,
    pointed_at,
    read_manifest,
    step_folder_name,
    step_folders,
)
from megatron_medgpt.checkpoint.metadata import stored_tensors
from megatron_medgpt.checkpoint.ranks import Deadline, all_or_none, on_first_rank, rank_and_size
from megatron_medgpt.config.errors import UsageError

log = logging.getLogger(__name__)


def find_latest(folder: Path | str, *, timeout_s: float = 1800.0) -> Path | None:
    """The newest whole checkpoint of a run, or None when the run has none at all.

    ``latest`` is not trusted: folders are tried from the newest step down, each by its manifest, its listing and every
    file's sha256, and one log line says why a folder was passed over. Collective where torch.distributed runs (the
    ranks divide the hashing).

    Raises:
        UsageError: there are checkpoints and none is whole. Starting afresh must be somebody's decision.
    """
    folder = Path(folder).absolute()
    with Deadline(f"looking for the newest checkpoint in {folder}", timeout_s):
        candidates = on_first_rank(lambda: step_folders(folder))
        for path in candidates:
            try:
                verify(path)
            except UsageError as error:
                if rank_and_size()[0] == 0:
                    log.warning("passed over: %s", error)
                continue
            return path
    if candidates:
        raise UsageError(
            f"{folder} holds {len(candidates)} checkpoints and none is whole (see the lines above); restore one, or "
            "move the folder away to start afresh"
        )
    return None


def resolve_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder meant by what people have at hand: itself, a run, its ``checkpoints``, their ``latest`` or
    ``best``.

    A folder of checkpoints means its newest whole one (``find_latest``). Collective where torch.distributed runs.

    Raises:
        UsageError: there is no checkpoint.
    """
    path = Path(path).absolute()
    if (named := named_checkpoint(path)) is not None:
        return named
    folder = path.parent if path.name == LATEST else path
    for candidate in (folder, folder / "checkpoints"):
        if (newest := find_latest(candidate)) is not None:
            return newest
    raise UsageError(f"{path} is no checkpoint and holds none; name a step-NNNNNNNN folder, or the folder of a run")


def named_checkpoint(path: Path | str) -> Path | None:
    """The checkpoint folder that a path itself names, or the ``best`` it is; None where one has to be looked for.
    Its content was not compared with its manifest. Not collective.

    Raises:
        UsageError: ``best`` names a folder that is not there.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).is_file():
        return path
    if path.name == BEST and (best := pointed_at(path.parent, BEST)) is not None:
        if (path.parent / best / MANIFEST).is_file():
            return path.parent / best
        raise UsageError(f"{path} names {best}, which is not there; name a step-NNNNNNNN folder")
    return None


def verify(path: Path | str) -> Manifest:
    """Check a checkpoint's listing and every byte against its manifest; nothing is unpickled. Collective.

    Raises:
        UsageError: it is missing, half-written, or a file was altered, named in one line.
    """
    path = Path(path).absolute()
    rank, size = rank_and_size()

    def read() -> Manifest:
        manifest = read_manifest(path)
        if (named := STEP_NAME.fullmatch(path.name)) and int(named[1]) != manifest.facts.step:
            raise UsageError(
                f"checkpoint {path} was written at step {manifest.facts.step}; give it back the name "
                f"{step_folder_name(manifest.facts.step)}, or one that is no step"
            )
        check_listing(path, manifest)
        return manifest

    manifest = on_first_rank(read)
    altered = sorted(name for part in all_or_none(lambda: altered_files(path, manifest, part=rank, num_parts=size))
                     for name in part)  # fmt: skip
    if altered:
        raise UsageError(
            f"checkpoint {path}: the content of {listed(altered)} is not what was written (sha256 differs); "
            "use another checkpoint"
        )
    return manifest


def read_facts(path: Path | str) -> CheckpointFacts:
    """Facts of a checkpoint, for which only its manifest is read. Not collective."""
    return read_manifest(Path(path).absolute()).facts


def holds_packed_experts(path: Path | str) -> bool:
    """Are the experts of a checkpoint in MXFP4, as they were published? Collective; every file is compared with the
    manifest first, so that ``load_checkpoint`` need not do it again.

    Raises:
        UsageError: the checkpoint is missing, half-written or altered.
    """
    path = Path(path).absolute()
    verify(path)
    return on_first_rank(lambda: any(".experts." in key and key.endswith("_blocks") for key in stored_tensors(path)))
