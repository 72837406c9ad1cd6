"""The manifest of a checkpoint folder: what it holds, byte for byte, and what the run was doing when it was written.

``manifest.json`` is canonical JSON (sorted keys, one line feed at its end) with a digest over itself, so that one
changed byte of it is found too. It is the last file written before the folder gets its name, and the first one read.
Nothing here unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError

SCHEMA = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
STEP_NAME = re.compile(r"step-(\d{8,})")
_HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """Where the run stood, as plain JSON values. A checkpoint holds no other state than these and its tensors."""

    step: int
    """Optimizer steps of the whole run, over all stages."""
    stage_index: int = 0
    stage_name: str = ""
    stage_step: int = 0
    """Optimizer steps of this stage."""
    stage_end: bool = False
    """The stage ended here; retention always keeps such a checkpoint."""
    row: int = 0
    """Next packed row of the stage's data plan."""
    plan_hash: str = ""
    sample_chain: str = ""
    """Hash chain over the ids of the samples consumed so far."""
    optimizer_step: int | None = None
    """Steps the stored optimizer state has seen; None when only weights are stored."""
    layout: dict[str, Any] = field(default_factory=dict)
    """``asdict`` of the ``parallel.plan.Layout`` that wrote it. Any layout can read it."""
    config_hash: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    """``asdict`` of the ``ModelConfig``: enough to build the model without the run's YAML."""
    lineage: tuple[str, ...] = ()
    """Checkpoints this one descends from, oldest first, as ``folder@manifest digest``."""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else of the caller, as JSON."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    facts: CheckpointFacts
    files: dict[str, FileEntry]
    digest: str
    """sha256 of the manifest's own content: the identity of the checkpoint."""


def engine_versions() -> dict[str, str]:
    """Versions that decide how a checkpoint's tensors were made and written."""
    found = {}
    for name in ("megatron-medgpt", "megatron-core", "torch", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Published checkpoint folders of a run, newest step first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def pointed_at(folder: Path, name: str) -> str | None:
    """Name of the checkpoint that ``latest`` or ``best`` names; None where there is no such file."""
    pointer = folder / name
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def hash_file(path: Path, stopped: threading.Event | None = None) -> FileEntry:
    """Size and sha256 of one file, read in pieces; of its beginning where ``stopped`` is set meanwhile."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while (stopped is None or not stopped.is_set()) and (piece := stream.read(_HASH_CHUNK_BYTES)):
            digest.update(piece)
            size += len(piece)
    return FileEntry(size_bytes=size, sha256=digest.hexdigest())


def write_manifest(folder: Path, facts: CheckpointFacts, files: Mapping[str, FileEntry]) -> Manifest:
    """Write ``manifest.json`` into ``folder``, flushed to the disk."""
    body = {"schema": SCHEMA, "facts": asdict(facts), "files": {name: asdict(entry) for name, entry in files.items()}}
    body = json.loads(json.dumps(body))  # tuples become lists, and a value that is not JSON fails here
    digest = _digest(body)
    write_durably(folder / MANIFEST, _canonical({**body, "digest": digest}))
    return Manifest(facts=_facts_from_json(body["facts"]), files=dict(files), digest=digest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` itself; no other file is touched.

    Raises:
        UsageError: there is no checkpoint, it is half-written, or its manifest was altered.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UsageError(f"checkpoint {folder}: no such folder; name a step-NNNNNNNN folder of a run's checkpoints/")
    if not path.is_file():
        raise UsageError(
            f"checkpoint {folder}: {MANIFEST} is missing, so it was never finished; use another checkpoint"
        )
    raw = path.read_bytes()
    try:
        body = json.loads(raw)
        digest = body.pop("digest")
        canonical = _canonical({**body, "digest": digest})
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"checkpoint {folder}: {MANIFEST} is not readable ({error}); use another checkpoint") from None
    if canonical != raw or _digest(body) != digest:
        raise UsageError(f"checkpoint {folder}: {MANIFEST} does not match its own digest; use another checkpoint")
    if body.get("schema") != SCHEMA:
        raise UsageError(
            f"checkpoint {folder}: manifest schema {body.get('schema')!r}, this version reads {SCHEMA}; "
            "use the version of megatron-medgpt that wrote it"
        )
    files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
    return Manifest(facts=_facts_from_json(body["facts"]), files=files, digest=digest)


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Compare names, kinds and sizes of the folder's files with the manifest (no content is read).

    Raises:
        UsageError: a file is missing, extra, not a plain file, or has another size.
    """
    present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    present.pop(MANIFEST, None)
    for what, names in (
        ("missing", manifest.files.keys() - present.keys()),
        ("not in the manifest", present.keys() - manifest.files.keys()),
        ("not a plain file", {name for name, status in present.items() if not stat.S_ISREG(status.st_mode)}),
    ):
        if names:
            raise UsageError(f"checkpoint {folder}: {listed(names)} {what}; use another checkpoint")
    for name, entry in manifest.files.items():
        if present[name].st_size != entry.size_bytes:
            raise UsageError(
                f"checkpoint {folder}: {name} has {present[name].st_size} bytes, the manifest says {entry.size_bytes}; "
                "use another checkpoint"
            )


def altered_files(
    folder: Path, manifest: Manifest, *, part: int = 0, num_parts: int = 1, stopped: threading.Event | None = None
) -> list[str]:
    """Names of the files whose content is not what the manifest says.

    Args:
        part, num_parts: look at this share of the bytes only, so that ranks can divide the reading among them.
        stopped: set it where the answer is no longer wanted; it comes at once then, and is wrong.
    """
    shares = [0] * num_parts
    mine = []
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        lightest = shares.index(min(shares))
        shares[lightest] += entry.size_bytes + 1
        if lightest == part:
            mine.append(name)
    return [name for name in mine if hash_file(folder / name, stopped) != manifest.files[name]]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries (names, renames), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _facts_from_json(values: Mapping[str, Any]) -> CheckpointFacts:
    known = {item.name for item in fields(CheckpointFacts)}
    unknown = values.keys() - known
    if unknown:
        raise UsageError(
            f"manifest facts hold {listed(unknown)}, which this version does not know; use a newer version"
        )
    return CheckpointFacts(**{**values, "lineage": tuple(values.get("lineage", ()))})


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Names in order for one line of text, the first few written out."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
