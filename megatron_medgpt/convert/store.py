"""Writes a checkpoint of the model's weights part by part, in the format and with the protocol of ``checkpoint/save``.

megatron-core's writer wants the model in memory. A ``torch_dist`` folder is plain enough to be written without one:
``torch.save`` archives one after the other in ``__0_N.distcp`` and one ``.metadata`` that says which chunk of which
tensor begins where. Each thread owns a file. A large tensor becomes many chunks (a handful of experts each), so that
a rank that loads its share of the experts reads no others.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_medgpt.checkpoint.manifest import (
    CheckpointFacts,
    FileEntry,
    check_listing,
    engine_versions,
    hash_file,
    write_durably,
    write_manifest,
)
from megatron_medgpt.checkpoint.metadata import COMMON, ENGINE_CONFIG, METADATA
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.stored import STACK, stored_key

_ALIGNMENT = 64
_PIECE_BYTES = 1 << 20
_FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip
"""``CheckpointingConfig("torch_dist", 1)`` as megatron-core 0.16 writes and 0.19 reads it. To import it would take
two seconds."""


class _HashedFile(io.RawIOBase):
    """A file that is written once from front to back and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.name, self._file = path.name, open(path, "xb", buffering=0)  # noqa: SIM115 (closed by finish, abandon)
        self._digest, self.at = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        try:
            # Piece by piece, so that what was hashed is still in the processor's cache when it is written.
            for start in range(0, len(view), _PIECE_BYTES):
                left = view[start : start + _PIECE_BYTES]
                self._digest.update(left)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            self.failure = error
            raise
        self.at += len(view)
        return len(view)

    def align(self) -> None:
        """Begin the next archive where its tensor's elements will be aligned, so that a mapped view is one."""
        self.write(bytes(-self.at % _ALIGNMENT))

    def finish(self) -> FileEntry:
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(size_bytes=self.at, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        self._file.close()


class CheckpointWriter:
    """Chunks of the model's tensors into a folder, from any number of threads.

    Args:
        folder: exists and is empty.
        specs: every tensor by our names.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._folder = folder
        self._specs = dict(specs)
        self._lock = threading.Lock()
        self._own = threading.local()
        self._files: list[_HashedFile] = []
        self._written: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]] = {}

    def write(self, name: str, first: int, tensor: Tensor) -> None:
        """Store the part of ``name`` that starts at row ``first`` of its first axis."""
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape[1:]) != spec.shape[1:]:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not fit {spec}")
        key, layer = stored_key(name)
        offsets = (first, *(0,) * (tensor.ndim - 1))
        if layer is not None:
            tensor, offsets = tensor[None], (layer, *offsets)
        file = self._file()
        file.align()
        start = file.at
        # A tensor that is a part of a larger storage would be saved with all of it.
        whole = tensor.contiguous() if _owns_its_storage(tensor) else tensor.clone().contiguous()
        try:
            torch.save(whole, file)
        except Exception:
            if file.failure is not None:  # torch's writer makes something else of a full disk
                raise file.failure from None
            raise
        with self._lock:
            self._written.setdefault(key, []).append((offsets, tuple(tensor.shape), file.name, start, file.at - start))

    def finish(self, facts: CheckpointFacts) -> None:
        """Write metadata and manifest; everything is flushed to the disk."""
        files = {file.name: file.finish() for file in self._files}
        self._files = []
        write_durably(self._folder / METADATA, pickle.dumps(self._metadata()))
        common = io.BytesIO()
        torch.save({}, common)
        write_durably(self._folder / COMMON, common.getvalue())
        write_durably(self._folder / ENGINE_CONFIG, json.dumps(_FORMAT).encode())
        files.update({name: hash_file(self._folder / name) for name in (METADATA, COMMON, ENGINE_CONFIG)})
        facts = facts if facts.versions else replace(facts, versions=engine_versions())
        check_listing(self._folder, write_manifest(self._folder, facts, files))

    def abandon(self) -> None:
        while self._files:
            self._files.pop().abandon()

    def _file(self) -> _HashedFile:
        if not hasattr(self._own, "file"):
            with self._lock:
                self._own.file = _HashedFile(self._folder / f"__0_{len(self._files)}.distcp")
                self._files.append(self._own.file)
        return self._own.file

    def _metadata(self) -> Metadata:
        tensors, storage = {}, {}
        for key, shape_dtype in _stored_specs(self._specs).items():
            chunks = sorted(self._written[key])
            tensors[key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=shape_dtype.dtype),
                size=torch.Size(shape_dtype.shape),
                chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, *_ in chunks],
            )
            for number, (offsets, _, file, start, length) in enumerate(chunks):
                index = MetadataIndex(key, torch.Size(offsets), number)
                storage[index] = _StorageInfo(file, start, length)
        return Metadata(state_dict_metadata=tensors, storage_data=storage, storage_meta=StorageMeta())


def _stored_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Specs by the keys of the checkpoint: the layers of a decoder stacked."""
    found: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        key, layer = stored_key(name)
        if layer is None:
            found[key] = spec
            continue
        layers = max(layer + 1, found[key].shape[0] if key in found else 0)
        if key in found and (found[key].dtype != spec.dtype or found[key].shape[1:] != spec.shape):
            raise ValueError(f"{name} is {spec}, another layer's is {found[key]}; {STACK}* is one tensor in the file")
        found[key] = TensorSpec((layers, *spec.shape), spec.dtype)
    return found


def _owns_its_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() or not tensor.is_contiguous()
