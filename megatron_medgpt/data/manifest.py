"""dataset.json: what a dataset folder holds, with the size and sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError, WorkError

SCHEMA = 2
"""2: shards name body part, view and laterality of a sample. 1, which does not, is read as well."""
_READ_SCHEMAS = (1, SCHEMA)
STORE_KINDS = {"encoded": 1, "pixels": 2}
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"
"""A copy of the tokenizer that made the token ids, so that a dataset can be read on its own."""
REJECTS = "rejects.jsonl"
_UNSEALED = b'"seal": "' + b"0" * 64 + b'"'


@dataclass(frozen=True, kw_only=True)
class Store:
    """How images lie in a dataset. ``size_px`` and ``pad_rgb`` say how pixel records were made ready; 0 for encoded."""

    kind: str = "encoded"
    size_px: int = 0
    pad_rgb: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """One shard in dataset.json."""

    name: str
    num_samples: int
    num_images: int
    num_tokens: int
    num_targets: int
    modalities: dict[str, int]
    files: dict[str, dict[str, Any]]
    """File name -> {"bytes", "sha256"}."""
    body_parts: dict[str, int] = field(default_factory=dict)
    """Samples by body part; those of which none is known are not listed, here and in the next two."""
    views: dict[str, int] = field(default_factory=dict)
    lateralities: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """dataset.json."""

    schema: int = SCHEMA
    num_samples: int
    num_images: int
    num_tokens: int
    """Text tokens, an image counted as one mark."""
    num_targets: int
    modalities: dict[str, int]
    """Samples by modality, ``unknown`` among them."""
    tokenizer: dict[str, Any]
    """{"sha256", "vocab_size", "image_mark_id"} of the tokenizer that made the token ids."""
    store: Store
    shards: tuple[ShardFacts, ...]
    num_records: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    """Reason -> count. Records that came in = samples + rejects, always."""
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files of no shard (rejects.jsonl, tokenizer.json) -> {"bytes", "sha256"}."""
    body_parts: dict[str, int] = field(default_factory=dict)
    views: dict[str, int] = field(default_factory=dict)
    lateralities: dict[str, int] = field(default_factory=dict)
    """See ``ShardFacts``, as for the two before."""
    seal: str = ""
    """sha256 of this file with 64 zeros in place of the seal; datasets of before have none."""


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its place, flush it, then move it there."""
    _write(path, _json(content))


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_manifest(
    folder: Path,
    shards: Sequence[ShardFacts],
    *,
    tokenizer: dict[str, Any],
    store: Store,
    num_records: int,
    rejects: dict[str, int],
    provenance: dict[str, Any],
) -> Manifest:
    """Write dataset.json, the last file of a dataset: without it the folder is not one.

    It is sealed with its own sha256 and that of ``rejects.jsonl`` and ``tokenizer.json``, where they lie in the folder.
    """
    manifest = Manifest(
        num_samples=sum(s.num_samples for s in shards), num_images=sum(s.num_images for s in shards),
        num_tokens=sum(s.num_tokens for s in shards), num_targets=sum(s.num_targets for s in shards),
        **{name: added_up(shards, name) for name in LISTED}, tokenizer=tokenizer, store=store, shards=tuple(shards),
        num_records=num_records, rejects=dict(sorted(rejects.items())), provenance=provenance,
        files={
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in (REJECTS, TOKENIZER) if (folder / name).is_file()
        },
        seal="0" * 64,
    )  # fmt: skip
    content = _json(asdict(manifest))
    seal = hashlib.sha256(content).hexdigest()
    _write(folder / MANIFEST, _sealed(content, seal))
    return replace(manifest, seal=seal)


LISTED = ("modalities", "body_parts", "views", "lateralities")
"""Counts of samples that every shard has."""


def added_up(shards: Sequence[ShardFacts], listed: str) -> dict[str, int]:
    """One of ``LISTED`` over all shards."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(getattr(shard, listed))
    return dict(sorted(counts.items()))


def _sealed(content: bytes, seal: str) -> bytes:
    before, _, after = content.rpartition(_UNSEALED)
    return before + _UNSEALED.replace(b"0" * 64, seal.encode()) + after


def _check_seal(content: bytes, seal: str) -> None:
    before, _, after = content.rpartition(f'"seal": "{seal}"'.encode())
    if hashlib.sha256(before + _UNSEALED + after).hexdigest() != seal:
        raise ValueError("its sha256 is not its seal")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """dataset.json and its sha256.

    Raises:
        UsageError: the folder is not a dataset, or of another schema.
        WorkError: dataset.json is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is not a dataset: it has no {MANIFEST}; make one with medgpt ingest")
    try:
        content = path.read_bytes()
        raw = json.loads(content)
        if isinstance(raw, dict) and raw.get("schema") not in _READ_SCHEMAS:
            known = " and ".join(map(str, _READ_SCHEMAS))
            raise UsageError(f"{folder} has schema {raw.get('schema')!r}, this version reads {known}; ingest it again")
        shards = tuple(ShardFacts(**shard) for shard in raw.pop("shards"))
        store = raw.pop("store")
        manifest = Manifest(**raw, shards=shards, store=Store(**{**store, "pad_rgb": tuple(store["pad_rgb"])}))
        _check(manifest)
        if manifest.seal:
            _check_seal(content, manifest.seal)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WorkError(f"{path} is damaged ({error}); restore it or ingest again") from error
    return manifest, hashlib.sha256(content).hexdigest()


def _check(manifest: Manifest) -> None:
    """Types, file names and sums of a manifest. A name in it is never a path.

    Raises:
        ValueError: what is wrong.
    """
    tokenizer, store = manifest.tokenizer, manifest.store
    numbers = [tokenizer["vocab_size"], tokenizer["image_mark_id"], tokenizer["pad_id"], store.size_px, *store.pad_rgb]
    if not isinstance(tokenizer["sha256"], str) or store.kind not in STORE_KINDS or len(store.pad_rgb) != 3:
        raise ValueError("tokenizer or store is not as it should be")
    for number, shard in enumerate(manifest.shards):
        suffixes = (["text.bin", "text.idx", "ids"] if shard.num_samples else []) + (
            ["image.bin", "image.idx"] if shard.num_images else []
        )
        if not re.fullmatch(r"shard-[0-9]{5}", shard.name) or set(shard.files) != {
            f"{shard.name}.{s}" for s in suffixes
        }:
            raise ValueError(f"shard {number} has unexpected file names")
        if not all(isinstance(entry["sha256"], str) for entry in shard.files.values()):
            raise ValueError(f"shard {number} has a sha256 that is no text")
        numbers += [entry["bytes"] for entry in shard.files.values()]
        numbers += [count for name in LISTED for count in getattr(shard, name).values()]
    for field_name in ("num_samples", "num_images", "num_tokens", "num_targets"):
        counts = [getattr(shard, field_name) for shard in manifest.shards]
        numbers += [*counts, getattr(manifest, field_name)]
        if sum(counts) != getattr(manifest, field_name):
            raise ValueError(f"{field_name} is not the sum over the shards")
    if not set(manifest.files) <= {REJECTS, TOKENIZER}:
        raise ValueError("a file is listed that belongs to no dataset")
    numbers += [entry["bytes"] for entry in manifest.files.values()]
    numbers += [manifest.num_records, *manifest.rejects.values()]
    for name in LISTED:
        if getattr(manifest, name) != added_up(manifest.shards, name):
            raise ValueError(f"{name} are not the sum over the shards")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a count is not a whole number")
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise ValueError("a shard is listed twice")
