"""Reads a checkpoint back: the manifest first, then every hash, then names and shapes, and only then the tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.checkpoint.find import verify
from megatron_medgpt.checkpoint.manifest import CheckpointFacts, listed, read_manifest
from megatron_medgpt.checkpoint.metadata import OPTIMIZER_PREFIX, StoredTensor, stored_tensors
from megatron_medgpt.checkpoint.ranks import Deadline, gather, on_first_rank, rank_and_size
from megatron_medgpt.checkpoint.tensors import rank_file, read_tensors, sharded_tensors
from megatron_medgpt.config.errors import UsageError

log = logging.getLogger(__name__)


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
