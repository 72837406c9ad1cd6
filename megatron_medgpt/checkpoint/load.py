"""Reads a checkpoint back: the manifest first, then every hash, then names and shapes, and only then the tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
from megatron_medgpt.checkpoint.metadata import StoredTensor, stored_tensors
from megatron_medgpt.checkpoint.ranks import Deadline, all_or_none, gather, on_first_rank, rank_and_size
from megatron_medgpt.checkpoint.tensors import (
    rank_file,
    read_tensors,
    sharded_tensors,
)
from megatron_medgpt.config.errors import UsageError

log = logging.getLogger(__name__)

OPTIMIZER_PREFIX = "optimizer.state."
"""megatron-core's key prefix of optimizer tensors in the fully reshardable format."""


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
    if (path / MANIFEST).is_file():
        return path
    if path.name == BEST and (best := pointed_at(path.parent, BEST)) is not None:
        if (path.parent / best / MANIFEST).is_file():
            return path.parent / best
        raise UsageError(f"{path} names {best}, which is not there; name a step-NNNNNNNN folder")
    folder = path.parent if path.name == LATEST else path
    for candidate in (folder, folder / "checkpoints"):
        if (newest := find_latest(candidate)) is not None:
            return newest
    raise UsageError(f"{path} is no checkpoint and holds none; name a step-NNNNNNNN folder, or the folder of a run")


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


def load_checkpoint(
    path: Path | str,
    sharded_state: dict[str, Any],
    *,
    verify_content: bool = True,
    weights_only: bool = False,
    timeout_s: float = 1800.0,
) -> tuple[dict[str, Any], CheckpointFacts]:
    """Fill ``sharded_state`` from a checkpoint written in any layout. Collective: every rank of the world calls it.

    Strict in both ways: every tensor asked for is there with its shape, and every tensor that is there was asked for.

    Args:
        path: a ``step-NNNNNNNN`` folder.
        sharded_state: what ``state.model_state`` or ``state.full_state(loading=True)`` gave.
        verify_content: check every file's sha256 first. False only right after ``find_latest``, which has just done it.
        weights_only: leave the checkpoint's optimizer tensors unread (the next stage starts with a fresh optimizer).

    Returns:
        The state with plain tensors in the places of the sharded ones (``state.load_weights``, ``state.load_optimizer``
        put them in), and the facts.

    Raises:
        UsageError: the checkpoint is missing, half-written, altered, carries pickles, or is of another model.
    """
    path = Path(path).absolute()
    with Deadline(f"loading {path}", timeout_s):
        manifest = verify(path) if verify_content else on_first_rank(lambda: read_manifest(path))
        stored = on_first_rank(lambda: stored_tensors(path))
        _check_names_and_shapes(path, stored, sharded_state, weights_only)
        loaded = read_tensors(sharded_state, path)
    return loaded, manifest.facts


def load_rank_state(path: Path | str, layout: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON values this rank saved for itself, or None when the layout is not the one that saved them."""
    path = Path(path).absolute()
    rank, _ = rank_and_size()
    file = path / rank_file(rank)
    manifest = read_manifest(path)
    if file.name not in manifest.files or manifest.facts.layout != json.loads(json.dumps(dict(layout))):
        return None
    return json.loads(file.read_bytes())


def _check_names_and_shapes(
    path: Path, stored: Mapping[str, StoredTensor], sharded_state: Mapping[str, Any], weights_only: bool
) -> None:
    """Compare what all ranks ask for with what is stored, on every rank alike."""
    own = {leaf.key: (tuple(leaf.global_shape), leaf.dtype) for leaf in sharded_tensors(sharded_state)}
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for part in gather(own):
        wanted.update(part)
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(
        key for key in stored.keys() - wanted.keys() if not (weights_only and key.startswith(OPTIMIZER_PREFIX))
    )
    if missing or unexpected:
        parts = [f"{what} {listed(keys)}" for what, keys in (("lacks", missing), ("also holds", unexpected)) if keys]
        raise UsageError(f"checkpoint {path} is of another model: it {' and '.join(parts)}; set model.* to its model")
    for key, (shape, _) in sorted(wanted.items()):
        if stored[key].shape != shape:
            raise UsageError(
                f"checkpoint {path} is of another model: {key} has shape {list(stored[key].shape)}, the model's is "
                f"{list(shape)}; set model.* to its model"
            )
    cast = sorted(key for key, (_, dtype) in wanted.items() if stored[key].dtype != dtype)
    if cast and rank_and_size()[0] == 0:
        log.warning(
            "%d tensors change dtype, e.g. %s %s -> %s", len(cast), cast[0], stored[cast[0]].dtype, wanted[cast[0]][1]
        )
