"""A checkpoint's weights, read part by part from memory-mapped files, in whichever layout they were written.

A ``.distcp`` file is a row of ``torch.save`` archives (zip files without compression), one for each chunk of a tensor;
``.metadata`` says where. megatron-core stacks the layers of a decoder into one stored tensor per parameter
(``language.decoder.layers.mlp.router.bias`` of shape (layers, E)); here every layer has its own name again.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medgpt.checkpoint.manifest import Manifest, altered_files, check_listing, listed, read_manifest
from megatron_medgpt.checkpoint.metadata import METADATA, OPTIMIZER_PREFIX, _MetadataUnpickler, stored_tensors
from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError
from megatron_medgpt.convert.mapped import MappedFile, TensorSpec

STACK = "language.decoder.layers."
_TENSOR_FILE = ".distcp"
_MAX_DESCRIPTION_BYTES = 1 << 16
_LAYER = re.compile(re.escape(STACK) + r"(\d+)\.(.+)")


def stored_key(name: str) -> tuple[str, int | None]:
    """Key in the checkpoint of one of our tensors, and the layer's place in the stack if it belongs to one."""
    found = _LAYER.fullmatch(name)
    return (f"{STACK}{found[2]}", int(found[1])) if found else (name, None)


@dataclass(slots=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: MappedFile
    start: int
    length: int
    place: tuple[int, tuple[int, ...]] | None = None
    """Byte at which the elements begin, and the strides; None before the archive was opened."""


class StoredCheckpoint:
    """The model's tensors of one checkpoint folder by our names (``MedGPT``'s, with the layers' numbers).

    Every file is compared with the manifest before anything is unpickled; optimizer tensors are left unread.

    Args:
        verify_content: compare the files of tensors, too, before anything is read from them; False where that was just
            done, or is done meanwhile (``verified_meanwhile``).

    Raises:
        UsageError: the checkpoint is missing, half-written, altered or not readable.
    """

    def __init__(self, path: Path, *, verify_content: bool = True, num_threads: int = 2) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        check_listing(path, self.manifest)
        small = {name: entry for name, entry in self.manifest.files.items() if not name.endswith(_TENSOR_FILE)}
        self._refuse(altered_files(path, replace(self.manifest, files=small)))
        if verify_content:
            with self.verified_meanwhile(num_threads):
                pass
        stored = stored_tensors(path)  # refuses globals outside its allow-list
        with open(path / METADATA, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        self._specs: dict[str, TensorSpec] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        for key, found in stored.items():
            if key.startswith(OPTIMIZER_PREFIX):
                continue
            self._chunks[key] = []
            if key.startswith(STACK):
                for layer in range(found.shape[0]):
                    self._specs[f"{STACK}{layer}.{key[len(STACK) :]}"] = TensorSpec(found.shape[1:], found.dtype)
            else:
                self._specs[key] = TensorSpec(found.shape, found.dtype)
        self._collect(metadata)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def tensor(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """The tensor, or its part ``[first, end)`` along its first axis; a view of the file where one chunk holds it.

        Raises:
            WorkError: the chunks do not cover the part.
        """
        begin, sizes = self._region(name, first, end)
        key, layer = stored_key(name)
        shape = sizes[1:] if layer is not None else sizes
        parts = [(chunk, *_overlap(chunk, begin, sizes)) for chunk in self._chunks[key]]
        parts = [part for part in parts if all(length > 0 for length in part[2])]
        if sum(math.prod(lengths) for _, _, lengths in parts) != math.prod(sizes):
            raise WorkError(f"checkpoint {self.path}: the stored chunks of {name} do not cover it once")
        dtype = self._specs[name].dtype
        if len(parts) == 1:
            return _read(*parts[0], dtype).reshape(shape)
        whole = torch.empty(sizes, dtype=dtype)
        for chunk, start, lengths in parts:
            target = whole
            for axis, (place, length) in enumerate(zip(start, lengths)):
                target = target.narrow(axis, place - begin[axis], length)
            target.copy_(_read(chunk, start, lengths, dtype))
        return whole.view(shape)

    def forget(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Give back the memory of the chunks that the part touched."""
        begin, sizes = self._region(name, first, end)
        for chunk in self._chunks[stored_key(name)[0]]:
            if all(length > 0 for length in _overlap(chunk, begin, sizes)[1]):
                chunk.file.forget(chunk.start, chunk.length)

    @contextmanager
    def verified_meanwhile(self, num_threads: int = 2) -> Iterator[None]:
        """Compare the files of tensors with the manifest while the block reads them, so that they come from the disk
        once. What the block made of them may be kept only when it has ended without an error.

        Raises:
            UsageError: a file was altered; also in place of an error of ours in the block, which it explains.
        """
        tensors = {name: entry for name, entry in self.manifest.files.items() if name.endswith(_TENSOR_FILE)}
        manifest, stopped = replace(self.manifest, files=tensors), threading.Event()
        with ThreadPoolExecutor(num_threads) as pool:
            shares = [
                pool.submit(altered_files, self.path, manifest, part=part, num_parts=num_threads, stopped=stopped)
                for part in range(num_threads)
            ]

            def refuse() -> None:
                self._refuse(sorted(name for share in shares for name in share.result()))

            try:
                yield
            except MedgptError:
                refuse()
                raise
            except BaseException:
                stopped.set()
                raise
            refuse()

    def _region(self, name: str, first: int, end: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape, layer = self._specs[name].shape, stored_key(name)[1]
        begin, sizes = (0,) * len(shape), shape
        if shape:
            begin = (first, *begin[1:])
            sizes = ((shape[0] if end is None else end) - first, *shape[1:])
        return (begin, sizes) if layer is None else ((layer, *begin), (1, *sizes))

    def _refuse(self, altered: list[str]) -> None:
        if altered:
            raise UsageError(
                f"checkpoint {self.path}: the content of {listed(altered)} is not what was written (sha256 "
                "differs); use another checkpoint"
            )

    def _collect(self, metadata: Any) -> None:
        files: dict[str, MappedFile] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn not in self._chunks:
                continue
            name = info.relative_path
            if name not in self.manifest.files:  # also what keeps a path from leading out of the folder
                raise UsageError(f"checkpoint {self.path}: its metadata names {name!r}, the manifest does not")
            files.setdefault(name, MappedFile(self.path / name))
            sizes = _sizes(metadata.state_dict_metadata[index.fqn].chunks, index)
            chunk = _Chunk(tuple(index.offset), sizes, files[name], info.offset, info.length)
            self._chunks[index.fqn].append(chunk)


def _sizes(chunks: list[Any], index: Any) -> tuple[int, ...]:
    if index.index is not None and tuple(chunks[index.index].offsets) == tuple(index.offset):
        return tuple(chunks[index.index].sizes)
    return next(tuple(chunk.sizes) for chunk in chunks if tuple(chunk.offsets) == tuple(index.offset))


def _overlap(chunk: _Chunk, begin: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and lengths of what a chunk and a region have in common, in places of the whole tensor."""
    start = tuple(max(a, b) for a, b in zip(chunk.offsets, begin))
    ends = (min(o + n, b + s) for o, n, b, s in zip(chunk.offsets, chunk.sizes, begin, sizes))
    return start, tuple(end - place for end, place in zip(ends, start))


def _read(chunk: _Chunk, start: tuple[int, ...], lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of a chunk, ``start`` in places of the whole tensor; a view of the file."""
    if chunk.place is None:
        chunk.place = _place(chunk, dtype)
    first, strides = chunk.place
    first += dtype.itemsize * sum((a - b) * stride for a, b, stride in zip(start, chunk.offsets, strides))
    count = 1 + sum((length - 1) * stride for length, stride in zip(lengths, strides))
    return chunk.file.view(TensorSpec((count,), dtype), first).as_strided(lengths, strides)


def _place(chunk: _Chunk, dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """Find a chunk's elements in its archive, and refuse an archive that holds anything but the tensor described."""

    def refuse(why: str) -> WorkError:
        return WorkError(f"{chunk.file.path}: the chunk at byte {chunk.start} {why}; the checkpoint is damaged")

    def contents(entry: zipfile.ZipInfo) -> int:
        """Byte of the file at which an entry's contents begin, behind its own header."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise refuse("is compressed")
        header = chunk.file.bytes(chunk.start + entry.header_offset, chunk.start + entry.header_offset + 30)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return chunk.start + entry.header_offset + 30 + names

    def small(entry: zipfile.ZipInfo) -> bytes:
        # Not through zipfile, which wants the CRC-32 that our writer leaves out (see store.py).
        return chunk.file.bytes(contents(entry), contents(entry) + min(entry.file_size, _MAX_DESCRIPTION_BYTES))

    try:
        with zipfile.ZipFile(_Window(chunk.file, chunk.start, chunk.length)) as archive:
            by_leaf = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        description = _TensorUnpickler(io.BytesIO(small(by_leaf["data.pkl"]))).load()
        order = small(by_leaf["byteorder"]) if "byteorder" in by_leaf else b"little"
        data = by_leaf["data/" + description.key]
    except (
        zipfile.BadZipFile, pickle.UnpicklingError, KeyError, EOFError, AttributeError, ValueError, TypeError,
    ) as error:  # fmt: skip
        raise refuse(f"is not readable ({error})") from None
    if order != b"little":
        raise refuse("is big-endian")
    if description.shape != chunk.sizes or description.dtype != dtype:
        raise refuse(f"is {description.shape} {description.dtype}, its metadata says {chunk.sizes} {dtype}")
    return contents(data) + description.offset * dtype.itemsize, description.strides


class _Window(io.RawIOBase):
    """Part of a mapped file as a file."""

    def __init__(self, file: MappedFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("negative seek")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._length if size is None or size < 0 else min(self._length, self._at + size)
        data = self._file.bytes(self._start + self._at, self._start + max(self._at, end))
        self._at += len(data)
        return data


@dataclass(frozen=True, slots=True)
class _Description:
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one plain tensor; anything else it names is refused, nothing is run."""

    def persistent_load(self, saved: Any) -> Any:
        kind, storage, key, *_ = saved
        if kind != "storage":
            raise pickle.UnpicklingError("no storage")
        return storage, key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _describe(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Description:
    return _Description(storage[1], storage[0], int(offset), tuple(shape), tuple(strides))


_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def parts_of(spec: TensorSpec, part_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of the first axis of about ``part_bytes`` each."""
    if not spec.shape or spec.num_bytes <= part_bytes:
        yield 0, spec.shape[0] if spec.shape else 1
        return
    rows = max(1, part_bytes * spec.shape[0] // spec.num_bytes)
    for first in range(0, spec.shape[0], rows):
        yield first, min(first + rows, spec.shape[0])
